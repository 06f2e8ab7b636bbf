// Encode pages: rotate, normalise, quantise, pack. Grid: y = KV head, z = page times 2 (keys, then values).
// Tokens are [pages, KV heads, 64, dim].

constexpr int D = DK > DV ? DK : DV;
threadgroup float rows[WARPS * 2 * D];
threadgroup float levels[2 << larger(KEY_PAIRED ? KP : 0, VALUE_PAIRED ? VP : 0)];
threadgroup ushort codes[32 * D];

const uint lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int head = int(threadgroup_position_in_grid.y), page = int(threadgroup_position_in_grid.z) >> 1;
const size_t at = size_t(page) * KV_HEADS + head;

if ((threadgroup_position_in_grid.z & 1) == 0) {
  encode_page<T, DK, KP, KEY_PAIRED, true, WARPS>(
      keys + at * 64 * DK, KEY_SIGNS, KEY_TABLE, rows, levels, codes, key_words + at * 64 * ((DK * KP / 2 + 31) / 32),
      key_scales + at * 64, lane, warp);
} else {
  encode_page<T, DV, VP, VALUE_PAIRED, false, WARPS>(
      values + at * 64 * DV, VALUE_SIGNS, VALUE_TABLE, rows, levels, codes, value_words + at * DV * VP,
      value_scales + at * 64, lane, warp);
}
