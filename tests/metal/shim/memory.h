// Buffers of exact size, so that a read beside one is noticed: by AddressSanitizer to the byte, otherwise by a guard page.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime.h"

namespace harness {

enum : uint32_t { kInput, kOutput, kWritable };

struct Buffer {
  uint32_t role, element_size;
  uint64_t nbytes;
  char name[64];
  unsigned char* data;
};

inline size_t whole_pages(size_t nbytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (nbytes + page - 1) / page * page;
}

// Not memset: sanitizers watch that one.
__attribute__((no_builtin("memset"))) inline void fill(unsigned char* data, size_t nbytes, unsigned char value) {
  for (size_t i = 0; i < nbytes; i++) reinterpret_cast<volatile unsigned char*>(data)[i] = value;
}

// Not mmap(): ThreadSanitizer would count it as a write by the thread that happens to ask first.
inline unsigned char* map(size_t nbytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  const long got = syscall(SYS_mmap, nullptr, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (got == -1) {
    perror("harness: mmap");
    exit(1);
  }
  return reinterpret_cast<unsigned char*>(got);
}

// `nbytes` bytes at a multiple of 16. The memory behind them is out of bounds, in plain runs up to 15 bytes later.
inline unsigned char* exact(size_t nbytes) {
#if defined(HARNESS_ASAN)
  void* got = nullptr;
  if (posix_memalign(&got, 16, nbytes)) exit(1);
  return static_cast<unsigned char*>(got);
#elif defined(HARNESS_TSAN)
  return map(whole_pages(nbytes + 1));
#else
  const size_t page = whole_pages(1), body = whole_pages(nbytes + 1);
  unsigned char* base = map(body + 2 * page);
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + body, page, PROT_NONE);
  return base + page + ((body - nbytes) & ~size_t(15));
#endif
}

inline void read_only(unsigned char* data, size_t nbytes) {
#if !defined(HARNESS_ASAN) && !defined(HARNESS_TSAN)
  const uintptr_t page = whole_pages(1), start = uintptr_t(data) / page * page;
  mprotect(reinterpret_cast<void*>(start), whole_pages(uintptr_t(data) + nbytes - start), PROT_READ);
#else
  (void)data, (void)nbytes;
#endif
}

}  // namespace harness
