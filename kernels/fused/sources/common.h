// Functions for all kernels in both languages. The prelude comes first.

// A lane of a simdgroup is (g, c) = (lane / 4, lane % 4). Each c reads one quarter of a stream of codes. The quarter starts
// at bit c * BITS of the stream. Its words are shifted so that they start there.

template <int BITS>
kernel_fn void load_quarter(const device uint* stream, int c, thread uint* words) {
  constexpr int n = STREAM_WORDS(BITS);
  if constexpr (BITS % 128 == 0) {
    PRAGMA_UNROLL
    for (int i = 0; i < n; i += 4) load_words4(stream + c * n + i, words + i);
  } else if constexpr (BITS % 64 == 0) {
    PRAGMA_UNROLL
    for (int i = 0; i < n; i += 2) load_words2(stream + c * n + i, words + i);
  } else if constexpr (BITS % 32 == 0) {
    PRAGMA_UNROLL
    for (int i = 0; i < n; i++) words[i] = load_word(stream + c * n + i);
  } else {
    const uint first = uint(c * BITS), shift = first & 31u;
    const uint last = (first + BITS - 1u) >> 5;
    uint low = load_word(stream + (first >> 5));
    PRAGMA_UNROLL
    for (int i = 0; i < n; i++) {
      const uint next = min((first >> 5) + uint(i) + 1u, last);
      const uint high = load_word(stream + next);
      words[i] = shift == 0u ? low : (low >> shift) | (high << (32u - shift));
      low = high;
    }
  }
}

// One simdgroup mixes `row` [D] in threadgroup memory: Walsh-Hadamard on blocks of the largest power of two that divides D,
// then a Householder reflection across the blocks (kernels/codec/rotation.py). Symmetric and orthogonal. If blocks are
// multiples of 32, a lane holds the elements lane, lane + 32, ... in registers.
template <int D>
kernel_fn void mix(TG(float) row, uint lane) {
  constexpr int block = D & -D, n_blocks = D / block;
  constexpr float norm = inverse_root(block);
  if constexpr (block % 32 == 0) {
    constexpr int n = D / 32, per_block = block / 32;
    float x[n];
    PRAGMA_UNROLL
    for (int i = 0; i < n; i++) x[i] = row[int(lane) + 32 * i];
    PRAGMA_UNROLL
    for (int h = 1; h < 32; h <<= 1) {
      const float sign = (lane & uint(h)) ? -1.0f : 1.0f;
      PRAGMA_UNROLL
      for (int i = 0; i < n; i++) x[i] = shuffle_xor(x[i], h) + sign * x[i];
    }
    PRAGMA_UNROLL
    for (int h = 1; h < per_block; h <<= 1) {
      PRAGMA_UNROLL
      for (int i = 0; i < n; i++) {
        if ((i & h) == 0) {
          const float a = x[i], b = x[i + h];
          x[i] = a + b, x[i + h] = a - b;
        }
      }
    }
    PRAGMA_UNROLL
    for (int i = 0; i < per_block; i++) {
      float sum = 0.0f;
      PRAGMA_UNROLL
      for (int j = 0; j < n_blocks; j++) sum += x[j * per_block + i];
      const float twice_mean = n_blocks > 1 ? 2.0f / float(n_blocks) * sum : 0.0f;
      PRAGMA_UNROLL
      for (int j = 0; j < n_blocks; j++)
        row[int(lane) + 32 * (j * per_block + i)] = (x[j * per_block + i] - twice_mean) * norm;
    }
  } else {
    for (int h = 1; h < block; h <<= 1) {
      for (int i = int(lane); i < D / 2; i += 32) {
        const int a = (i / h) * 2 * h + i % h;
        const float x = row[a], y = row[a + h];
        row[a] = x + y, row[a + h] = x - y;
      }
      barrier_simd();
    }
    for (int i = int(lane); i < block; i += 32) {
      float sum = 0.0f;
      for (int j = 0; j < n_blocks; j++) sum += row[j * block + i];
      const float twice_mean = n_blocks > 1 ? 2.0f / float(n_blocks) * sum : 0.0f;
      for (int j = 0; j < n_blocks; j++) row[j * block + i] = (row[j * block + i] - twice_mean) * norm;
    }
  }
  barrier_simd();
}

// --- a page's codes and scales, held by lanes as attend_1_setup.metal says ---

template <int DK, int KP>
kernel_fn void load_keys(thread uint (&keys)[8][STREAM_WORDS(DK / 8 * KP)], const device uint* page, int g, int c) {
  constexpr int stride = (DK * KP / 2 + 31) / 32;
  PRAGMA_UNROLL
  for (int k = 0; k < 8; k++) load_quarter<DK / 8 * KP>(page + (16 * (g >> 1) + 2 * k + (g & 1)) * stride, c, keys[k]);
}

template <int DV, int VP>
kernel_fn void load_values(thread uint (&values)[DV / 8][STREAM_WORDS(8 * VP)], const device uint* page, int g, int c) {
  PRAGMA_UNROLL
  for (int i = 0; i < DV / 8; i++) load_quarter<8 * VP>(page + (8 * i + g) * VP, c, values[i]);
}

kernel_fn void load_scales(thread float (&scales)[8], const device half* page, int g) {
  const device uint* pairs = (const device uint*)page + 8 * (g >> 1);
  uint words[8];
  load_words4(pairs, words);
  load_words4(pairs + 4, words + 4);
  PRAGMA_UNROLL
  for (int k = 0; k < 8; k++) scales[k] = half_bits((g & 1) ? words[k] >> 16 : words[k] & 0xffffu);
}

kernel_fn int clamp_int(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// The pages of one split, from `begin` up to `end`. The last splits also have one block of raw tokens each. A block takes as
// long as RAW_PAGES pages (measured on one H100).
struct Share {
  int begin, end;
};
template <int RAW_BLOCKS>
kernel_fn Share share_of(int n_pages, int n_splits, int split) {
  constexpr int RAW_PAGES = 16;
  const int n_raw = min(RAW_BLOCKS, n_splits), n_plain = n_splits - n_raw;
  int plain = (n_pages + n_raw * RAW_PAGES + n_splits - 1) / n_splits, raw = plain - RAW_PAGES;
  if (n_plain == 0) {
    raw = (n_pages + n_raw - 1) / n_raw;
  } else if (raw < 0) {
    raw = 0, plain = (n_pages + n_plain - 1) / n_plain;
  }
  const int begin = split < n_plain ? split * plain : n_plain * plain + (split - n_plain) * raw;
  return {min(n_pages, begin), min(n_pages, begin + (split < n_plain ? plain : raw))};
}

// Highest logit of a query in the simdgroups' `stats` [WARPS, 8].
template <int WARPS>
kernel_fn float highest_of(TG(const float) stats, int r) {
  float highest = stats[r];
  for (int w = 1; w < WARPS; w++) highest = max(highest, stats[w * 8 + r]);
  return highest;
}

// Write the sum of the parts in `out` [AT_ONCE, 8, OUT_STRIDE] to memory. For each query, also write the highest logit and the
// sum of weights relative to it, from the simdgroups' `stats`: highest [WARPS, 8], sums [WARPS, 8].
template <int DV, int WARPS, int AT_ONCE>
kernel_fn void write_part(
    TG(const float) out, TG(const float) stats, device float* parts, int part, int n_parts, int n_rows,
    uint thread_index) {
  PRAGMA_UNROLL
  for (int i = 0; i < 8 * DV; i += 32 * WARPS) {
    const int r = (i + int(thread_index)) / DV, d = (i + int(thread_index)) % DV;
    if (r < n_rows) {
      float sum = 0.0f;
      PRAGMA_UNROLL
      for (int w = 0; w < AT_ONCE; w++) sum += out[(w * 8 + r) * OUT_STRIDE(DV) + d];
      parts[size_t(r * n_parts + part) * PART_STRIDE(DV) + d] = sum;
    }
  }
  const int r = int(thread_index);
  if (r < n_rows) {
    const float highest = highest_of<WARPS>(stats, r);
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += stats[(WARPS + w) * 8 + r] * exp2_fast(stats[w * 8 + r] - highest);
    device float* at = parts + size_t(r * n_parts + part) * PART_STRIDE(DV) + DV;
    at[0] = highest, at[1] = total, at[2] = at[3] = 0.0f;
  }
}

// Copy a block of n raw tokens to `to` and store the step's N tokens in it. The first of them is the block's token `at`, which
// may be outside of 0 .. n - 1. The copy uses units of 16 bytes. AT_ONCE loads are in flight, because a page's codes leave
// registers for no more.
template <int D, int N, int THREADS, typename T>
struct BlockUnits {
  static constexpr int UNITS = D * int(sizeof(T)) / 16, AT_ONCE = 4;
  static constexpr int TURNS = (64 * UNITS + AT_ONCE * THREADS - 1) / (AT_ONCE * THREADS);
  uint4 held[AT_ONCE];

  void load(const device T* from, const device T* own, int at, int n, int turn, uint thread_index) thread {
    PRAGMA_UNROLL
    for (int k = 0; k < AT_ONCE; k++) {
      const int i = (AT_ONCE * turn + k) * THREADS + int(thread_index), j = i - at * UNITS;
      const bool is_own = j >= 0 && j < N * UNITS;
      if (i < n * UNITS) held[k] = is_own ? ((const device uint4*)own)[j] : ((const device uint4*)from)[i];
    }
  }
  void store(device T* to, int n, int turn, uint thread_index) thread {
    PRAGMA_UNROLL
    for (int k = 0; k < AT_ONCE; k++) {
      const int i = (AT_ONCE * turn + k) * THREADS + int(thread_index);
      if (i < n * UNITS) ((device uint4*)to)[i] = held[k];
    }
  }
};

// One simdgroup adds the parts of one query row: `parts` [n_parts, PART_STRIDE] from write_part. The first RAW_BLOCKS parts are
// in the model's basis. The others are in the rotated basis; their sum is rotated back once.
// `sink` is a logit without a value, in units of log2 e. `scratch`: n_parts + DV floats.
template <typename T, int DV, int RAW_BLOCKS, int MAX_PARTS>
kernel_fn void merge_row(
    const device float* parts, int n_parts, float sink, const device float* signs, TG(float) scratch,
    device T* out, uint lane) {
  // A lane has 4 dims of each 128. Nothing else runs at this point, so many loads are in flight.
  constexpr int stride = PART_STRIDE(DV), chunks = (DV + 127) / 128, AT_ONCE = 16, PER_LANE = (MAX_PARTS + 31) / 32;
  TG(float) row = scratch;
  TG(float) factors = scratch + DV;
  float tops[PER_LANE], sums[PER_LANE];
  PRAGMA_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    const int s = int(lane) + 32 * i;
    tops[i] = s < n_parts ? load_fresh(parts + s * stride + DV) : -2e30f;
    sums[i] = s < n_parts ? load_fresh(parts + s * stride + DV + 1) : 0.0f;
  }
  float raw[chunks][RAW_BLOCKS > 0 ? RAW_BLOCKS : 1][4], next[AT_ONCE][4];
  PRAGMA_UNROLL
  for (int i = 0; i < chunks; i++) {
    PRAGMA_UNROLL
    for (int s = 0; s < RAW_BLOCKS; s++)
      if (128 * i + 4 * int(lane) < DV) load4_fresh(parts + s * stride + 128 * i + 4 * int(lane), raw[i][s]);
  }
  barrier_simd(); // the previous row no longer uses the scratch
  float highest = sink, total = 0.0f;
  PRAGMA_UNROLL
  for (int i = 0; i < PER_LANE; i++) highest = max(highest, tops[i]);
  for (int mask = 1; mask < 32; mask <<= 1) highest = max(highest, shuffle_xor(highest, mask));
  PRAGMA_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    const float factor = exp2_fast(tops[i] - highest);
    total += sums[i] * factor;
    if (int(lane) + 32 * i < n_parts) factors[int(lane) + 32 * i] = factor;
  }
  for (int mask = 1; mask < 32; mask <<= 1) total += shuffle_xor(total, mask);
  total += exp2_fast(sink - highest);
  barrier_simd();
  PRAGMA_UNROLL
  for (int i = 0; i < chunks; i++) {
    const int d = 128 * i + 4 * int(lane);
    if (d < DV) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int first = RAW_BLOCKS; first < n_parts; first += AT_ONCE) {
        PRAGMA_UNROLL
        for (int k = 0; k < AT_ONCE; k++) load4_fresh(parts + min(first + k, n_parts - 1) * stride + d, next[k]);
        PRAGMA_UNROLL
        for (int k = 0; k < AT_ONCE; k++) {
          const float factor = first + k < n_parts ? factors[first + k] : 0.0f;
          PRAGMA_UNROLL
          for (int e = 0; e < 4; e++) sum[e] += factor * next[k][e];
        }
      }
      PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) row[d + e] = sum[e];
    }
  }
  barrier_simd();
  mix<DV>(row, lane);
  PRAGMA_UNROLL
  for (int i = 0; i < chunks; i++) {
    const int d = 128 * i + 4 * int(lane);
    if (d < DV) {
      float sum[4];
      PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) sum[e] = row[d + e] * signs[d + e];
      PRAGMA_UNROLL
      for (int s = 0; s < RAW_BLOCKS; s++) {
        PRAGMA_UNROLL
        for (int e = 0; e < 4; e++) sum[e] += factors[s] * raw[i][s][e];
      }
      PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) out[d + e] = T(sum[e] / total);
    }
  }
}

// --- one code of a stream, for encode and expand ---

template <int PB>
kernel_fn uint code_at(const device uint* stream, int index) {
  const int bit = index * PB, word = bit >> 5, shift = bit & 31;
  uint code = stream[word] >> shift;
  if (32 % PB != 0 && shift + PB > 32) code |= stream[word + 1] << (32 - shift);
  return PB == 32 ? code : code & ((1u << PB) - 1u);
}

// Element `e` (0 or 1) of a pair code, in units of the row's scale.
template <int PB>
kernel_fn float level_of(uint code, int e, const device half* table) {
  if (IS_GRID(PB))
    return (float(e == 0 ? code & uint(LAST_CODE(PB)) : code >> (PB / 2)) - 0.5f * LAST_CODE(PB)) * GRID_STEP(PB);
  return float(table[2 * code + e]);
}
