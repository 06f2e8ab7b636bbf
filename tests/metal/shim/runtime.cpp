// Runs one dispatch: reads it from stdin, executes threadgroup after threadgroup with every thread a fiber, and writes
// the outputs to stdout. What goes wrong is said on stderr, with an exit status of its own.
#include <signal.h>

#include "threads.h"

namespace harness {

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
