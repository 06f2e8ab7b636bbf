// GPU threads as fibers: their states, the order in which they run, and the meetings where they wait for each other.
#pragma once
#include <string.h>

#include "fiber.h"
#include "memory.h"

extern "C" void harness_entry(void* const* buffers);  // the kernel, called once in every thread
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;  // the linker's: where the file is in memory

extern "C" {
#ifdef HARNESS_ASAN
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
void* __asan_get_report_address();
#endif
#ifdef HARNESS_TSAN
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* sync);
void __tsan_release(void* sync);
#endif
}

namespace harness {

enum : int { kDiverged = 70, kFault = 71, kTooMuch = 72 };
enum class State { ready, waiting, done };

struct Fiber {
  void* sp;
  char* stack;
  Ids ids;
  State state;
  const char* what;  // where it waits
  const void* place;
  int line;
  unsigned uniform;
  void* tsan;
};

// Threads that wait for each other: the lanes of a simdgroup, or a whole threadgroup.
struct Meeting {
  unsigned first, members, arrived, generation;
  Slots slots[2];
  char sync[2][16];  // ThreadSanitizer's names of the two last meetings
};

struct Dispatch {
  uint32_t magic, order, seed, fill, whole_blocks, max_shared;
  uint32_t grid[3], threadgroup[3];
  uint32_t n_buffers;
};

struct Shared {
  unsigned char* data;
  size_t size;
  bool live;
};

constexpr size_t kStack = 256 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxShared = 256;
Dispatch dispatch;
Buffer buffers[64];
void* arguments[64];
Fiber fibers[kMaxThreads];
Fiber* me;
Meeting everyone, simds[kMaxThreads / kLanes];
Shared shared_arrays[kMaxShared];
unsigned ready[2 * kMaxThreads], ready_head, ready_size;  // a ring
void* main_sp;
void* main_tsan;
uint64_t random_state;

unsigned random_below(unsigned n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return unsigned((random_state >> 33) % n);
}

// 0, 1, ... n - 1 in the order that this run goes by.
void in_order(unsigned n, unsigned* out) {
  for (unsigned i = 0; i < n; i++) out[i] = dispatch.order == 1 ? n - 1 - i : i;
  for (unsigned i = n; dispatch.order == 2 && i > 1; i--) {
    const unsigned j = random_below(i), keep = out[i - 1];
    out[i - 1] = out[j], out[j] = keep;
  }
}

// Threads that have met go on before all others, so that a simdgroup that does not have to wait runs far ahead; in
// random order only half of the time.
void wake(unsigned first, unsigned n) {
  static unsigned order[kMaxThreads];
  in_order(n, order);
  const bool ahead = dispatch.order != 2 || random_below(2) == 0;
  for (unsigned i = 0; i < n; i++) {
    const unsigned thread = first + order[ahead ? n - 1 - i : i];
    fibers[thread].state = State::ready;
    if (ahead) ready_head = (ready_head + 2 * kMaxThreads - 1) % (2 * kMaxThreads);
    ready[(ready_head + (ahead ? 0 : ready_size)) % (2 * kMaxThreads)] = thread;
    ready_size++;
  }
}

void switch_to(void** from, Fiber* next) {
  me = next;
  if (next) harness_ids = &next->ids;
#ifdef HARNESS_ASAN
  static const void* main_bottom;
  static size_t main_size;
  void* fake = nullptr;
  if (!main_bottom) {  // the main stack's place is learnt by a switch to the same stack
    __sanitizer_start_switch_fiber(&fake, __builtin_frame_address(0), 1);
    __sanitizer_finish_switch_fiber(fake, &main_bottom, &main_size);
    __sanitizer_start_switch_fiber(&fake, main_bottom, main_size);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  __sanitizer_start_switch_fiber(&fake, next ? next->stack : main_bottom, next ? kStack : main_size);
#endif
#ifdef HARNESS_TSAN
  __tsan_switch_to_fiber(next ? next->tsan : main_tsan, 1);  // 1: the switch itself orders nothing
#endif
  harness_switch(from, next ? next->sp : main_sp);
#ifdef HARNESS_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Goes on with another thread; returns when this one is woken.
void give_way(Fiber* self) {
  void* unused;
  void** from = self ? &self->sp : &unused;
  if (ready_size == 0) {
    switch_to(from, nullptr);  // nobody can go on: the main loop sees whether all are done
    return;
  }
  const unsigned next = ready[ready_head];
  ready_head = (ready_head + 1) % (2 * kMaxThreads), ready_size--;
  if (&fibers[next] != self) switch_to(from, &fibers[next]);
}

void thread_main() {
#ifdef HARNESS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  harness_entry(arguments);
#ifdef HARNESS_TSAN
  __tsan_release(&everyone);  // one threadgroup after another: they share stacks and threadgroup memory
#endif
  me->state = State::done;
  give_way(me);
  __builtin_trap();
}

// A place in the code as debuggers count it.
unsigned long offset_of(const void* place) { return (unsigned long)(static_cast<const char*>(place) - &__ehdr_start) - 1; }

// Where the threads of the threadgroup are, equal ones in one line.
[[noreturn]] void report(const char* problem) {
  fprintf(stderr, "harness: %s\n", problem);
  const unsigned n = everyone.members;
  for (unsigned i = 0; i < n; i++) {
    const Fiber& f = fibers[i];
    unsigned last = i;
    while (last + 1 < n) {
      const Fiber& g = fibers[last + 1];
      if (g.state != f.state || g.ids.simdgroup != f.ids.simdgroup ||
          (f.state == State::waiting && (g.what != f.what || g.place != f.place || g.uniform != f.uniform)))
        break;
      last++;
    }
    fprintf(stderr, "  threadgroup (%u, %u, %u) simdgroup %u threads %u-%u: ", f.ids.threadgroup_position[0],
            f.ids.threadgroup_position[1], f.ids.threadgroup_position[2], f.ids.simdgroup, i, last);
    if (f.state == State::waiting) {
      fprintf(stderr, "in %s at line %d <%lx>", f.what, f.line, offset_of(f.place));
      if (f.uniform) fprintf(stderr, " (with %u)", f.uniform);
    } else {
      fprintf(stderr, f.state == State::done ? "at their end" : "on their way");
    }
    fprintf(stderr, "\n");
    i = last;
  }
  _exit(kDiverged);
}

// Waits for all members of `m`; returns the generation that met.
unsigned meet_at(Meeting& m, const char* what, const void* place, int line, unsigned uniform, bool memory) {
  Fiber* self = me;
  self->what = what, self->place = place, self->line = line, self->uniform = uniform, self->state = State::waiting;
  const unsigned generation = m.generation;
#ifdef HARNESS_TSAN
  if (memory) __tsan_release(m.sync[generation & 1]);
#endif
  if (++m.arrived == m.members) {
    for (unsigned i = m.first; i < m.first + m.members; i++) {
      const Fiber& f = fibers[i];
      if (f.state != State::waiting || f.what != what || f.place != place || f.uniform != uniform)
        report("threads meet at different operations (a barrier or simd operation in divergent code)");
    }
    m.arrived = 0;
    m.generation++;
    wake(m.first, m.members);
  }
  give_way(self);
#ifdef HARNESS_TSAN
  if (memory) __tsan_acquire(m.sync[generation & 1]);
#else
  (void)memory;
#endif
  return generation;
}

}  // namespace harness
