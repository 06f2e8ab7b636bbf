// Pages to keys and values in the model's basis, for prefill's attention. Grid: x = slices of 16 tokens, y = KV head,
// z = row times 2 (keys, then values). Outputs are [rows, KV heads, pages * 64, dim].

constexpr int D = DK > DV ? DK : DV, SLICE = 16;
threadgroup float scratch[WARPS * D];

const uint lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int slice = int(threadgroup_position_in_grid.x), head = int(threadgroup_position_in_grid.y);
const int row = int(threadgroup_position_in_grid.z) >> 1, n_pages = table_shape[1];
const size_t page = size_t(table[row * n_pages + slice / 4]) * KV_HEADS + head;
const size_t at = (size_t(row) * KV_HEADS + head) * n_pages * 64 + slice * SLICE;

if ((threadgroup_position_in_grid.z & 1) == 0) {
  expand_tokens<T, DK, KP, true, WARPS>(
      key_words + page * 64 * ((DK * KP / 2 + 31) / 32), key_scales + page * 64, KEY_SIGNS, KEY_TABLE, scratch,
      keys + at * DK, slice % 4 * SLICE, SLICE, lane, warp);
} else {
  expand_tokens<T, DV, VP, false, WARPS>(
      value_words + page * DV * VP, value_scales + page * 64, VALUE_SIGNS, VALUE_TABLE, scratch, values + at * DV,
      slice % 4 * SLICE, SLICE, lane, warp);
}
