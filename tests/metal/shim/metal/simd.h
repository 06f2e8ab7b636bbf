// What the threads of a simdgroup and a threadgroup do together.
#pragma once
#include "../runtime.h"
#include "math.h"

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

HARNESS_INLINE void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  harness::harness_barrier("threadgroup_barrier", line, true, flags != mem_flags::mem_none);
}
HARNESS_INLINE void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  harness::harness_barrier("simdgroup_barrier", line, false, flags != mem_flags::mem_none);
}

#define HARNESS_REDUCE(name, expression)                                                      \
  template <class T>                                                                          \
  HARNESS_INLINE T name(T value, int line = __builtin_LINE()) {                                       \
    return harness::reduce(#name, line, value, [](T a, T b) -> T { return T(expression); });  \
  }
HARNESS_REDUCE(simd_sum, a + b)
HARNESS_REDUCE(simd_product, a* b)
HARNESS_REDUCE(simd_max, max(a, b))
HARNESS_REDUCE(simd_min, min(a, b))
HARNESS_REDUCE(simd_and, a& b)
HARNESS_REDUCE(simd_or, a | b)
HARNESS_REDUCE(simd_xor, a ^ b)
#undef HARNESS_REDUCE
HARNESS_INLINE bool simd_all(bool value, int line = __builtin_LINE()) {
  return harness::reduce("simd_all", line, value, [](bool a, bool b) { return a && b; });
}
HARNESS_INLINE bool simd_any(bool value, int line = __builtin_LINE()) {
  return harness::reduce("simd_any", line, value, [](bool a, bool b) { return a || b; });
}

// A lane that does not exist gives a NaN pattern: what it gives on a GPU is undefined.
#define HARNESS_SHUFFLE(name, uniform, source)                                      \
  template <class T>                                                                \
  HARNESS_INLINE T name(T value, ushort which, int line = __builtin_LINE()) {               \
    const uint me = harness::ids().lane;                                            \
    (void)me;                                                                       \
    return harness::slot<T>(harness::exchange(#name, line, uniform, value), source);  \
  }
HARNESS_SHUFFLE(simd_shuffle, 0, which)
HARNESS_SHUFFLE(simd_broadcast, which, which)
HARNESS_SHUFFLE(simd_shuffle_xor, which, me ^ which)
HARNESS_SHUFFLE(simd_shuffle_down, which, me + which)
HARNESS_SHUFFLE(simd_shuffle_up, which, me - which)
HARNESS_SHUFFLE(simd_shuffle_rotate_down, which, (me + which) % harness::kLanes)
HARNESS_SHUFFLE(simd_shuffle_rotate_up, which, (me - which) % harness::kLanes)
HARNESS_SHUFFLE(quad_broadcast, which, (me & ~3u) + which)
HARNESS_SHUFFLE(quad_shuffle, 0, (me & ~3u) + which)
HARNESS_SHUFFLE(quad_shuffle_xor, which, me ^ which)
#undef HARNESS_SHUFFLE
template <class T>
HARNESS_INLINE T simd_broadcast_first(T value, int line = __builtin_LINE()) {
  return harness::slot<T>(harness::exchange("simd_broadcast_first", line, 0, value), 0);
}
template <class T>
HARNESS_INLINE T quad_sum(T value, int line = __builtin_LINE()) {
  const harness::Slots& slots = harness::exchange("quad_sum", line, 0, value);
  const uint first = harness::ids().lane & ~3u;
  return T((harness::slot<T>(slots, first) + harness::slot<T>(slots, first + 1)) +
           (harness::slot<T>(slots, first + 2) + harness::slot<T>(slots, first + 3)));
}

template <class T>
HARNESS_INLINE T prefix_sum(const char* what, T value, bool inclusive, int line) {
  const harness::Slots& slots = harness::exchange(what, line, 0, value);
  T sum = T(0);
  for (uint i = 0; i < harness::ids().lane + inclusive; i++) sum = T(sum + harness::slot<T>(slots, i));
  return sum;
}
template <class T>
HARNESS_INLINE T simd_prefix_inclusive_sum(T value, int line = __builtin_LINE()) {
  return prefix_sum("simd_prefix_inclusive_sum", value, true, line);
}
template <class T>
HARNESS_INLINE T simd_prefix_exclusive_sum(T value, int line = __builtin_LINE()) {
  return prefix_sum("simd_prefix_exclusive_sum", value, false, line);
}

// Atomics: only one thread runs at a time, so plain operations are enough, but sanitizers must see them as atomic.
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;

template <class P>
inline auto atomic_load_explicit(P p, memory_order) {
  auto value = p->value;
  __atomic_load(&p->value, &value, __ATOMIC_RELAXED);
  return value;
}
template <class P, class V>
inline void atomic_store_explicit(P p, V given, memory_order) {
  decltype(p->value + 0) value = given;
  __atomic_store(&p->value, &value, __ATOMIC_RELAXED);
}
#define HARNESS_FETCH(name, expression)                                                                     \
  template <class P, class V>                                                                               \
  inline auto name(P p, V given, memory_order) {                                                            \
    auto a = p->value;                                                                                      \
    __atomic_load(&p->value, &a, __ATOMIC_RELAXED);                                                         \
    decltype(a) b = given, next = expression;                                                               \
    __atomic_store(&p->value, &next, __ATOMIC_RELAXED);                                                     \
    return a;                                                                                               \
  }
HARNESS_FETCH(atomic_fetch_add_explicit, a + b)
HARNESS_FETCH(atomic_fetch_sub_explicit, a - b)
HARNESS_FETCH(atomic_fetch_max_explicit, max(a, b))
HARNESS_FETCH(atomic_fetch_min_explicit, min(a, b))
HARNESS_FETCH(atomic_fetch_or_explicit, a | b)
HARNESS_FETCH(atomic_fetch_and_explicit, a& b)
HARNESS_FETCH(atomic_exchange_explicit, b)
#undef HARNESS_FETCH

}  // namespace metal
