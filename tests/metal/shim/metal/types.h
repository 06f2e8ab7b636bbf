// Metal's scalar and vector types in plain C++. HARNESS_STRUCT_BFLOAT makes bfloat a type that converts as Metal's does.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../traits.h"

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

#ifdef HARNESS_STRUCT_BFLOAT
// Implicitly to float; from every arithmetic type only explicitly.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, class = traits::enable_if_t<traits::is_arithmetic_v<T> || traits::is_same_v<T, half>>>
  constexpr explicit bfloat(T) : bits(0) {}
  constexpr operator float() const { return 0; }
  bfloat& operator+=(bfloat) { return *this; }
  bfloat& operator-=(bfloat) { return *this; }
  bfloat& operator*=(bfloat) { return *this; }
  bfloat& operator/=(bfloat) { return *this; }
  friend constexpr bfloat operator+(bfloat a, bfloat) { return a; }
  friend constexpr bfloat operator-(bfloat a, bfloat) { return a; }
  friend constexpr bfloat operator*(bfloat a, bfloat) { return a; }
  friend constexpr bfloat operator/(bfloat a, bfloat) { return a; }
  friend constexpr bfloat operator-(bfloat a) { return a; }
};
#else
using bfloat = __bf16;
#endif
using float16_t = half;
using bfloat16_t = bfloat;

namespace metal {

template <class T, int N>
using native_vec = T __attribute__((ext_vector_type(N)));
template <class T, int N>
struct vec_of {
  using type = native_vec<T, N>;
};
#ifdef HARNESS_STRUCT_BFLOAT
template <int N>
struct bfloat_vec {
  bfloat x, y, z, w;
  bfloat_vec() = default;
  template <class... A>
  explicit bfloat_vec(A...) {}
  bfloat& operator[](int) { return x; }
  bfloat operator[](int) const { return x; }
};
template <int N>
struct vec_of<bfloat, N> {
  using type = bfloat_vec<N>;
};
#endif
template <class T, int N>
using vec = typename vec_of<T, N>::type;

template <class V>
struct vector_traits {
  using element = V;
  static constexpr int size = 1;
};
template <class T, int N>
struct vector_traits<native_vec<T, N>> {
  using element = T;
  static constexpr int size = N;
};
#ifdef HARNESS_STRUCT_BFLOAT
template <int N>
struct vector_traits<bfloat_vec<N>> {
  using element = bfloat;
  static constexpr int size = N;
};
#endif

// V(parts...) as Metal writes it: scalars and vectors one after another, or one scalar for all.
template <class V, class... A>
inline V make_vec(A... parts) {
  using T = typename vector_traits<V>::element;
  constexpr int size = vector_traits<V>::size, given = (0 + ... + vector_traits<A>::size);
  static_assert(given == size || (sizeof...(A) == 1 && given == 1), "a vector of another number of elements");
  V out;
  int at = 0;
  auto put = [&](auto part) {
    constexpr int n = vector_traits<decltype(part)>::size;
    if constexpr (n == 1) {
      out[at++] = T(part);
    } else {
      for (int i = 0; i < n; i++) out[at++] = T(part[i]);
    }
  };
  (put(parts), ...);
  if constexpr (given == 1) {
    for (int i = 1; i < size; i++) out[i] = out[0];
  }
  return out;
}

template <class To, class From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between different sizes");
  return __builtin_bit_cast(To, value);
}

template <class T, size_t N>
struct array {
  T elements[N];
  constexpr T& operator[](size_t i) { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
};

using traits::bool_constant;
using traits::conditional_t;
using traits::enable_if_t;
using traits::false_type;
using traits::integral_constant;
using traits::is_convertible_v;
using traits::is_integral_v;
using traits::is_same;
using traits::is_same_v;
using traits::is_signed_v;
using traits::is_unsigned_v;
using traits::make_signed_t;
using traits::make_unsigned_t;
using traits::true_type;
template <class T>
inline constexpr bool is_floating_point_v = traits::is_floating_point_v<T> || is_same_v<T, half> || is_same_v<T, bfloat>;

}  // namespace metal

#define HARNESS_VECTORS(T)        \
  namespace metal {               \
  using T##2 = vec<T, 2>;         \
  using T##3 = vec<T, 3>;         \
  using T##4 = vec<T, 4>;         \
  }
HARNESS_VECTORS(char)
HARNESS_VECTORS(uchar)
HARNESS_VECTORS(short)
HARNESS_VECTORS(ushort)
HARNESS_VECTORS(int)
HARNESS_VECTORS(uint)
HARNESS_VECTORS(long)
HARNESS_VECTORS(ulong)
HARNESS_VECTORS(half)
HARNESS_VECTORS(bfloat)
HARNESS_VECTORS(float)
HARNESS_VECTORS(bool)
