// attend, part 3 of 3: this split's pages, and with MERGED the merge of all parts.

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
      // At least float16's smallest number: a row of zeros then adds nothing, but still counts. NaN stays NaN.
      const float scale = value_log[i] < 5.9e-8f ? 5.9e-8f : value_log[i];
      value_log[i] = log2_fast(IS_GRID(VP) ? GRID_STEP(VP) * scale : scale);
      if (IS_GRID(KP)) key_scale[i] *= GRID_STEP(KP);
      value_inverse[i] = exp2_fast(-value_log[i]);
    }
    if (b == skip_page) {
      PRAGMA_UNROLL
      for (int i = 0; i < 8; i++) // HIDDEN is so low that adding a score leaves it
        if (64 * b + 16 * (g >> 1) + 2 * i + (g & 1) < hidden_end) value_log[i] = HIDDEN;
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

    const bool partly = SPAN > 0 && b >= n_pinned && page_start + 64 * b <= offset + L - 1 - SPAN;
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

barrier_group(); // the tables are no longer needed
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

// --- if threadgroups can see each other's memory, the last split of a group adds the parts ---

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
