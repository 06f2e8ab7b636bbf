// attend, part 1 of 3: setup. The three files are one function body and share local variables.
//
// Attention of a decode step: L query tokens over one row's sink, pages and window. merge.metal adds the parts of the splits.
// Grid: x = splits, y = KV head times group of queries, z = row.
//
// Raw tokens (in the model's basis) are RAW_BLOCKS blocks of 64. Each of the last splits has one block, and so gets fewer pages
// (in the rotated basis). Parts are the raw blocks, then the splits' pages. One simdgroup handles a page alone, so the main
// loop never waits. Queries are NT tiles of 8 rows; row r = repeat * L + token.
//
// In a page, lane (g, c) = (lane / 4, lane % 4) holds
//   keys     quarter c of the dims of tokens t(j, h) = 16 (g / 2) + 4 j + 2 h + g % 2, j < 4, h < 2
//   scores   s[n][j][2 h + e] of token t(j, h) and query 8 n + 2 c + e
//   values   tokens 16 c .. 16 c + 15 of dims g, 8 + g, 16 + g, ...
//
// Weights of page tokens include the value's scale. With u = s + log2(scale), the running maximum is that of u, so weights fit
// float16 for values of any size. Their sum is that of 2^(s - max u) and merges as usual.

constexpr int ROWS = 8 * NT, N_QUERIES = REPEATS * L, LIVE = N_QUERIES < 8 ? N_QUERIES : 8;
constexpr int KEY_WORDS = (DK * KP / 2 + 31) / 32, VALUE_WORDS = VP;
constexpr float LOWEST = -1e30f, HIDDEN = -2e30f; // HIDDEN is far below any maximum, so its weight is 0

constexpr int RAW_BLOCKS = (KEEP + 63) / 64 + SLOTS / 64;
constexpr int TABLES = TABLE_WORDS(KP) + (KP == VP && !TWO_TABLES ? 0 : TABLE_WORDS(VP));
constexpr int AT_ONCE = OUT_AT_ONCE(DK, DV, WARPS), OUT_FLOATS = AT_ONCE * 8 * OUT_STRIDE(DV);
constexpr int MERGE_FLOATS = MAX_PARTS + DV;
constexpr int RAW_FLOATS = larger(WARPS * 16 * 8, OUT_FLOATS), TABLE_FLOATS = TABLES * int(sizeof(table_word)) / 4;

threadgroup float stats[2 * WARPS * 8];
threadgroup float4 raw_query_storage[ROWS * DK / 4];
threadgroup float4 query_storage[(QUERY_WORDS(NT, DK) + 3) / 4];
// Used in turn for the weights of raw tokens or their output, the tables of pages and the output of a tile.
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
const size_t head_at = row * KV_HEADS + head;
const int first_query = int(head_at) * N_QUERIES + r0;
const device T* own_keys = step_keys + head_at * L * DK;
const device T* own_values = step_values + head_at * L * DV;

const int offset = rows[4 * row], n_pages = rows[4 * row + 2], hidden_end = rows[4 * row + 3];
const int n_pinned = hidden_end >> 6, skip_page = (hidden_end & 63) > 0 ? n_pinned : -1; // its first tokens are hidden
const int page_start = KEEP + 64 * rows[4 * row + 1], window_start = page_start + 64 * n_pages;

const int n_parts = n_splits + RAW_BLOCKS;
#ifdef MERGED
// Counters first, one for each group of splits, in whole units of 16 bytes.
const int n_counters = int(threadgroups_per_grid.y) * int(threadgroups_per_grid.z);
const int counter = row * int(threadgroups_per_grid.y) + int(threadgroup_position_in_grid.y);
device float* parts = (device float*)workspace + (n_counters + 3) / 4 * 4;
#endif

// --- load this split's first page, the tables and the signs while the queries are prepared ---

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
