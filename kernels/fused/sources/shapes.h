// Constants and sizes for every kernel and both preludes.

// From 5 bits a coordinate on (a pair code of 10 bits), codes have no table. Their 2^bits levels are equally spaced, and their
// cells cover -4 to 4: level = (code - LAST_CODE / 2) * GRID_STEP.
#define IS_GRID(PB) ((PB) >= 10)
#define RANGE_END 4.0f
#define LAST_CODE(PB) ((1 << (PB) / 2) - 1)
#define GRID_STEP(PB) (2.0f * RANGE_END / float(1 << (PB) / 2))
// Number of pair codes in a table.
#define TABLE_PAIRS(PB) (IS_GRID(PB) ? 0 : 1 << (IS_GRID(PB) ? 0 : (PB)))

// Number of 32-bit words for this number of bits.
#define STREAM_WORDS(BITS) (((BITS) + 31) / 32)

// The input `constants`, as uint words, so that no copy treats them as numbers:
//   4 floats; the first is the queries' scale times log2 e
//   the signs of the keys' rotation, then those of the values'
//   the table of the keys' pair codes, then that of the values'
#define QUERY_SCALE ((const device float*)constants)[0]
#define KEY_SIGNS ((const device float*)constants + 4)
#define VALUE_SIGNS (KEY_SIGNS + DK)
#define KEY_TABLE ((const device half*)(VALUE_SIGNS + DV))
#define VALUE_TABLE ((const device half*)(VALUE_SIGNS + DV + TABLE_PAIRS(KP)))

// A part is the output of one query and split: DV floats, then the highest logit, then the sum of weights relative to it.
// Rounded up to 16 bytes.
#define PART_STRIDE(DV) ((DV) + 4)

// A simdgroup writes its part of a tile's output in rows of OUT_STRIDE, so that the lanes of a fragment use different banks.
// Fast memory holds the parts of OUT_AT_ONCE simdgroups (see the preludes) at a time.
#define OUT_STRIDE(DV) ((DV) + 4)

constexpr int larger(int x, int y) { return x > y ? x : y; }

// 1 / sqrt(n) for a power of two.
constexpr float inverse_root(int n) {
  return n >= 4 ? 0.5f * inverse_root(n / 4) : n == 2 ? 0.70710678118654752f : 1.0f;
}
