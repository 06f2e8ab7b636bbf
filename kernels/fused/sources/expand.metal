// Decode pages to keys and values in the model's basis, and append the raw tokens, for the attention of a prefill chunk.
// Grid: x = slices of 16 tokens, y = KV head, z = row times 2 (keys, then values).
// Outputs are [rows, KV heads, pages * 64 + raw, dim].

constexpr int D = DK > DV ? DK : DV, SLICE = 16;
threadgroup float scratch[WARPS * D];

const uint lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int slice = int(threadgroup_position_in_grid.x), head = int(threadgroup_position_in_grid.y);
const int row = int(threadgroup_position_in_grid.z) >> 1, n_pages = table_shape[1];
#ifdef RAW
const int n_raw = raw_keys_shape[2];
#else
const int n_raw = 0;
#endif
const bool is_key = (threadgroup_position_in_grid.z & 1) == 0;
const size_t at = (size_t(row) * KV_HEADS + head) * (n_pages * 64 + n_raw) + slice * SLICE;

if (slice < 4 * n_pages) {
  const size_t page = size_t(table[row * n_pages + slice / 4]) * KV_HEADS + head;
  if (is_key) {
    expand_tokens<T, DK, KP, true, WARPS>(
        key_words + page * 64 * ((DK * KP / 2 + 31) / 32), key_scales + page * 64, KEY_SIGNS, KEY_TABLE, scratch,
        keys + at * DK, slice % 4 * SLICE, SLICE, lane, warp);
  } else {
    expand_tokens<T, DV, VP, false, WARPS>(
        value_words + page * DV * VP, value_scales + page * 64, VALUE_SIGNS, VALUE_TABLE, scratch, values + at * DV,
        slice % 4 * SLICE, SLICE, lane, warp);
  }
}
#ifdef RAW
else {
  const int first = (slice - 4 * n_pages) * SLICE, count = min(SLICE, n_raw - first);
  const size_t from = (size_t(row) * KV_HEADS + head) * n_raw + first;
  for (int i = int(lane + 32 * warp); i < count * (is_key ? DK : DV); i += 32 * WARPS) {
    if (is_key) keys[at * DK + i] = raw_keys[from * DK + i];
    else values[at * DV + i] = raw_values[from * DV + i];
  }
}
#endif
