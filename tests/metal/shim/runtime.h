// What a kernel on the CPU knows of the machine that runs it: who it is, where threads meet, threadgroup memory.
// runtime.cpp implements it and is compiled without sanitizers.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace harness {

constexpr unsigned kLanes = 32;
constexpr unsigned kSlotBytes = 64;

// The identity of one GPU thread.
struct Ids {
  uint32_t position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  uint32_t threads_per_threadgroup[3];  // of this threadgroup, which may be a smaller one at the grid's edge
  uint32_t dispatch_threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3];
  uint32_t index_in_threadgroup, lane, simdgroup, simdgroups, dispatch_simdgroups;
};

// What the lanes of a simdgroup hand to each other at one meeting.
struct Slots {
  alignas(64) unsigned char bytes[kLanes][kSlotBytes];
  unsigned lanes;  // how many the simdgroup has
};

extern "C" {
extern const Ids* harness_ids;
// Where this lane's word for the next meeting goes.
Slots* harness_open_slots();
// Waits until every lane of the simdgroup is at the same `what`, place and `uniform`; the answer stands until the next
// meeting. Anything else that the lanes do ends the run with a report. Convergent: as on a GPU, the compiler must not
// make two calls of one, because the place is the address that is returned to.
__attribute__((convergent)) const Slots* harness_meet(const char* what, int line, unsigned uniform);
__attribute__((convergent)) void harness_barrier(const char* what, int line, bool whole_group, bool memory);
void* harness_shared(unsigned tag, size_t size, size_t align);
}
// So that the place of a call is where the kernel's text has it, not in these wrappers.
#define HARNESS_INLINE inline __attribute__((always_inline))
HARNESS_INLINE const Ids& ids() { return *harness_ids; }

// The threadgroup array declared at `tag`: of its exact size, and poisoned before every threadgroup.
template <class Array>
inline Array& shared(unsigned tag) {
  return *static_cast<Array*>(harness_shared(tag, sizeof(Array), alignof(Array) < 16 ? 16 : alignof(Array)));
}

#if defined(HARNESS_ASAN) || defined(HARNESS_TSAN)
#define HARNESS_UNSEEN __attribute__((no_sanitize("address", "thread", "undefined"), noinline))
#else
#define HARNESS_UNSEEN
#endif

// One lane's word at a meeting. A lane that does not exist answers with a NaN pattern.
template <class T>
HARNESS_UNSEEN inline T slot(const Slots& slots, unsigned lane) {
  static_assert(sizeof(T) <= kSlotBytes, "more than a lane can hand over");
  T value;
  if (lane < slots.lanes) {
    __builtin_memcpy_inline(&value, slots.bytes[lane], sizeof(T));
  } else {
    __builtin_memset_inline(&value, 0xFF, sizeof(T));
  }
  return value;
}

template <class T>
HARNESS_UNSEEN inline void fill_slot(T value) {
  static_assert(sizeof(T) <= kSlotBytes, "more than a lane can hand over");
  __builtin_memcpy_inline(harness_open_slots()->bytes[harness_ids->lane], &value, sizeof(T));
}

// Hands `value` over and waits for the others.
template <class T>
HARNESS_INLINE const Slots& exchange(const char* what, int line, unsigned uniform, T value) {
  fill_slot(value);
  return *harness_meet(what, line, uniform);
}

// The same total in every lane, in the order of a butterfly of xor shuffles.
template <class T, class F>
__attribute__((noinline)) T join_slots(const Slots& slots, F join) {
  T all[kLanes];
  const unsigned lanes = slots.lanes;
  for (unsigned i = 0; i < lanes; i++) all[i] = slot<T>(slots, i);
  for (unsigned step = 1; step < kLanes; step *= 2) {
    for (unsigned i = 0; i + step < lanes; i += 2 * step) all[i] = join(all[i], all[i + step]);
  }
  return all[0];
}
template <class T, class F>
HARNESS_INLINE T reduce(const char* what, int line, T value, F join) {
  return join_slots<T>(exchange(what, line, 0, value), join);
}

}  // namespace harness
