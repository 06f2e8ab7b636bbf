// CUDA's functions of numbers under their own names.
#pragma once

#define HARNESS_SAME(T)                                    \
  inline constexpr T min(T a, T b) { return b < a ? b : a; } \
  inline constexpr T max(T a, T b) { return a < b ? b : a; }
HARNESS_SAME(int)
HARNESS_SAME(unsigned)
HARNESS_SAME(long)
HARNESS_SAME(unsigned long)
#undef HARNESS_SAME

#define HARNESS_FLOAT1(name, builtin)                        \
  inline float name(float x) { return builtin(x); }          \
  inline float name##f(float x) { return builtin(x); }
HARNESS_FLOAT1(exp, __builtin_expf)
HARNESS_FLOAT1(exp2, __builtin_exp2f)
HARNESS_FLOAT1(log, __builtin_logf)
HARNESS_FLOAT1(log2, __builtin_log2f)
HARNESS_FLOAT1(sqrt, __builtin_sqrtf)
HARNESS_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf)
HARNESS_FLOAT1(fabs, __builtin_fabsf)
HARNESS_FLOAT1(floor, __builtin_floorf)
HARNESS_FLOAT1(ceil, __builtin_ceilf)
HARNESS_FLOAT1(round, __builtin_roundf)
HARNESS_FLOAT1(rint, __builtin_rintf)
HARNESS_FLOAT1(trunc, __builtin_truncf)
HARNESS_FLOAT1(tanh, __builtin_tanhf)
#undef HARNESS_FLOAT1
inline float abs(float x) { return __builtin_fabsf(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float fminf(float x, float y) { return __builtin_fminf(x, y); }
inline float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }
inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
inline float min(float x, float y) { return __builtin_fminf(x, y); }
inline float max(float x, float y) { return __builtin_fmaxf(x, y); }
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float powf(float x, float y) { return __builtin_powf(x, y); }
inline float copysignf(float x, float y) { return __builtin_copysignf(x, y); }
inline float __expf(float x) { return __builtin_expf(x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __saturatef(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

inline int __float2int_rn(float x) { return int(__builtin_rintf(x)); }
inline unsigned __float2uint_rn(float x) { return unsigned(__builtin_rintf(x)); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) { return __builtin_bitreverse32(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned(((uint64_t(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = selector >> (4 * i) & 15u;
    unsigned byte = unsigned(both >> (8 * (pick & 7u))) & 255u;
    if (pick & 8u) byte = byte & 128u ? 255u : 0u;
    out |= byte << (8 * i);
  }
  return out;
}
inline int __dp4a(int x, int y, int sum) {
  for (int i = 0; i < 4; i++) sum += int(int8_t(unsigned(x) >> (8 * i))) * int(int8_t(unsigned(y) >> (8 * i)));
  return sum;
}

template <class T>
__forceinline__ T __ldg(const T* p) { return *p; }
template <class T>
__forceinline__ T __ldcs(const T* p) { return *p; }
template <class T>
__forceinline__ T __ldcg(const T* p) { return *p; }
template <class T>
__forceinline__ void __stcs(T* p, T x) { *p = x; }
// One thread at a time runs, so plain operations are atomic; threadgroups follow one another, so fences do nothing.
template <class T>
inline T atomicAdd(T* p, T x) {
  const T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  __atomic_store_n(p, before + x, __ATOMIC_RELAXED);
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { __builtin_trap(); }

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __ushort_as_half(unsigned short x) { return __builtin_bit_cast(__half, x); }
inline unsigned short __half_as_ushort(__half x) { return __builtin_bit_cast(unsigned short, x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
inline float __low2float(__half2 x) { return float(x.x); }
inline float __high2float(__half2 x) { return float(x.y); }
inline __half2 __hadd2(__half2 x, __half2 y) { return {__half(x.x + y.x), __half(x.y + y.y)}; }
inline __half2 __hsub2(__half2 x, __half2 y) { return {__half(x.x - y.x), __half(x.y - y.y)}; }
inline __half2 __hmul2(__half2 x, __half2 y) { return {__half(x.x * y.x), __half(x.y * y.y)}; }
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  return {__half(float(x.x) * float(y.x) + float(z.x)), __half(float(x.y) * float(y.y) + float(z.y))};
}
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {float(x.x), float(x.y)}; }
