// Encode the rows of one page and KV head. kernels/lanes/reference.py defines the codes and scales.

// Code of coordinate x (levels of N(0, 1)) among the 2**(PB / 2) sorted levels of a scalar code, and its level.
template <int PB>
kernel_fn uint nearest_scalar(float x, const device half* table, thread float& level) {
  if (IS_GRID(PB)) {
    const float at = clamp(x / GRID_STEP(PB) + 0.5f * LAST_CODE(PB), 0.0f, float(LAST_CODE(PB)));
    const uint code = at == at ? uint(ceil(at - 0.5f)) : 0u; // ties go to the lower code, as below
    level = (float(code) - 0.5f * LAST_CODE(PB)) * GRID_STEP(PB);
    return code;
  }
  // Codes below 2**bits of a pair table are the pairs (level, lowest level). Ties go to the lower code.
  uint code = 0u;
  for (int bit = PB / 2 - 1; bit >= 0; bit--) {
    const uint upper = code + (1u << bit);
    const float boundary = (float(table[2 * upper]) + float(table[2 * (upper - 1)])) * 0.5f;
    code = x > boundary ? upper : code;
  }
  level = float(table[2 * code]);
  return code;
}

// Codes of N pairs at once, so that each level is read once for all. Ties go to the lower code.
template <int PB, int N>
kernel_fn void nearest_pairs(
    const thread float (&x)[N], const thread float (&y)[N], TG(const float) levels, thread uint (&best)[N]) {
  float least[N];
  PRAGMA_UNROLL
  for (int k = 0; k < N; k++) least[k] = 1e30f, best[k] = 0u;
  for (uint code = 0u; code < uint(TABLE_PAIRS(PB)); code++) {
    const float level_x = levels[2 * code], level_y = levels[2 * code + 1];
    PRAGMA_UNROLL
    for (int k = 0; k < N; k++) {
      const float dx = x[k] - level_x, dy = y[k] - level_y, distance = dx * dx + dy * dy;
      if (distance < least[k]) least[k] = distance, best[k] = code;
    }
  }
}

kernel_fn float or_zero(float x) { return x - x == 0.0f ? x : 0.0f; }

kernel_fn float simd_total(float x) {
  for (int mask = 1; mask < 32; mask <<= 1) x += shuffle_xor(x, mask);
  return x;
}

kernel_fn float simd_highest(float x) {
  for (int mask = 1; mask < 32; mask <<= 1) x = max(x, shuffle_xor(x, mask));
  return x;
}

// PAIRED: the table is that of a pair code. `rows` [WARPS, 2, D], `levels` [2 << PB] and `codes` [64 * D / 2] are scratch;
// codes are ushort, because two 8-bit codes need 16 bits. Two tokens are encoded together, because a pair code of the values
// stands for two tokens.
template <typename T, int D, int PB, bool PAIRED, bool KEYS, int WARPS>
kernel_fn void encode_page(
    const device T* tokens, const device float* signs, const device half* table, TG(float) all_rows, TG(float) levels,
    TG(ushort) codes, device uint* words, device half* scales, uint lane, uint warp) {
  TG(float) rows = all_rows + warp * 2 * D;
  if (PAIRED) {
    for (int i = int(lane + 32 * warp); i < 2 << PB; i += 32 * WARPS) levels[i] = float(table[i]);
    barrier_group();
  }
  constexpr int AT_ONCE = 4;
  for (int t = int(warp); t < 32; t += WARPS) {
    float norm[2];
    for (int e = 0; e < 2; e++) {
      float squares = 0.0f;
      for (int d = int(lane); d < D; d += 32) {
        const float x = float(tokens[(2 * t + e) * D + d]);
        squares += x * x;
        rows[e * D + d] = x * signs[d];
      }
      norm[e] = sqrt(simd_total(squares));
      barrier_simd();
      mix<D>(rows + e * D, lane);
    }
    float along[2] = {0.0f, 0.0f}, squared[2] = {0.0f, 0.0f};
    const float root = sqrt(float(D));
    float unit[2] = {root / max(norm[0], 1e-30f), root / max(norm[1], 1e-30f)}, zoom[2] = {1.0f, 1.0f};
    if (IS_GRID(PB)) { // the largest coordinate lies at the end of the range
      for (int e = 0; e < 2; e++) {
        float highest = 0.0f;
        for (int d = int(lane); d < D; d += 32) highest = max(highest, fabs(or_zero(rows[e * D + d] * unit[e])));
        highest = simd_highest(highest);
        if (highest > 0.0f) zoom[e] = RANGE_END / highest;
        unit[e] *= zoom[e];
      }
    }
    for (int first = 0; first < D; first += 32 * AT_ONCE) {
      float x[AT_ONCE], y[AT_ONCE];
      uint code[AT_ONCE];
      PRAGMA_UNROLL
      for (int k = 0; k < AT_ONCE; k++) {
        // Keys: pair i % (D / 2) of token i / (D / 2). Values: dim i of both tokens.
        const int i = min(first + 32 * k + int(lane), D - 1);
        const int ex = KEYS ? i / (D / 2) : 0, ey = KEYS ? ex : 1;
        const int dx = KEYS ? 2 * (i % (D / 2)) : i, dy = KEYS ? dx + 1 : i;
        // NaN and infinity stay in their row: its scale shows them, and its codes must not change a neighbour's.
        x[k] = or_zero(rows[ex * D + dx] * unit[ex]), y[k] = or_zero(rows[ey * D + dy] * unit[ey]);
      }
      if (PAIRED) nearest_pairs<PB, AT_ONCE>(x, y, levels, code);
      PRAGMA_UNROLL
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = first + 32 * k + int(lane);
        if (i < D) {
          const int ex = KEYS ? i / (D / 2) : 0, ey = KEYS ? ex : 1;
          float level_x, level_y;
          if (PAIRED) {
            level_x = levels[2 * code[k]], level_y = levels[2 * code[k] + 1];
          } else {
            code[k] = nearest_scalar<PB>(x[k], table, level_x);
            code[k] |= nearest_scalar<PB>(y[k], table, level_y) << (PB / 2);
          }
          if (ex == 0) along[0] += x[k] * level_x, squared[0] += level_x * level_x;
          else along[1] += x[k] * level_x, squared[1] += level_x * level_x;
          if (ey == 0) along[0] += y[k] * level_y, squared[0] += level_y * level_y;
          else along[1] += y[k] * level_y, squared[1] += level_y * level_y;
          codes[KEYS ? (2 * t + ex) * (D / 2) + i % (D / 2) : i * 32 + t] = ushort(code[k]);
        }
      }
    }
    for (int e = 0; e < 2; e++) {
      const float ru = simd_total(along[e]), rr = simd_total(squared[e]);
      const float scale = KEYS ? norm[e] * root * zoom[e] / ru : norm[e] / root * ru / (rr * zoom[e]);
      if (lane == 0) scales[2 * t + e] = half(norm[e] == 0.0f ? 0.0f : min_keeping_nan(scale, 65504.0f));
    }
    barrier_simd();
  }
  barrier_group();
  // One stream of n codes for each token (keys) or dim (values).
  constexpr int n = KEYS ? D / 2 : 32, n_streams = KEYS ? 64 : D, n_words = (n * PB + 31) / 32;
  for (int i = int(lane + 32 * warp); i < n_streams * n_words; i += 32 * WARPS) {
    const int stream = i / n_words, begin = 32 * (i % n_words);
    uint word = 0u;
    for (int j = begin / PB; j < n && j * PB < begin + 32; j++) {
      const uint code = codes[stream * n + j];
      const int shift = j * PB - begin;
      word |= shift >= 0 ? code << shift : code >> -shift;
    }
    words[i] = word;
  }
}
