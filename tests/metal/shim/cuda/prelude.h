// Stands before every CUDA text: what nvcc's and MLX's headers would have brought, for the runtime's threads. Inline
// assembly is beyond it: texts have plain C++ for it where __CUDA_ARCH__ is not defined.
#pragma once
#include "../runtime.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

using __half = _Float16;
using __nv_bfloat16 = __bf16;
#define HARNESS_CUDA_VECTORS(T, name)                          \
  typedef T name##2 __attribute__((ext_vector_type(2)));       \
  typedef T name##3 __attribute__((ext_vector_type(3)));       \
  typedef T name##4 __attribute__((ext_vector_type(4)));       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HARNESS_CUDA_VECTORS(int, int)
HARNESS_CUDA_VECTORS(unsigned, uint)
HARNESS_CUDA_VECTORS(float, float)
HARNESS_CUDA_VECTORS(unsigned short, ushort)
HARNESS_CUDA_VECTORS(unsigned char, uchar)
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

// --- who a thread is ---

struct harness_dim3 {
  unsigned x, y, z;
};
HARNESS_INLINE harness_dim3 harness_dim(const uint32_t* v) { return {v[0], v[1], v[2]}; }
#define threadIdx (harness_dim(harness::harness_ids->position_in_threadgroup))
#define blockIdx (harness_dim(harness::harness_ids->threadgroup_position))
#define blockDim (harness_dim(harness::harness_ids->threads_per_threadgroup))
#define gridDim (harness_dim(harness::harness_ids->threadgroups_per_grid))
constexpr int warpSize = 32;

// --- what threads do together ---

#define HARNESS_LINE int line = __builtin_LINE()
// Only whole warps: a smaller mask is a report, as divergent code is.
#define HARNESS_MASK(mask, name) \
  if ((mask) != 0xffffffffu) harness::harness_meet(name " with a mask of some lanes", line, mask);

HARNESS_INLINE void __syncthreads(HARNESS_LINE) { harness::harness_barrier("__syncthreads", line, true, true); }
HARNESS_INLINE void __syncwarp(unsigned mask = 0xffffffffu, HARNESS_LINE) {
  HARNESS_MASK(mask, "__syncwarp")
  harness::harness_barrier("__syncwarp", line, false, true);
}

// A lane outside of the warp gives the thread's own word; one that does not exist gives a NaN pattern.
#define HARNESS_SHFL(name, uniform, source)                                                                \
  template <class T>                                                                                       \
  HARNESS_INLINE T name(unsigned mask, T value, int which, int width = 32, HARNESS_LINE) {                 \
    HARNESS_MASK(mask, #name)                                                                              \
    const int me = int(harness::ids().lane), low = me & ~(width - 1), high = low + width, from = source;   \
    const harness::Slots& slots = harness::exchange(#name, line, uniform, value);                          \
    return from < low || from >= high ? value : harness::slot<T>(slots, unsigned(from));                   \
  }
HARNESS_SHFL(__shfl_sync, 0, low + (which & (width - 1)))
HARNESS_SHFL(__shfl_xor_sync, unsigned(which), me ^ which)
HARNESS_SHFL(__shfl_down_sync, unsigned(which), me + which)
HARNESS_SHFL(__shfl_up_sync, unsigned(which), me - which)
#undef HARNESS_SHFL

#define HARNESS_VOTE(name, T, result, expression)                                             \
  HARNESS_INLINE result name(unsigned mask, T value, HARNESS_LINE) {                          \
    HARNESS_MASK(mask, #name)                                                                 \
    return harness::reduce(#name, line, value, [](T a, T b) -> T { return T(expression); });  \
  }
HARNESS_VOTE(__any_sync, bool, bool, a || b)
HARNESS_VOTE(__all_sync, bool, bool, a&& b)
HARNESS_VOTE(__reduce_add_sync, unsigned, unsigned, a + b)
HARNESS_VOTE(__reduce_or_sync, unsigned, unsigned, a | b)
HARNESS_VOTE(__reduce_and_sync, unsigned, unsigned, a& b)
HARNESS_VOTE(__reduce_max_sync, unsigned, unsigned, a > b ? a : b)
HARNESS_VOTE(__reduce_min_sync, unsigned, unsigned, a < b ? a : b)
#undef HARNESS_VOTE
HARNESS_INLINE unsigned __ballot_sync(unsigned mask, bool value, HARNESS_LINE) {
  HARNESS_MASK(mask, "__ballot_sync")
  const unsigned bit = value ? 1u << harness::ids().lane : 0u;
  return harness::reduce("__ballot_sync", line, bit, [](unsigned a, unsigned b) { return a | b; });
}

#include "math.h"

namespace cooperative_groups {}
namespace mlx::core::cu {
template <class T>
struct harness_array10 {
  T elements[10];
  const T& operator[](size_t i) const { return elements[i]; }
};
using Shape = harness_array10<int32_t>;
using Strides = harness_array10<int64_t>;
}  // namespace mlx::core::cu

#include "../entry.h"
