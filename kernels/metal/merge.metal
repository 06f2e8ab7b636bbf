// The parts that attend.metal's splits left, added up: one threadgroup for each query row. Grid: y = query rows.
// The first RAW_BLOCKS parts are in the model's basis, the others in the rotated one; these are brought back once.

constexpr int COLUMNS = (DV + 31) / 32 * 32, GROUPS = THREADS / COLUMNS;

threadgroup float factors[MAX_PARTS];
threadgroup float sums[GROUPS * DV];

const int row = int(threadgroup_position_in_grid.y), tid = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup), warp = int(simdgroup_index_in_threadgroup);
const int n_parts = parts_shape[3];

// What every thread needs at the end is on its way from the start.
const device float* part = parts + size_t(row) * n_parts * DV;
float raw[RAW_BLOCKS], sign = 0.0f;
PRAGMA_UNROLL
for (int s = 0; s < RAW_BLOCKS; s++) raw[s] = tid < DV ? part[s * DV + tid] : 0.0f;
if (tid < DV) sign = signs[tid];

// Every simdgroup works the total out by itself.
float highest = -1e30f;
for (int s = lane; s < n_parts; s += 32) highest = max(highest, part_stats[(row * n_parts + s) * 2]);
for (int mask = 1; mask < 32; mask <<= 1) highest = max(highest, shuffle_xor(highest, mask));
const float sink = HAS_SINKS ? float(sinks[row / L % N_HEADS]) * 1.44269504f : -1e30f;
highest = max(highest, sink);
float total = 0.0f;
for (int s = lane; s < n_parts; s += 32) {
  const float factor = exp2_fast(part_stats[(row * n_parts + s) * 2] - highest);
  total += part_stats[(row * n_parts + s) * 2 + 1] * factor;
  if (warp == 0) factors[s] = factor;
}
for (int mask = 1; mask < 32; mask <<= 1) total += shuffle_xor(total, mask);
if (HAS_SINKS) total += exp2_fast(sink - highest);
barrier_group();

const int group = tid / COLUMNS, column = tid % COLUMNS;
if (group < GROUPS && column < DV) {
  float sum = 0.0f;
  int s = RAW_BLOCKS + group;
  for (; s + 7 * GROUPS < n_parts; s += 8 * GROUPS) {
    float x[8];
    PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) x[i] = part[(s + i * GROUPS) * DV + column];
    PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) sum += factors[s + i * GROUPS] * x[i];
  }
  PRAGMA_UNROLL_8
  for (; s < n_parts; s += GROUPS) sum += factors[s] * part[s * DV + column];
  sums[group * DV + column] = sum;
}
barrier_group();
if (GROUPS > 1) {
  if (tid < DV)
    for (int i = 1; i < GROUPS; i++) sums[tid] += sums[i * DV + tid];
  barrier_group();
}
if (warp == 0) mix<DV>(sums, uint(lane));
barrier_group();
if (tid < DV) {
  float sum = sums[tid] * sign;
  PRAGMA_UNROLL
  for (int s = 0; s < RAW_BLOCKS; s++) sum += factors[s] * raw[s];
  out[size_t(row) * DV + tid] = T(sum / total);
}
