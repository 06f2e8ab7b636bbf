// The raw buffers [rows, KV heads, KEEP + SLOTS, dim] with each row's newest token [rows, KV heads, 1, dim] in its slot, as
// new arrays. Grid: x = KV head times chunks of a head's buffer, y = row, z = keys, then values. In units of 16 bytes.

constexpr int UNIT = 16 / sizeof(T), N = KEEP + SLOTS;
const int row = int(threadgroup_position_in_grid.y), n_chunks = int(threadgroups_per_grid.x) / KV_HEADS;
const int head = int(threadgroup_position_in_grid.x) / n_chunks, chunk = int(threadgroup_position_in_grid.x) % n_chunks;
const bool is_key = threadgroup_position_in_grid.z == 0;
const int per_token = (is_key ? DK : DV) / UNIT, offset = rows[4 * row];
const int slot = offset < KEEP ? offset : KEEP + (offset - KEEP) % SLOTS;
const size_t at = size_t(row * KV_HEADS + head);
const device uint4* from = (const device uint4*)(is_key ? raw_keys : raw_values) + at * N * per_token;
const device uint4* token = (const device uint4*)(is_key ? keys : values) + at * per_token;
device uint4* to = (device uint4*)(is_key ? new_keys : new_values) + at * N * per_token;
const int begin = slot * per_token;
PRAGMA_UNROLL
for (int k = 0; k < PER_THREAD; k++) {
  const int i = (chunk * PER_THREAD + k) * THREADS + int(thread_index_in_threadgroup);
  if (i < N * per_token) to[i] = i >= begin && i < begin + per_token ? token[i - begin] : from[i];
}
