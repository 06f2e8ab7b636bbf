// Stands before every Metal text: what MLX's own prelude would have brought, and the address spaces.
#pragma once
#include "metal/simd.h"

using namespace metal;

#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.40282347e38f
#define FLT_MAX 3.40282347e38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX 6.5504e4h
#define M_PI_F 3.14159274101257324f
#define M_LOG2E_F 1.44269502162933349f
#define M_LN2_F 0.693147182464599609f
#define M_SQRT2_F 1.41421353816986084f

// float4(x, y, z, w): a macro, because C++ has no such constructor for the compiler's vectors.
#define HARNESS_MAKE(type, ...) make_vec<type>(__VA_ARGS__)
#define char2(...) HARNESS_MAKE(char2, __VA_ARGS__)
#define char4(...) HARNESS_MAKE(char4, __VA_ARGS__)
#define uchar2(...) HARNESS_MAKE(uchar2, __VA_ARGS__)
#define uchar4(...) HARNESS_MAKE(uchar4, __VA_ARGS__)
#define short2(...) HARNESS_MAKE(short2, __VA_ARGS__)
#define short4(...) HARNESS_MAKE(short4, __VA_ARGS__)
#define ushort2(...) HARNESS_MAKE(ushort2, __VA_ARGS__)
#define ushort4(...) HARNESS_MAKE(ushort4, __VA_ARGS__)
#define int2(...) HARNESS_MAKE(int2, __VA_ARGS__)
#define int3(...) HARNESS_MAKE(int3, __VA_ARGS__)
#define int4(...) HARNESS_MAKE(int4, __VA_ARGS__)
#define uint2(...) HARNESS_MAKE(uint2, __VA_ARGS__)
#define uint3(...) HARNESS_MAKE(uint3, __VA_ARGS__)
#define uint4(...) HARNESS_MAKE(uint4, __VA_ARGS__)
#define half2(...) HARNESS_MAKE(half2, __VA_ARGS__)
#define half3(...) HARNESS_MAKE(half3, __VA_ARGS__)
#define half4(...) HARNESS_MAKE(half4, __VA_ARGS__)
#define bfloat2(...) HARNESS_MAKE(bfloat2, __VA_ARGS__)
#define bfloat4(...) HARNESS_MAKE(bfloat4, __VA_ARGS__)
#define float2(...) HARNESS_MAKE(float2, __VA_ARGS__)
#define float3(...) HARNESS_MAKE(float3, __VA_ARGS__)
#define float4(...) HARNESS_MAKE(float4, __VA_ARGS__)

#if defined(HARNESS_STRICT) && !defined(HARNESS_STRUCT_BFLOAT)
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread

#ifdef HARNESS_STRICT
// (device T*)x without Metal's rule broken: a C cast of C++ would change the address space as well.
template <class To>
struct harness_deref {
  template <class From>
  auto& operator->*(From from) const { return *reinterpret_cast<To>(from); }
};
template <class To>
struct harness_cast {
  harness_deref<To> operator*() const { return {}; }
  template <class From>
  To operator->*(From from) const { return reinterpret_cast<To>(from); }
};

constexpr unsigned long harness_bytes_0 = 0;
template <auto kernel>
void harness_instantiate() {
  (void)kernel;
}
#else
inline uint3 harness_three(const uint32_t* v) { return make_vec<uint3>(v[0], v[1], v[2]); }
#include "entry.h"
#endif
