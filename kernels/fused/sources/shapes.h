// Constants and sizes that every kernel and both preludes know.

// The spacing of 8-bit codes, whose levels are equally spaced: (code - 127.5) * BYTE_STEP.
#define BYTE_STEP 0.03125f

// 32-bit words that hold so many bits.
#define STREAM_WORDS(BITS) (((BITS) + 31) / 32)

// The input `constants`, in 32-bit words (uint, so that no copy takes them for numbers): 4 floats of which the first is
// the queries' scale times log2 e, the signs of the keys' and of the values' rotation, the tables of the keys' and of the
// values' pair codes (8-bit codes have none).
#define QUERY_SCALE ((const device float*)constants)[0]
#define KEY_SIGNS ((const device float*)constants + 4)
#define VALUE_SIGNS (KEY_SIGNS + DK)
#define KEY_TABLE ((const device half*)(VALUE_SIGNS + DV))
#define VALUE_TABLE ((const device half*)(VALUE_SIGNS + DV + ((KP) == 16 ? 0 : 1 << (KP))))

// A part of the output of one query and split: DV floats, then the highest logit and the sum of weights relative to it.
// In units of 16 bytes.
#define PART_STRIDE(DV) ((DV) + 4)

// Where a simdgroup leaves its part of a tile's output: rows of OUT_STRIDE, so that the lanes of a fragment hit different
// banks, for as many simdgroups at once (the preludes' OUT_AT_ONCE) as fast memory has room for.
#define OUT_STRIDE(DV) ((DV) + 4)

constexpr int larger(int x, int y) { return x > y ? x : y; }

// 1 / sqrt(n) for a power of two.
constexpr float inverse_root(int n) {
  return n >= 4 ? 0.5f * inverse_root(n / 4) : n == 2 ? 0.70710678118654752f : 1.0f;
}
