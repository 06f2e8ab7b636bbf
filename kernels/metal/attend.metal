// Attention of the L query tokens of a decode step over one row's sink, pages and window; the parts of the splits go to
// merge.metal. Grid: x = splits, y = KV head times group of queries, z = row.
//
// The raw tokens (in the model's basis) are RAW_BLOCKS blocks of 64, one for each of the last splits; the pages (in the
// rotated basis) are shared out so that these splits have less of them. Parts are the raw blocks, then the splits' pages. A
// simdgroup takes a page by itself, so nothing waits in the main loop. Queries come in NT tiles of 8 rows, row r = repeat * L + token.
//
// In a page, lane (g, c) = (lane / 4, lane % 4) holds
//   keys     quarter c of the dims of tokens t(j, h) = 16 (g / 2) + 4 j + 2 h + g % 2, j < 4, h < 2
//   scores   s[n][j][2 h + e] of token t(j, h) and query 8 n + 2 c + e
//   values   tokens 16 c .. 16 c + 15 of dims g, 8 + g, 16 + g, ...
//
// Weights of page tokens carry the value's scale: with u = s + log2(scale) the largest u is the running maximum, so that
// weights fit float16 whatever the values' size; their sum is that of 2^(s - max u) and merges as usual.

constexpr int ROWS = 8 * NT, N_QUERIES = REPEATS * L, LIVE = N_QUERIES < 8 ? N_QUERIES : 8;
constexpr int KEY_WORDS = (DK * KP / 2 + 31) / 32, VALUE_WORDS = VP;
constexpr float LOWEST = -1e30f, HIDDEN = -2e30f; // HIDDEN is far below any maximum, so that it weighs 0

constexpr int RAW_BLOCKS = (KEEP + 63) / 64 + SLOTS / 64;
constexpr int TABLES = TABLE_WORDS(KP) + (KP == VP && !TWO_TABLES ? 0 : TABLE_WORDS(VP));
constexpr int AT_ONCE = OUT_AT_ONCE(DK, DV, WARPS), OUT_FLOATS = AT_ONCE * 8 * OUT_STRIDE(DV);
constexpr int MERGE_FLOATS = MAX_PARTS + DV;
constexpr int RAW_FLOATS = larger(WARPS * 16 * 8, OUT_FLOATS), TABLE_FLOATS = TABLES * int(sizeof(table_word)) / 4;

threadgroup float stats[2 * WARPS * 8];
threadgroup float4 raw_query_storage[ROWS * DK / 4];
threadgroup float4 query_storage[(QUERY_WORDS(NT, DK) + 3) / 4];
// One after the other: the weights of raw tokens or their output, the tables of pages, the output of a tile.
threadgroup float4 scratch_storage[(larger(larger(RAW_FLOATS, TABLE_FLOATS), WARPS * MERGE_FLOATS) + 3) / 4];
TG(float) q = (TG(float))raw_query_storage;
TG(query_word) page_queries = (TG(query_word))query_storage;
TG(float) scratch = (TG(float))scratch_storage;
TG(table_word) key_levels = (TG(table_word))scratch;
TG(table_word) value_levels = KP == VP && !TWO_TABLES ? key_levels : key_levels + TABLE_WORDS(KP);

const uint lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int g = int(lane) >> 2, c = int(lane) & 3;
const int split = int(threadgroup_position_in_grid.x), n_splits = int(threadgroups_per_grid.x);
const int group = int(threadgroup_position_in_grid.y) / KV_HEADS, head = int(threadgroup_position_in_grid.y) % KV_HEADS;
const int row = int(threadgroup_position_in_grid.z);
const int r0 = group * ROWS, n_rows = min(ROWS, N_QUERIES - r0);
const int first_query = (row * KV_HEADS + head) * N_QUERIES + r0;

const int offset = rows[4 * row], n_pages = rows[4 * row + 2];
const int page_start = KEEP + 64 * rows[4 * row + 1], window_start = page_start + 64 * n_pages;

const int n_parts = n_splits + RAW_BLOCKS;
#ifdef MERGED
// Counters first, one for each group of splits, in whole units of 16 bytes.
const int n_counters = int(threadgroups_per_grid.y) * int(threadgroups_per_grid.z);
const int counter = row * int(threadgroups_per_grid.y) + int(threadgroup_position_in_grid.y);
device float* parts = (device float*)workspace + (n_counters + 3) / 4 * 4;
#endif

// --- this split's first page, the tables and the signs are on their way while the queries are made ready ---

const Share share = share_of<RAW_BLOCKS>(n_pages, n_splits, split);
const int begin = share.begin, end = share.end;
uint keys[8][STREAM_WORDS(DK / 8 * KP)];
size_t page = 0;
if (begin + int(warp) < end) {
  page = size_t(table[row * table_shape[1] + begin + int(warp)]) * KV_HEADS + head;
  load_keys<DK, KP>(keys, key_words + page * 64 * KEY_WORDS, g, c);
}

const bool has_raw = n_splits - 1 - split < RAW_BLOCKS;
float sign[(DK + 31) / 32];
PRAGMA_UNROLL
for (int i = 0; i < (DK + 31) / 32; i++)
  sign[i] = begin < end && int(lane) + 32 * i < DK ? KEY_SIGNS[int(lane) + 32 * i] : 0.0f;
if (begin < end && !has_raw) {
  fill_table<KP, 32 * WARPS>(key_levels, KEY_TABLE, lane + 32 * warp);
  if (KP != VP || TWO_TABLES) fill_table<VP, 32 * WARPS>(value_levels, VALUE_TABLE, lane + 32 * warp);
}

// --- queries, in units of log2 e ---

PRAGMA_UNROLL
for (int i = 0; i < ROWS * DK; i += 128 * WARPS) {
  const int at = i + 4 * int(lane + 32 * warp);
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (at < n_rows * DK) load4(queries + size_t(first_query) * DK + at, x);
  if (at < ROWS * DK) {
    PRAGMA_UNROLL
    for (int e = 0; e < 4; e++) q[at + e] = x[e] * QUERY_SCALE;
  }
}
barrier_group();

// --- raw tokens: one block of 64 for each of the last splits, 16 tokens for each simdgroup ---

for (int block = n_splits - 1 - split; block < RAW_BLOCKS; block += n_splits) {
  const int n_sink = min(KEEP, offset + L), sink_blocks = (KEEP + 63) / 64;
  const bool in_sink = block < sink_blocks;
  const int start = in_sink ? 64 * block : window_start + 64 * (block - sink_blocks);
  const int count = clamp_int((in_sink ? n_sink : offset + L) - start, 0, 64);
  const int slot = in_sink ? start : KEEP + (start - KEEP) % SLOTS;
  const size_t base = size_t(row * KV_HEADS + head) * (KEEP + SLOTS) + slot + 16 * warp;
  const int mine = clamp_int(count - 16 * int(warp), 0, 16); // tokens of this simdgroup
  TG(float) w = scratch + warp * 16 * 8;
  for (int n = 0; n < NT; n++) {
    float dot[2][LIVE];
    PRAGMA_UNROLL
    for (int m = 0; m < 2; m++) {
      PRAGMA_UNROLL
      for (int r = 0; r < LIVE; r++) dot[m][r] = 0.0f;
    }
    PRAGMA_UNROLL
    for (int i = 0; i < DK / 16; i++) {
      const int at = 16 * i + 4 * c;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        float k[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (8 * m + g < mine) load4(raw_keys + (base + 8 * m + g) * DK + at, k);
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) {
          TG(const float) x = q + (8 * n + r) * DK + at;
          dot[m][r] += k[0] * x[0] + k[1] * x[1] + k[2] * x[2] + k[3] * x[3];
        }
      }
    }
    float top[LIVE], total[LIVE];
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      const int position = offset + (r0 + 8 * n + r) % L;
      top[r] = LOWEST;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        float s = dot[m][r] + shuffle_xor(dot[m][r], 1);
        s += shuffle_xor(s, 2);
        const int t = start + 16 * int(warp) + 8 * m + g;
        const bool seen = 8 * m + g < mine && t <= position && (in_sink || SPAN == 0 || t > position - SPAN);
        dot[m][r] = seen ? s : HIDDEN;
        top[r] = max(top[r], dot[m][r]);
      }
      for (int mask = 4; mask < 32; mask <<= 1) top[r] = max(top[r], shuffle_xor(top[r], mask));
      total[r] = 0.0f;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        dot[m][r] = exp2_fast(dot[m][r] - top[r]);
        total[r] += dot[m][r];
        if (c == (r & 3)) w[(8 * m + g) * 8 + r] = dot[m][r];
      }
      for (int mask = 4; mask < 32; mask <<= 1) total[r] += shuffle_xor(total[r], mask);
    }
    barrier_simd();
    float acc[(DV + 127) / 128][4][LIVE];
    PRAGMA_UNROLL
    for (int i = 0; i < (DV + 127) / 128; i++) {
      PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) {
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) acc[i][e][r] = 0.0f;
      }
      const int d = 4 * int(lane) + 128 * i;
      if (d < DV) {
        PRAGMA_UNROLL_8
        for (int t = 0; t < mine; t++) {
          float v[4];
          load4(raw_values + (base + t) * DV + d, v);
          PRAGMA_UNROLL
          for (int r = 0; r < LIVE; r++) {
            const float p = w[t * 8 + r];
            for (int e = 0; e < 4; e++) acc[i][e][r] += p * v[e];
          }
        }
      }
    }
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      if (int(lane) == r) stats[warp * 8 + r] = top[r], stats[(WARPS + warp) * 8 + r] = total[r];
    }
    barrier_group(); // the weights, which the output overwrites, are done with
    TG(float) tile_out = scratch;
    for (int turn = 0; turn < WARPS; turn += AT_ONCE) {
      const int place = int(warp) - turn;
      if (place >= 0 && place < AT_ONCE) {
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) {
          const float factor = exp2_fast(top[r] - highest_of<WARPS>(stats, r));
          PRAGMA_UNROLL
          for (int i = 0; i < (DV + 127) / 128; i++) {
            const int d = 4 * int(lane) + 128 * i;
            TG(float) at = tile_out + (place * 8 + r) * OUT_STRIDE(DV) + d;
            for (int e = 0; e < 4; e++)
              if (d < DV) at[e] = (turn > 0 ? at[e] : 0.0f) + acc[i][e][r] * factor;
          }
        }
      }
      barrier_group();
    }
    write_part<DV, WARPS, AT_ONCE>(
        tile_out, stats, parts + size_t(first_query + 8 * n) * n_parts * PART_STRIDE(DV), block, n_parts,
        min(8, n_rows - 8 * n), lane + 32 * warp);
    barrier_group();
  }
}

// --- pages ---

Output<DV, NT, LIVE> o;
o.clear();
float top[NT][2], total[NT][2];
PRAGMA_UNROLL
for (int n = 0; n < NT; n++) top[n][0] = top[n][1] = LOWEST, total[n][0] = total[n][1] = 0.0f;

if (begin < end) {
  for (int r = int(warp); r < ROWS; r += WARPS) {
    if (r < n_rows) {
      PRAGMA_UNROLL
      for (int i = 0; i < (DK + 31) / 32; i++)
        if (int(lane) + 32 * i < DK) q[r * DK + int(lane) + 32 * i] *= sign[i];
      barrier_simd();
      mix<DK>(q + r * DK, lane);
    }
    PRAGMA_UNROLL
    for (int i = 0; i < (DK + 31) / 32; i++)
      if (int(lane) + 32 * i < DK) put_query<DK>(page_queries, r, int(lane) + 32 * i, q[r * DK + int(lane) + 32 * i]);
  }
  if (has_raw) {
    fill_table<KP, 32 * WARPS>(key_levels, KEY_TABLE, lane + 32 * warp);
    if (KP != VP || TWO_TABLES) fill_table<VP, 32 * WARPS>(value_levels, VALUE_TABLE, lane + 32 * warp);
  }
  barrier_group();

  uint values[DV / 8][STREAM_WORDS(8 * VP)];
  for (int b = begin + int(warp); b < end; b += WARPS) {
    load_values<DV, VP>(values, value_words + page * DV * VALUE_WORDS, g, c);
    hold_loads(warp);
    float key_scale[8], value_log[8], value_inverse[8];
    load_scales(key_scale, key_scales + page * 64, g);
    load_scales(value_log, value_scales + page * 64, g);
    PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) {
      // At least float16's smallest: a row of zeros weighs nothing then, but still counts. NaN stays NaN.
      const float scale = value_log[i] < 5.9e-8f ? 5.9e-8f : value_log[i];
      value_log[i] = log2_fast(VP == 16 ? BYTE_STEP * scale : scale);
      if (KP == 16) key_scale[i] *= BYTE_STEP;
      value_inverse[i] = exp2_fast(-value_log[i]);
    }
    if (b + WARPS < end) page = size_t(table[row * table_shape[1] + b + WARPS]) * KV_HEADS + head;

    float s[NT][4][4];
    PRAGMA_UNROLL
    for (int n = 0; n < NT; n++)
      for (int j = 0; j < 4; j++)
        for (int e = 0; e < 4; e++) s[n][j][e] = 0.0f;
    score_page<DK, NT, LIVE, KP>(s, keys, page_queries, key_levels, lane);
    load_keys<DK, KP>(keys, key_words + page * 64 * KEY_WORDS, g, c);
    hold_loads(warp);

    const bool partly = SPAN > 0 && page_start + 64 * b <= offset + L - 1 - SPAN;
    PRAGMA_UNROLL
    for (int n = 0; n < NT; n++) {
      float highest[2] = {top[n][0], top[n][1]};
      PRAGMA_UNROLL
      for (int j = 0; j < 4; j++) {
        PRAGMA_UNROLL
        for (int e = 0; e < 4; e++) {
          const int k = 2 * j + (e >> 1);
          s[n][j][e] = s[n][j][e] * key_scale[k] + value_log[k];
          if (partly) {
            const int t = page_start + 64 * b + 16 * (g >> 1) + 2 * k + (g & 1);
            if (t <= offset + (r0 + 8 * n + 2 * c + (e & 1)) % L - SPAN) s[n][j][e] = HIDDEN;
          }
          highest[e & 1] = max(highest[e & 1], s[n][j][e]);
        }
      }
      PRAGMA_UNROLL
      for (int e = 0; e < 2; e++) {
        for (int mask = 4; mask < 32; mask <<= 1) highest[e] = max(highest[e], shuffle_xor(highest[e], mask));
      }
      if (any_of(highest[0] > top[n][0] || highest[1] > top[n][1])) {
        const float shrink0 = exp2_fast(top[n][0] - highest[0]), shrink1 = exp2_fast(top[n][1] - highest[1]);
        top[n][0] = highest[0], top[n][1] = highest[1];
        total[n][0] *= shrink0, total[n][1] *= shrink1;
        o.scale(n, shrink0, shrink1);
      }
      PRAGMA_UNROLL
      for (int j = 0; j < 4; j++) {
        PRAGMA_UNROLL
        for (int e = 0; e < 4; e++) {
          s[n][j][e] = exp2_fast(s[n][j][e] - top[n][e & 1]);
          total[n][e & 1] += s[n][j][e] * value_inverse[2 * j + (e >> 1)];
        }
      }
    }
    o.template accumulate<VP>(s, values, KP == VP ? key_levels : value_levels, lane);
  }

}

barrier_group(); // the tables are done with
TG(float) tile_out = scratch;
PRAGMA_UNROLL
for (int n = 0; n < NT; n++) {
  PRAGMA_UNROLL
  for (int e = 0; e < 2; e++) {
    for (int mask = 4; mask < 32; mask <<= 1) total[n][e] += shuffle_xor(total[n][e], mask);
    if (g == 0) stats[warp * 8 + 2 * c + e] = top[n][e], stats[(WARPS + warp) * 8 + 2 * c + e] = total[n][e];
  }
  barrier_group();
  const float factor0 = exp2_fast(top[n][0] - highest_of<WARPS>(stats, 2 * c));
  const float factor1 = exp2_fast(top[n][1] - highest_of<WARPS>(stats, 2 * c + 1));
  for (int turn = 0; turn < WARPS; turn += AT_ONCE) {
    const int place = int(warp) - turn;
    if (place >= 0 && place < AT_ONCE)
      o.put(tile_out + place * 8 * OUT_STRIDE(DV), n, factor0, factor1, turn > 0, lane);
    barrier_group();
  }
  write_part<DV, WARPS, AT_ONCE>(
      tile_out, stats, parts + size_t(first_query + 8 * n) * n_parts * PART_STRIDE(DV), RAW_BLOCKS + split, n_parts,
      min(8, n_rows - 8 * n), lane + 32 * warp);
  barrier_group();
}

// --- where threadgroups can wait for each other's memory, the last split of a group adds the parts up ---

#ifdef MERGED
if (last_of(workspace + counter, n_splits, (TG(int))stats, lane + 32 * warp)) {
  for (int r = int(warp); r < n_rows; r += WARPS) {
    const int query = first_query + r;
#ifdef SINKS
    const float sink = float(sinks[query / L % (KV_HEADS * REPEATS)]) * 1.44269504f;
#else
    const float sink = LOWEST;
#endif
    merge_row<T, DV, RAW_BLOCKS, MAX_PARTS>(
        parts + size_t(query) * n_parts * PART_STRIDE(DV), n_parts, sink, VALUE_SIGNS, scratch + warp * MERGE_FLOATS,
        out + size_t(query) * DV, lane);
  }
}
#endif
