// Runs one dispatch: reads it from stdin, executes threadgroup after threadgroup with every thread a fiber, and writes
// the outputs to stdout. What goes wrong is said on stderr, with an exit status of its own.
#include <signal.h>
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

void set_ids(Ids& ids, unsigned index, const unsigned* group, const uint32_t* size, const uint32_t* groups) {
  const unsigned local[3] = {index % size[0], index / size[0] % size[1], index / size[0] / size[1]};
  unsigned full = 1, here = 1;
  for (int d = 0; d < 3; d++) {
    ids.position_in_threadgroup[d] = local[d];
    ids.threadgroup_position[d] = group[d];
    ids.position_in_grid[d] = group[d] * dispatch.threadgroup[d] + local[d];
    ids.threads_per_threadgroup[d] = size[d];
    ids.dispatch_threads_per_threadgroup[d] = dispatch.threadgroup[d];
    ids.threads_per_grid[d] = dispatch.grid[d];
    ids.threadgroups_per_grid[d] = groups[d];
    here *= size[d], full *= dispatch.threadgroup[d];
  }
  ids.index_in_threadgroup = index;
  ids.lane = index % kLanes, ids.simdgroup = index / kLanes;
  ids.simdgroups = (here + kLanes - 1) / kLanes, ids.dispatch_simdgroups = (full + kLanes - 1) / kLanes;
}

void run_threadgroup(const unsigned* group, const uint32_t* groups) {
  uint32_t size[3], n = 1;
  for (int d = 0; d < 3; d++) {
    const uint32_t left = dispatch.grid[d] - group[d] * dispatch.threadgroup[d];
    size[d] = left < dispatch.threadgroup[d] && !dispatch.whole_blocks ? left : dispatch.threadgroup[d];
    n *= size[d];
  }
  for (auto& s : shared_arrays) s.live = false;
  everyone.first = everyone.arrived = 0, everyone.members = n;
  for (unsigned s = 0; s * kLanes < n; s++) {
    simds[s].first = s * kLanes, simds[s].arrived = 0;
    simds[s].members = n - s * kLanes < kLanes ? n - s * kLanes : kLanes;
    simds[s].slots[0].lanes = simds[s].slots[1].lanes = simds[s].members;
  }
  for (unsigned i = 0; i < n; i++) {
    set_ids(fibers[i].ids, i, group, size, groups);
    fibers[i].sp = fresh_stack(fibers[i].stack + kStack, thread_main);
#ifdef HARNESS_TSAN
    fibers[i].tsan = __tsan_create_fiber(0);
#endif
  }
  wake(0, n);
  const unsigned first = ready[ready_head];
  ready_head = (ready_head + 1) % (2 * kMaxThreads), ready_size--;
  switch_to(&main_sp, &fibers[first]);
  for (unsigned i = 0; i < n; i++) {
    if (fibers[i].state != State::done) report("some threads wait for others that never come");
#ifdef HARNESS_TSAN
    __tsan_destroy_fiber(fibers[i].tsan);
#endif
  }
#ifdef HARNESS_TSAN
  __tsan_acquire(&everyone);
#endif
}

// Which buffer lies nearest to an address that must not be touched.
void explain(const unsigned char* where) {
  for (unsigned i = 0; i < dispatch.n_buffers; i++) {
    const Buffer& b = buffers[i];
    const long off = where - b.data, slack = long(whole_pages(1));
    if (off < -slack || off >= long(b.nbytes) + slack) continue;
    fprintf(stderr, "harness: %s '%s' of %lu elements touched at element %ld%s\n", b.role == kOutput ? "output" : "input", b.name,
            (unsigned long)(b.nbytes / b.element_size), (off < 0 ? off - long(b.element_size) + 1 : off) / long(b.element_size),
            off >= 0 && off < long(b.nbytes) ? " (an input may only be read)" : "");
  }
  for (const auto& s : shared_arrays) {
    if (s.data && where >= s.data - 4096 && where < s.data + s.size + 4096)
      fprintf(stderr, "harness: threadgroup array of %zu bytes touched at byte %ld\n", s.size, long(where - s.data));
  }
  if (me)
    fprintf(stderr, "harness: by thread %u of threadgroup (%u, %u, %u)\n", me->ids.index_in_threadgroup,
            me->ids.threadgroup_position[0], me->ids.threadgroup_position[1], me->ids.threadgroup_position[2]);
}

void on_fault(int number, siginfo_t* info, void*) {
  fprintf(stderr, "harness: signal %d (%s) at %p\n", number, strsignal(number), info->si_addr);
  explain(static_cast<const unsigned char*>(info->si_addr));
  _exit(kFault);
}

void read_all(void* to, size_t nbytes) {
  for (auto* at = static_cast<char*>(to); nbytes > 0;) {
    const ssize_t got = read(0, at, nbytes);
    if (got <= 0) {
      fprintf(stderr, "harness: the dispatch on stdin is cut short\n");
      exit(1);
    }
    at += got, nbytes -= size_t(got);
  }
}

void set_up() {
  read_all(&dispatch, sizeof dispatch);
  if (dispatch.magic != 0x4d54u || dispatch.n_buffers > 64) exit(1);
  random_state = dispatch.seed;
  for (unsigned i = 0; i < dispatch.n_buffers; i++) read_all(&buffers[i], sizeof(Buffer) - sizeof(void*));
  for (unsigned i = 0; i < dispatch.n_buffers; i++) {
    Buffer& b = buffers[i];
    b.data = exact(b.nbytes);
    arguments[i] = b.data;
    if (b.role == kOutput) {
      fill(b.data, b.nbytes, uint8_t(dispatch.fill));
    } else {
      read_all(b.data, b.nbytes);
      if (b.role == kInput) read_only(b.data, b.nbytes);
    }
  }
  char* stacks = reinterpret_cast<char*>(map(kMaxThreads * (kStack + 4096)));
  for (unsigned i = 0; i < kMaxThreads; i++) fibers[i].stack = stacks + i * (kStack + 4096) + 4096;
#if !defined(HARNESS_ASAN) && !defined(HARNESS_TSAN)
  static char signal_stack[64 << 10];
  stack_t alternative = {};
  alternative.ss_sp = signal_stack, alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
  for (int number : numbers) sigaction(number, &action, nullptr);
#endif
#ifdef HARNESS_TSAN
  main_tsan = __tsan_get_current_fiber();
#endif
}

}  // namespace harness

using namespace harness;

extern "C" {
const Ids* harness_ids;

// Older compiler libraries lack it.
__attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bits = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_bit_cast(__bf16, uint16_t(bits >> 16));
}

Slots* harness_open_slots() {
  Meeting& m = simds[me->ids.simdgroup];
  return &m.slots[m.generation & 1];
}

const Slots* harness_meet(const char* what, int line, unsigned uniform) {
  Meeting& m = simds[me->ids.simdgroup];
  return &m.slots[meet_at(m, what, __builtin_return_address(0), line, uniform, false) & 1];
}

void harness_barrier(const char* what, int line, bool whole_group, bool memory) {
  meet_at(whole_group ? everyone : simds[me->ids.simdgroup], what, __builtin_return_address(0), line, 0, memory);
}

void* harness_shared(unsigned tag, size_t size, size_t align) {
  Shared& s = shared_arrays[tag < kMaxShared && align <= 16 ? tag : (__builtin_trap(), 0)];
  if (s.live) return s.data;
#ifdef HARNESS_ASAN
  free(s.data);
  s.data = exact(size);
#else
  if (!s.data) s.data = exact(size);
#endif
  s.size = size, s.live = true;
  size_t total = 0;
  for (const auto& other : shared_arrays) total += other.live ? other.size : 0;
  if (total > dispatch.max_shared) {
    fprintf(stderr, "harness: %zu bytes of threadgroup memory, more than %u\n", total, dispatch.max_shared);
    _exit(kTooMuch);
  }
  fill(s.data, size, uint8_t(dispatch.fill));
  return s.data;
}

#ifdef HARNESS_ASAN
void __asan_on_error() { explain(static_cast<const unsigned char*>(__asan_get_report_address())); }
#endif
}

// A name of its own as well: where this is a library, its host calls it.
extern "C" int harness_main() {
  set_up();
  uint32_t groups[3], total = 1;
  for (int d = 0; d < 3; d++) {
    groups[d] = (dispatch.grid[d] + dispatch.threadgroup[d] - 1) / dispatch.threadgroup[d];
    total *= groups[d];
  }
  auto* order = static_cast<unsigned*>(malloc(sizeof(unsigned) * (total + 1)));
  in_order(total, order);
  for (unsigned i = 0; i < total; i++) {
    const unsigned group[3] = {order[i] % groups[0], order[i] / groups[0] % groups[1], order[i] / groups[0] / groups[1]};
    run_threadgroup(group, groups);
  }
  for (unsigned i = 0; i < dispatch.n_buffers; i++) {
    for (size_t at = 0; buffers[i].role == kOutput && at < buffers[i].nbytes;) {
      // Not write(): ThreadSanitizer would see it read what threads have written.
      const long put = syscall(SYS_write, 1, buffers[i].data + at, buffers[i].nbytes - at);
      if (put <= 0) return 1;
      at += size_t(put);
    }
  }
  return 0;
}

int main() { return harness_main(); }
