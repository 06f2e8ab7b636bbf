// metal:: functions of numbers, overloaded by type as Metal does, so that a call that is ambiguous there is so here.
#pragma once
#include "types.h"

namespace metal {

#define HARNESS_EACH_INTEGER(F) F(char) F(uchar) F(short) F(ushort) F(int) F(uint) F(long) F(ulong)
#define HARNESS_EACH_FLOAT(F) F(half) F(bfloat) F(float)

#define HARNESS_ORDERED(T)                                                       \
  inline constexpr T min(T a, T b) { return b < a ? b : a; }                     \
  inline constexpr T max(T a, T b) { return a < b ? b : a; }                     \
  inline constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  inline constexpr T select(T no, T yes, bool which) { return which ? yes : no; }
HARNESS_EACH_INTEGER(HARNESS_ORDERED)
#undef HARNESS_ORDERED

#define HARNESS_INTEGER(T)                                                                                          \
  inline constexpr T abs(T x) { return x < 0 ? T(-x) : x; }                                                         \
  inline constexpr T popcount(T x) { return T(__builtin_popcountll(uint64_t(traits::make_unsigned_t<T>(x)))); }        \
  inline constexpr T clz(T x) {                                                                                     \
    return T(x == 0 ? 8 * sizeof(T) : __builtin_clzll(uint64_t(traits::make_unsigned_t<T>(x))) - 64 + 8 * sizeof(T));  \
  }                                                                                                                 \
  inline constexpr T ctz(T x) { return T(x == 0 ? 8 * sizeof(T) : __builtin_ctzll(uint64_t(traits::make_unsigned_t<T>(x)))); } \
  inline constexpr T extract_bits(T x, uint offset, uint bits) {                                                    \
    if (bits == 0) return 0;                                                                                        \
    if constexpr (T(-1) > T(0)) {                                                                                   \
      return T((uint64_t(x) >> offset) & (~uint64_t(0) >> (64 - bits)));                                            \
    } else {                                                                                                        \
      return T(int64_t(uint64_t(int64_t(x)) << (64 - offset - bits)) >> (64 - bits));                               \
    }                                                                                                               \
  }                                                                                                                 \
  inline constexpr T insert_bits(T base, T x, uint offset, uint bits) {                                             \
    const uint64_t mask = bits == 0 ? 0 : (~uint64_t(0) >> (64 - bits)) << offset;                                  \
    return T((uint64_t(base) & ~mask) | ((uint64_t(x) << offset) & mask));                                          \
  }                                                                                                                 \
  inline constexpr T rotate(T x, T by) {                                                                            \
    using U = traits::make_unsigned_t<T>;                                                                              \
    const unsigned n = 8 * sizeof(T), k = unsigned(by) % n;                                                         \
    return k == 0 ? x : T(U(uint64_t(U(x)) << k) | U(U(x) >> (n - k)));                                             \
  }
HARNESS_EACH_INTEGER(HARNESS_INTEGER)
#undef HARNESS_INTEGER

#define HARNESS_UNARY(T, name, call) \
  inline T name(T x) { return T(call(float(x))); }
#define HARNESS_FLOAT_UNARY(T)                    \
  HARNESS_UNARY(T, exp, __builtin_expf)           \
  HARNESS_UNARY(T, exp2, __builtin_exp2f)         \
  HARNESS_UNARY(T, log, __builtin_logf)           \
  HARNESS_UNARY(T, log2, __builtin_log2f)         \
  HARNESS_UNARY(T, log10, __builtin_log10f)       \
  HARNESS_UNARY(T, sin, __builtin_sinf)           \
  HARNESS_UNARY(T, cos, __builtin_cosf)           \
  HARNESS_UNARY(T, tanh, __builtin_tanhf)         \
  HARNESS_UNARY(T, sqrt, __builtin_sqrtf)         \
  HARNESS_UNARY(T, rsqrt, 1.0f / __builtin_sqrtf) \
  HARNESS_UNARY(T, floor, __builtin_floorf)       \
  HARNESS_UNARY(T, ceil, __builtin_ceilf)         \
  HARNESS_UNARY(T, round, __builtin_roundf)       \
  HARNESS_UNARY(T, rint, __builtin_rintf)         \
  HARNESS_UNARY(T, trunc, __builtin_truncf)

#define HARNESS_FLOAT(T)                                                                                       \
  HARNESS_FLOAT_UNARY(T)                                                                                       \
  inline T fabs(T x) { return T(__builtin_fabsf(float(x))); }                                                  \
  inline T abs(T x) { return fabs(x); }                                                                        \
  inline T fmin(T a, T b) { return T(__builtin_fminf(float(a), float(b))); }                                   \
  inline T fmax(T a, T b) { return T(__builtin_fmaxf(float(a), float(b))); }                                   \
  inline T min(T a, T b) { return fmin(a, b); }                                                                \
  inline T max(T a, T b) { return fmax(a, b); }                                                                \
  inline T clamp(T x, T low, T high) { return fmin(fmax(x, low), high); }                                      \
  inline T saturate(T x) { return T(__builtin_fminf(__builtin_fmaxf(float(x), 0.0f), 1.0f)); }                 \
  inline T fract(T x) { return T(float(x) - __builtin_floorf(float(x))); }                                     \
  inline T sign(T x) { return T(float(x) > 0 ? 1.0f : float(x) < 0 ? -1.0f : 0.0f); }                          \
  inline T copysign(T x, T y) { return T(__builtin_copysignf(float(x), float(y))); }                           \
  inline T ldexp(T x, int e) { return T(__builtin_ldexpf(float(x), e)); }                                      \
  inline T pow(T x, T y) { return T(__builtin_powf(float(x), float(y))); }                                     \
  inline T powr(T x, T y) { return T(__builtin_powf(float(x), float(y))); }                                    \
  inline T fmod(T x, T y) { return T(__builtin_fmodf(float(x), float(y))); }                                   \
  inline T fma(T a, T b, T c) { return T(__builtin_fmaf(float(a), float(b), float(c))); }                      \
  inline T mix(T a, T b, T t) { return T(float(a) + (float(b) - float(a)) * float(t)); }                       \
  inline T step(T edge, T x) { return T(float(x) < float(edge) ? 0.0f : 1.0f); }                               \
  inline T divide(T a, T b) { return T(float(a) / float(b)); }                                                 \
  inline T select(T no, T yes, bool which) { return which ? yes : no; }                                        \
  inline bool isnan(T x) { return __builtin_isnan(float(x)); }                                                 \
  inline bool isinf(T x) { return __builtin_isinf(float(x)); }                                                 \
  inline bool isfinite(T x) { return __builtin_isfinite(float(x)); }                                           \
  inline bool signbit(T x) { return __builtin_signbit(float(x)) != 0; }
HARNESS_EACH_FLOAT(HARNESS_FLOAT)

// No __attribute__((fast)) here: the same functions under Metal's names for less and more exact ones.
namespace fast {
HARNESS_FLOAT_UNARY(float)
inline float divide(float a, float b) { return a / b; }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float powr(float x, float y) { return __builtin_powf(x, y); }
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
}  // namespace fast
namespace precise {
using namespace fast;
}
#undef HARNESS_FLOAT
#undef HARNESS_FLOAT_UNARY
#undef HARNESS_UNARY

inline uint mulhi(uint a, uint b) { return uint(uint64_t(a) * b >> 32); }
inline int mad24(int a, int b, int c) { return a * b + c; }
inline uint mad24(uint a, uint b, uint c) { return a * b + c; }
inline int mul24(int a, int b) { return a * b; }
inline uint mul24(uint a, uint b) { return a * b; }
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }

// Vectors: element by element.
#define HARNESS_VECTOR_UNARY(name)                             \
  template <class T, int N>                                    \
  inline native_vec<T, N> name(native_vec<T, N> x) { \
    for (int i = 0; i < N; i++) x[i] = name(T(x[i]));          \
    return x;                                                  \
  }
HARNESS_VECTOR_UNARY(abs)
HARNESS_VECTOR_UNARY(fabs)
HARNESS_VECTOR_UNARY(exp)
HARNESS_VECTOR_UNARY(exp2)
HARNESS_VECTOR_UNARY(sqrt)
HARNESS_VECTOR_UNARY(rsqrt)
HARNESS_VECTOR_UNARY(floor)
HARNESS_VECTOR_UNARY(round)
HARNESS_VECTOR_UNARY(rint)
#define HARNESS_VECTOR_BINARY(name)                                                                                  \
  template <class T, int N>                                                                                          \
  inline native_vec<T, N> name(native_vec<T, N> x, native_vec<T, N> y) {\
    for (int i = 0; i < N; i++) x[i] = name(T(x[i]), T(y[i]));                                                       \
    return x;                                                                                                        \
  }
HARNESS_VECTOR_BINARY(min)
HARNESS_VECTOR_BINARY(max)
HARNESS_VECTOR_BINARY(fmin)
HARNESS_VECTOR_BINARY(fmax)
template <class T, int N>
inline native_vec<T, N> fma(native_vec<T, N> x, native_vec<T, N> y, native_vec<T, N> z) {
  for (int i = 0; i < N; i++) x[i] = fma(T(x[i]), T(y[i]), T(z[i]));
  return x;
}
template <class T, int N>
inline T dot(native_vec<T, N> x, native_vec<T, N> y) {
  T sum = T(0);
  for (int i = 0; i < N; i++) sum = T(sum + x[i] * y[i]);
  return sum;
}

template <class T>
struct numeric_limits;
#define HARNESS_LIMITS(T, digits_, low, high, eps, inf, nan)              \
  template <>                                                             \
  struct numeric_limits<T> {                                              \
    static constexpr int digits = digits_;                                \
    static constexpr T min() { return T(low); }                           \
    static constexpr T max() { return T(high); }                          \
    static constexpr T lowest() { return T(inf) == T(0) ? T(low) : T(-(high)); } \
    static constexpr T epsilon() { return T(eps); }                       \
    static constexpr T infinity() { return T(inf); }                      \
    static constexpr T quiet_NaN() { return T(nan); }                     \
  };
HARNESS_LIMITS(char, 7, -128, 127, 0, 0, 0)
HARNESS_LIMITS(uchar, 8, 0, 255, 0, 0, 0)
HARNESS_LIMITS(int8_t, 7, -128, 127, 0, 0, 0)
HARNESS_LIMITS(short, 15, -32768, 32767, 0, 0, 0)
HARNESS_LIMITS(ushort, 16, 0, 65535, 0, 0, 0)
HARNESS_LIMITS(int, 31, -2147483647 - 1, 2147483647, 0, 0, 0)
HARNESS_LIMITS(uint, 32, 0, 0xFFFFFFFFu, 0, 0, 0)
HARNESS_LIMITS(long, 63, -9223372036854775807L - 1, 9223372036854775807L, 0, 0, 0)
HARNESS_LIMITS(ulong, 64, 0, 0xFFFFFFFFFFFFFFFFul, 0, 0, 0)
HARNESS_LIMITS(half, 11, 6.103515625e-5f, 65504.0f, 9.765625e-4f, __builtin_inff(), __builtin_nanf(""))
HARNESS_LIMITS(bfloat, 8, 1.17549435e-38f, 3.3895314e38f, 7.8125e-3f, __builtin_inff(), __builtin_nanf(""))
HARNESS_LIMITS(float, 24, 1.17549435e-38f, 3.40282347e38f, 1.1920929e-7f, __builtin_inff(), __builtin_nanf(""))

}  // namespace metal

// MLX's own limits, which its prelude gives to every kernel.
template <class T>
struct Limits {
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::lowest();
  static constexpr T max = metal::is_floating_point_v<T> ? metal::numeric_limits<T>::infinity() : finite_max;
  static constexpr T min = metal::is_floating_point_v<T> ? T(-metal::numeric_limits<T>::infinity()) : finite_min;
};
