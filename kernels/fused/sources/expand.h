// Decode tokens of one page and KV head to the model's basis.

// Write tokens first .. first + count - 1 to `out` [count, D]. `rows` [WARPS, D] is scratch.
template <typename T, int D, int PB, bool KEYS, int WARPS>
kernel_fn void expand_tokens(
    const device uint* words, const device half* scales, const device float* signs, const device half* table,
    TG(float) all_rows, device T* out, int first, int count, uint lane, uint warp) {
  TG(float) row = all_rows + warp * D;
  constexpr int stride = KEYS ? (D * PB / 2 + 31) / 32 : PB;
  for (int i = int(warp); i < count; i += WARPS) {
    const int t = first + i;
    if (KEYS) {
      for (int pair = int(lane); pair < D / 2; pair += 32) {
        const uint code = code_at<PB>(words + t * stride, pair);
        row[2 * pair] = level_of<PB>(code, 0, table);
        row[2 * pair + 1] = level_of<PB>(code, 1, table);
      }
    } else {
      for (int d = int(lane); d < D; d += 32)
        row[d] = level_of<PB>(code_at<PB>(words + d * stride, t >> 1), t & 1, table);
    }
    barrier_simd();
    mix<D>(row, lane);
    const float scale = float(scales[t]);
    for (int d = int(lane); d < D; d += 32) out[i * D + d] = T(row[d] * signs[d] * scale);
    barrier_simd();
  }
}
