// Metal's version of what the kernel bodies use beyond plain C++; prelude_cuda.h is CUDA's.

#define TG(X) threadgroup X*
#define kernel_fn static inline
#define PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define PRAGMA_UNROLL_8 _Pragma("clang loop unroll_count(8)")

// A tile's queries are stored twice, and everything must fit into 32 KB.
#define OUT_FITS(N, DK, DV) (32 * (N) * OUT_STRIDE(DV) + 64 * (DK) <= 32000)
#define OUT_AT_ONCE(DK, DV, WARPS) ((DV) <= 128 && OUT_FITS(WARPS, DK, DV) ? (WARPS) : OUT_FITS(2, DK, DV) ? 2 : 1)

kernel_fn void barrier_group() { threadgroup_barrier(mem_flags::mem_threadgroup); }
kernel_fn void barrier_simd() { simdgroup_barrier(mem_flags::mem_threadgroup); }
kernel_fn float shuffle_xor(float x, ushort mask) { return simd_shuffle_xor(x, mask); }
kernel_fn bool any_of(bool x) { return simd_any(x); }
kernel_fn float exp2_fast(float x) { return fast::exp2(x); }
kernel_fn float log2_fast(float x) { return fast::log2(x); }
kernel_fn float min_keeping_nan(float x, float y) { return x > y ? y : x; }
kernel_fn float half_bits(uint bits) { return float(as_type<half>(ushort(bits))); }

kernel_fn uint load_word(const device uint* p) { return *p; }
kernel_fn void load_words4(const device uint* p, thread uint* w) {
  const uint4 x = *(const device uint4*)p;
  w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
}
kernel_fn void load_words2(const device uint* p, thread uint* w) {
  const uint2 x = *(const device uint2*)p;
  w[0] = x.x, w[1] = x.y;
}

kernel_fn void hold_loads(uint) {}

// Four elements in one load.
template <typename T>
kernel_fn void load4(const device T* p, thread float* x) {
  const vec<T, 4> v = *(const device vec<T, 4>*)p;
  x[0] = float(v[0]), x[1] = float(v[1]), x[2] = float(v[2]), x[3] = float(v[3]);
}

kernel_fn float load_fresh(const device float* p) { return *p; }
kernel_fn void load4_fresh(const device float* p, thread float* x) { load4(p, x); }

// --- tables of pair codes ---

typedef half2 table_word;
#define TABLE_WORDS(PB) TABLE_PAIRS(PB)

template <int PB, int THREADS>
kernel_fn void fill_table(TG(table_word) table, const device half* levels, uint thread_index) {
  for (uint i = thread_index; i < uint(TABLE_PAIRS(PB)); i += THREADS)
    table[i] = half2(levels[2 * i], levels[2 * i + 1]);
}

// Pair `index` of a lane's aligned code stream; codes of a grid are in units of GRID_STEP. The index must be constant after
// loops are unrolled.
template <int PB>
kernel_fn float2 pair_at(const thread uint* words, int index, TG(const table_word) table) {
  const int word = index * PB / 32, at = index * PB % 32;
  uint code = words[word] >> at;
  if (32 % PB != 0 && at + PB > 32) code |= words[word + 1] << (32 - at);
  constexpr uint last = LAST_CODE(PB);
  if (IS_GRID(PB)) return float2(float(code & last), float((code >> (PB / 2)) & last)) - 0.5f * last;
  return float2(table[code & ((1u << PB) - 1u)]);
}

// --- the two steps over a page; attend_1_setup.metal says what each lane holds ---

// Queries as they are: [8 NT, DK].
typedef float query_word;
#define QUERY_WORDS(NT, DK) (8 * (NT) * (DK))

template <int DK>
kernel_fn void put_query(TG(query_word) words, int r, int d, float x) {
  words[r * DK + d] = x;
}

// s[n][j] += keys of tile j times queries of tile n.
template <int DK, int NT, int LIVE, int PB>
kernel_fn void score_page(
    thread float (&s)[NT][4][4], const thread uint (&words)[8][STREAM_WORDS(DK / 8 * PB)],
    TG(const query_word) queries, TG(const table_word) table, uint lane) {
  const uint c = lane & 3u;
  for (int n = 0; n < NT; n++) {
    float dots[8][LIVE];
    PRAGMA_UNROLL
    for (int k = 0; k < 8; k++)
      for (int r = 0; r < LIVE; r++) dots[k][r] = 0.0f;
    PRAGMA_UNROLL
    for (int i = 0; i < DK / 8; i++) {
      float2 x[LIVE];
      PRAGMA_UNROLL
      for (int r = 0; r < LIVE; r++) {
        TG(const query_word) at = queries + (8 * n + r) * DK + int(c) * (DK / 4) + 2 * i;
        x[r] = float2(at[0], at[1]);
      }
      PRAGMA_UNROLL
      for (int k = 0; k < 8; k++) {
        const float2 key = pair_at<PB>(words[k], i, table);
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) dots[k][r] += key.x * x[r].x + key.y * x[r].y;
      }
    }
    PRAGMA_UNROLL
    for (int k = 0; k < 8; k++) {
      PRAGMA_UNROLL
      for (int r = 0; r < LIVE; r++) {
        const float two = dots[k][r] + simd_shuffle_xor(dots[k][r], 1);
        const float all = two + simd_shuffle_xor(two, 2);
        if (uint(r >> 1) == c) s[n][k >> 1][2 * (k & 1) + (r & 1)] += all;
      }
    }
  }
}

// The output of a lane: dims g, 8 + g, 16 + g, ... for every query of each tile, over the tokens of quarter c only.
template <int DV, int NT, int LIVE>
struct Output {
  float o[NT][DV / 8][LIVE];

  void clear() thread {
    for (int n = 0; n < NT; n++)
      for (int i = 0; i < DV / 8; i++)
        for (int r = 0; r < LIVE; r++) o[n][i][r] = 0.0f;
  }
  // Multiplies by one factor for each of the two queries (2 c, 2 c + 1) of tile n, which the quad's lanes exchange.
  void scale(int n, float x, float y) thread {
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      const float factor = quad_shuffle((r & 1) ? y : x, ushort(r >> 1));
      for (int i = 0; i < DV / 8; i++) o[n][i][r] *= factor;
    }
  }
  // Adds the page's values, weighed by p (held as the scores are); `values` is the lane's part of the page's streams.
  template <int PB>
  void accumulate(
      const thread float (&p)[NT][4][4], const thread uint (&values)[DV / 8][STREAM_WORDS(8 * PB)],
      TG(const table_word) table, uint lane) thread {
    const uint c = lane & 3u;
    for (int n = 0; n < NT; n++) {
      PRAGMA_UNROLL
      for (int k = 0; k < 8; k++) { // lanes g = 2 c and 2 c + 1 hold tokens 16 c + 2 k and the next
        float weight[LIVE][2];
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++)
          for (uint e = 0; e < 2; e++)
            weight[r][e] = simd_shuffle(p[n][k >> 1][2 * (k & 1) + (r & 1)], ushort(4 * (2 * c + e) + uint(r >> 1)));
        PRAGMA_UNROLL
        for (int i = 0; i < DV / 8; i++) {
          const float2 value = pair_at<PB>(values[i], k, table);
          PRAGMA_UNROLL
          for (int r = 0; r < LIVE; r++) o[n][i][r] += weight[r][0] * value.x + weight[r][1] * value.y;
        }
      }
    }
  }
  // Puts (or adds, if `more`) the queries of tile n, times one factor for each of the lane's two, into out [8, OUT_STRIDE].
  void put(TG(float) out, int n, float x, float y, bool more, uint lane) thread {
    const int g = int(lane) >> 2, c = int(lane) & 3;
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      const float factor = quad_shuffle((r & 1) ? y : x, ushort(r >> 1));
      for (int i = 0; i < DV / 8; i++) {
        const float two = o[n][i][r] + simd_shuffle_xor(o[n][i][r], 1);
        const float all = two + simd_shuffle_xor(two, 2);
        TG(float) at = out + r * OUT_STRIDE(DV) + 8 * i + g;
        if (c == (r >> 1)) *at = (more ? *at : 0.0f) + all * factor;
      }
    }
  }
};
