// Constants and sizes that every kernel and both preludes know.

// The spacing of 8-bit codes, whose levels are equally spaced: (code - 127.5) * BYTE_STEP.
#define BYTE_STEP 0.03125f

// 32-bit words that hold so many bits.
#define STREAM_WORDS(BITS) (((BITS) + 31) / 32)

// Where a simdgroup leaves its part of a tile's output: rows of OUT_STRIDE, so that the lanes of a fragment hit different
// banks, for as many simdgroups at once (the preludes' OUT_AT_ONCE) as fast memory has room for.
#define OUT_STRIDE(DV) ((DV) + 4)

constexpr int larger(int x, int y) { return x > y ? x : y; }

// 1 / sqrt(n) for a power of two.
constexpr float inverse_root(int n) {
  return n >= 4 ? 0.5f * inverse_root(n / 4) : n == 2 ? 0.70710678118654752f : 1.0f;
}
