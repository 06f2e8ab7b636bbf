// attend, part 2 of 3: raw tokens. Each of the last splits has one block of 64, each simdgroup 16 tokens of it. The step's own
// tokens are read from its inputs. The blocks with these tokens stored are the outputs new_keys and new_values.

for (int block = n_splits - 1 - split; block < RAW_BLOCKS; block += n_splits) {
  const int n_sink = min(KEEP, offset + L), sink_blocks = (KEEP + 63) / 64;
  const bool in_sink = block < sink_blocks;
  const int start = in_sink ? 64 * block : window_start + 64 * (block - sink_blocks);
  const int count = clamp_int((in_sink ? n_sink : offset + L) - start, 0, 64);
  const int slot = in_sink ? start : KEEP + (start - KEEP) % SLOTS;
  const size_t block_at = head_at * (KEEP + SLOTS) + slot, base = block_at + 16 * warp;
  const int mine = clamp_int(count - 16 * int(warp), 0, 16), first = start + 16 * int(warp); // tokens of this simdgroup
  if (group == 0) {
    const int n_slots = in_sink ? min(64, KEEP - start) : 64; // all slots, so that the output is complete
    BlockUnits<DK, L, 32 * WARPS, T> key_units;
    BlockUnits<DV, L, 32 * WARPS, T> value_units;
    for (int turn = 0; turn < larger(key_units.TURNS, value_units.TURNS); turn++) {
      key_units.load(raw_keys + block_at * DK, own_keys, offset - start, n_slots, turn, lane + 32 * warp);
      value_units.load(raw_values + block_at * DV, own_values, offset - start, n_slots, turn, lane + 32 * warp);
      key_units.store(new_keys + block_at * DK, n_slots, turn, lane + 32 * warp);
      value_units.store(new_values + block_at * DV, n_slots, turn, lane + 32 * warp);
    }
  }
  const device T* key_at[2];
  for (int m = 0; m < 2; m++) {
    const int t = 8 * m + g, later = clamp_int(first + t - offset, 0, L - 1);
    key_at[m] = first + t < offset ? raw_keys + (base + t) * DK : own_keys + later * DK;
  }
  TG(float) w = scratch + warp * 16 * 8;
  for (int n = 0; n < NT; n++) {
    float dot[2][LIVE];
    PRAGMA_UNROLL
    for (int m = 0; m < 2; m++) {
      PRAGMA_UNROLL
      for (int r = 0; r < LIVE; r++) dot[m][r] = 0.0f;
    }
    PRAGMA_UNROLL
    for (int i = 0; i < DK / 16; i++) {
      const int at = 16 * i + 4 * c;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        float k[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (8 * m + g < mine) load4(key_at[m] + at, k);
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) {
          TG(const float) x = q + (8 * n + r) * DK + at;
          dot[m][r] += k[0] * x[0] + k[1] * x[1] + k[2] * x[2] + k[3] * x[3];
        }
      }
    }
    float top[LIVE], total[LIVE];
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      const int position = offset + (r0 + 8 * n + r) % L;
      top[r] = LOWEST;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        float s = dot[m][r] + shuffle_xor(dot[m][r], 1);
        s += shuffle_xor(s, 2);
        const int t = first + 8 * m + g;
        const bool seen = 8 * m + g < mine && t <= position && (in_sink || SPAN == 0 || t > position - SPAN);
        dot[m][r] = seen ? s : HIDDEN;
        top[r] = max(top[r], dot[m][r]);
      }
      for (int mask = 4; mask < 32; mask <<= 1) top[r] = max(top[r], shuffle_xor(top[r], mask));
      total[r] = 0.0f;
      PRAGMA_UNROLL
      for (int m = 0; m < 2; m++) {
        dot[m][r] = exp2_fast(dot[m][r] - top[r]);
        total[r] += dot[m][r];
        if (c == (r & 3)) w[(8 * m + g) * 8 + r] = dot[m][r];
      }
      for (int mask = 4; mask < 32; mask <<= 1) total[r] += shuffle_xor(total[r], mask);
    }
    barrier_simd();
    float acc[(DV + 127) / 128][4][LIVE];
    PRAGMA_UNROLL
    for (int i = 0; i < (DV + 127) / 128; i++) {
      PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) {
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) acc[i][e][r] = 0.0f;
      }
      const int d = 4 * int(lane) + 128 * i;
      if (d < DV) {
        PRAGMA_UNROLL_8
        for (int t = 0; t < mine; t++) {
          float v[4];
          const int later = first + t - offset;
          load4((later < 0 ? raw_values + (base + t) * DV : own_values + later * DV) + d, v);
          PRAGMA_UNROLL
          for (int r = 0; r < LIVE; r++) {
            const float p = w[t * 8 + r];
            for (int e = 0; e < 4; e++) acc[i][e][r] += p * v[e];
          }
        }
      }
    }
    PRAGMA_UNROLL
    for (int r = 0; r < LIVE; r++) {
      if (int(lane) == r) stats[warp * 8 + r] = top[r], stats[(WARPS + warp) * 8 + r] = total[r];
    }
    barrier_group(); // the weights are no longer needed; the output overwrites them
    TG(float) tile_out = scratch;
    for (int turn = 0; turn < WARPS; turn += AT_ONCE) {
      const int place = int(warp) - turn;
      if (place >= 0 && place < AT_ONCE) {
        PRAGMA_UNROLL
        for (int r = 0; r < LIVE; r++) {
          const float factor = exp2_fast(top[r] - highest_of<WARPS>(stats, r));
          PRAGMA_UNROLL
          for (int i = 0; i < (DV + 127) / 128; i++) {
            const int d = 4 * int(lane) + 128 * i;
            TG(float) at = tile_out + (place * 8 + r) * OUT_STRIDE(DV) + d;
            for (int e = 0; e < 4; e++)
              if (d < DV) at[e] = (turn > 0 ? at[e] : 0.0f) + acc[i][e][r] * factor;
          }
        }
      }
      barrier_group();
    }
    write_part<DV, WARPS, AT_ONCE>(
        tile_out, stats, parts + size_t(first_query + 8 * n) * n_parts * PART_STRIDE(DV), block, n_parts,
        min(8, n_rows - 8 * n), lane + 32 * warp);
    barrier_group();
  }
}
