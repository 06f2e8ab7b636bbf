// Add the parts of attend's splits, one simdgroup per query row. Grid: y = query rows / WARPS.

threadgroup float scratch[WARPS * (MAX_PARTS + DV)];

const uint lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int query = int(threadgroup_position_in_grid.y) * WARPS + int(warp), n_parts = parts_shape[3];
if (query < parts_shape[0] * N_HEADS * L) {
#ifdef SINKS
  const float sink = float(sinks[query / L % N_HEADS]) * 1.44269504f;
#else
  const float sink = -1e30f;
#endif
  merge_row<T, DV, RAW_BLOCKS, MAX_PARTS>(
      parts + size_t(query) * n_parts * PART_STRIDE(DV), n_parts, sink, VALUE_SIGNS, scratch + warp * (MAX_PARTS + DV),
      out + size_t(query) * DV, lane);
}
