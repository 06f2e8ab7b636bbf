// CUDA's version of what the kernel bodies use beyond plain C++; prelude_metal.h is Metal's.
// Bodies are written in Metal's syntax, which this file maps to CUDA. The two steps over a page use matrix instructions
// (m16n8k16). Functions need no `__device__`, which the macros below would break: MLX compiles them for the device by default.

#define device
#define thread
#define constant const
#define threadgroup __shared__
#define TG(X) X*
#define kernel_fn static __forceinline__
#define PRAGMA_UNROLL _Pragma("unroll")

#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define thread_index_in_threadgroup (threadIdx.x)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim

#define OUT_AT_ONCE(DK, DV, WARPS) ((DV) <= 128 ? (WARPS) : (WARPS) > 2 ? 2 : (WARPS))
#define PRAGMA_UNROLL_8 _Pragma("unroll 8")

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef __half half;
typedef uint table_word;

kernel_fn void barrier_group() { __syncthreads(); }
kernel_fn void barrier_simd() { __syncwarp(); }
kernel_fn float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
kernel_fn float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
kernel_fn bool any_of(bool x) { return __any_sync(0xffffffffu, x); }
#if defined(__CUDA_ARCH__)
kernel_fn float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
kernel_fn float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
kernel_fn float exp2_fast(float x) { return exp2f(x); }
kernel_fn float log2_fast(float x) { return log2f(x); }
#endif
kernel_fn float min_keeping_nan(float x, float y) { return x > y ? y : x; }
kernel_fn float half_bits(uint bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }
kernel_fn uint bits_of_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

#if defined(__CUDA_ARCH__)
// Ordered loads: the assembler delays others until about 300 instructions before their use.
kernel_fn uint load_word(const uint* p) {
  uint x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
kernel_fn void load_words4(const uint* p, uint* w) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
kernel_fn void load_words2(const uint* p, uint* w) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
}
// A barrier keeps the assembler from delaying loads to about 300 instructions before their use, too late under load.
kernel_fn void hold_loads(uint warp) { asm volatile("bar.sync %0, 32;" : : "r"(warp + 1u) : "memory"); }
#else
kernel_fn uint load_word(const uint* p) { return *p; }
kernel_fn void load_words4(const uint* p, uint* w) {
  for (int i = 0; i < 4; i++) w[i] = p[i];
}
kernel_fn void load_words2(const uint* p, uint* w) {
  for (int i = 0; i < 2; i++) w[i] = p[i];
}
kernel_fn void hold_loads(uint) {}
#endif

// Four elements in one load.
kernel_fn void load4(const float* p, float* x) {
  float4 v = __ldg(reinterpret_cast<const float4*>(p));
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
kernel_fn void load4(const __half* p, float* x) {
  uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  x[0] = half_bits(v.x & 0xffffu), x[1] = half_bits(v.x >> 16), x[2] = half_bits(v.y & 0xffffu), x[3] = half_bits(v.y >> 16);
}
kernel_fn void load4(const __nv_bfloat16* p, float* x) {
  uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
  x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
}

// Reads what other threadgroups wrote, past this multiprocessor's cache.
kernel_fn float load_fresh(const float* p) { return __ldcg(p); }
kernel_fn void load4_fresh(const float* p, float* x) {
  float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
// Whether this threadgroup is the last of n to arrive. If so, it sees what the others wrote before. The counter starts at -1
// and returns there for the next launch. It is an input that no other launch in flight shares.
kernel_fn bool last_of(const int* counter, int n, int* flag, uint thread_index) {
  __threadfence();
  __syncthreads();
  if (thread_index == 0) {
    const int before = atomicAdd(const_cast<int*>(counter), 1);
    if (before == n - 2) *const_cast<int*>(counter) = -1;
    *flag = before == n - 2;
  }
  __syncthreads();
  const bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// --- two half values in one register ---

kernel_fn uint pack_half2(float low, float high) {
  __half2 x = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint*>(&x);
}

#if defined(__CUDA_ARCH__)
kernel_fn uint minus_half2(uint x, uint y) {
  uint out;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}
kernel_fn uint bytes_to_half2(uint word, uint selector) {
  // Bytes b become 256 + b (there the mantissa's unit is 1/4). Minus 383.5 that is exactly b - 127.5.
  return minus_half2(__byte_perm(word, 0, selector) * 4u + 0x5c005c00u, 0x5dfe5dfeu);
}
// D += A B: A 16x16 row-major, B 16x8 column-major, float16 with float32 sums.
kernel_fn void multiply_add(float* d, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
kernel_fn uint transpose8x8(uint x) {
  uint out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}
#else
// The same in plain C++, to run this text without a GPU.
kernel_fn uint minus_half2(uint x, uint y) {
  return pack_half2(half_bits(x & 0xffffu) - half_bits(y & 0xffffu), half_bits(x >> 16) - half_bits(y >> 16));
}
kernel_fn uint bytes_to_half2(uint word, uint selector) {
  uint low = (word >> (8 * (selector & 15u))) & 255u, high = (word >> (8 * ((selector >> 8) & 15u))) & 255u;
  return pack_half2((float)low - 127.5f, (float)high - 127.5f);
}
kernel_fn void multiply_add(float* d, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  const uint a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  for (int k = 0; k < 16; k++) {
    const int shift = 16 * (k & 1), half_of_k = k >> 3, at = (k & 7) >> 1;
    for (int n = 0; n < 2; n++) {
      float y = half_bits(__shfl_sync(0xffffffffu, b[half_of_k], 4 * (2 * c + n) + at) >> shift & 0xffffu);
      for (int m = 0; m < 2; m++)
        d[2 * m + n] += half_bits(__shfl_sync(0xffffffffu, a[2 * half_of_k + m], 4 * g + at) >> shift & 0xffffu) * y;
    }
  }
}
kernel_fn uint transpose8x8(uint x) {
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  uint low = __shfl_sync(0xffffffffu, x, 4 * (2 * c) + (g >> 1)) >> (16 * (g & 1)) & 0xffffu;
  uint high = __shfl_sync(0xffffffffu, x, 4 * (2 * c + 1) + (g >> 1)) >> (16 * (g & 1)) & 0xffffu;
  return low | high << 16;
}
#endif

// --- tables of pair codes: one copy for each of the 32 banks, so that look-ups never conflict ---

#define TABLE_WORDS(PB) (32 * TABLE_PAIRS(PB))

template <int PB, int THREADS>
kernel_fn void fill_table(uint* table, const __half* levels, uint thread_index) {
  if constexpr (!IS_GRID(PB)) {
    constexpr int n = TABLE_PAIRS(PB);
#pragma unroll
    for (int i = 0; i < n; i += THREADS) {
      const uint entry = i + thread_index;
      if (entry < n) {
        const uint pair = __ldg(reinterpret_cast<const uint*>(levels) + entry);
#pragma unroll
        for (uint k = 0; k < 8; k++) // each thread has its own order, so that threads write to different banks
          reinterpret_cast<uint4*>(table)[8 * entry + (k + thread_index) % 8] = make_uint4(pair, pair, pair, pair);
      }
    }
  }
}

// The copy of a table that one lane reads. With an address in shared memory, a look-up takes two instructions before its load
// (extract the code, multiply and add). Attention spends most of its time on these.
#if defined(__CUDA_ARCH__)
struct LaneTable {
  uint base;
};
kernel_fn LaneTable lane_table(const uint* table, uint lane) {
  uint base = (uint)__cvta_generic_to_shared(table) + 4u * lane;
  asm volatile("mov.u32 %0, %0;" : "+r"(base)); // stays after the barrier that follows the filling of the table
  return {base};
}
kernel_fn uint look_up(LaneTable table, uint code) {
  uint pair;
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(code * 128u + table.base));
  return pair;
}
#else
struct LaneTable {
  const uint* base;
};
kernel_fn LaneTable lane_table(const uint* table, uint lane) { return {table + lane}; }
kernel_fn uint look_up(LaneTable table, uint code) { return table.base[32u * code]; }
#endif

// The 32 bits of a lane's stream in which stream bit `at` comes to lie at bit TO. Lower bits may be anything.
template <int TO, int BITS>
kernel_fn uint shifted(const uint* words, int at) {
  const int word = at / 32, shift = at % 32 - TO;
  if (shift < 0) return words[word] << -shift;
  return at % 32 + BITS > 32 ? __funnelshift_r(words[word], words[word + 1], shift) : words[word] >> shift;
}

// Pair `index` of a lane's aligned code stream, as two half values; codes of a grid are in units of GRID_STEP. The index must
// be constant after loops are unrolled.
template <int PB>
kernel_fn uint pair_at(const uint* words, int index, LaneTable table) {
  const int word = index * PB / 32, at = index * PB % 32;
  if constexpr (PB == 16) {
    return bytes_to_half2(words[word], at == 0 ? 0x4140u : 0x4342u);
  } else if constexpr (IS_GRID(PB)) {
    // A code c becomes 256 + c, as above.
    constexpr uint last = LAST_CODE(PB);
    const uint low = shifted<2, PB / 2>(words, index * PB), high = shifted<18, PB / 2>(words, index * PB + PB / 2);
    return minus_half2((low & (last << 2)) | (high & (last << 18)) | 0x5c005c00u, 0x5c005c00u + 0x20002u * last);
  } else if constexpr (PB == 8) {
    return look_up(table, __byte_perm(words[word], 0u, 0x4440u + at / 8));
  } else {
    uint code = words[word] >> at;
    if (at + PB > 32) code = __funnelshift_r(words[word], words[word + 1], at);
    return look_up(table, code & ((1u << PB) - 1u));
  }
}

// --- the two steps over a page; attend_1_setup.metal says what each lane holds ---

// Queries as B fragments: every lane has two words for each tile and step of 16 dims. Lane (g, c) holds query g's dims of
// quarter c, as half values.
typedef uint query_word;
#define QUERY_WORDS(NT, DK) ((NT) * 4 * (DK))

template <int DK>
kernel_fn void put_query(query_word* words, int r, int d, float x) {
  const int lane = 4 * (r % 8) + d / (DK / 4), pair = d % (DK / 4) / 2;
  __half* at = reinterpret_cast<__half*>(words + ((r / 8 * (DK / 16) + pair / 2) * 32 + lane) * 2 + pair % 2);
  at[d % 2] = __float2half_rn(x);
}

// s[n][j] += keys of tile j times queries of tile n.
template <int DK, int NT, int LIVE, int PB>
kernel_fn void score_page(
    float (&s)[NT][4][4], const uint (&words)[8][STREAM_WORDS(DK / 8 * PB)], const query_word* queries,
    const uint* levels, uint lane) {
  const LaneTable table = lane_table(levels, lane);
#pragma unroll
  for (int i = 0; i < DK / 16; i++) {
    uint2 q[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) q[n] = reinterpret_cast<const uint2*>(queries)[(n * (DK / 16) + i) * 32 + lane];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint a0 = pair_at<PB>(words[2 * j], 2 * i, table), a1 = pair_at<PB>(words[2 * j + 1], 2 * i, table);
      const uint a2 = pair_at<PB>(words[2 * j], 2 * i + 1, table), a3 = pair_at<PB>(words[2 * j + 1], 2 * i + 1, table);
#pragma unroll
      for (int n = 0; n < NT; n++) multiply_add(s[n][j], a0, a1, a2, a3, q[n].x, q[n].y);
    }
  }
}

// The output of a lane: dims (16 i + g, 16 i + 8 + g) for queries (2 c, 2 c + 1) of each tile.
template <int DV, int NT, int LIVE>
struct Output {
  float o[NT][DV / 16][4];

  __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < DV / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][i][e] = 0.0f;
  }
  // Multiplies by one factor for each of the lane's two queries of tile n.
  __forceinline__ void scale(int n, float x, float y) {
#pragma unroll
    for (int i = 0; i < DV / 16; i++) o[n][i][0] *= x, o[n][i][1] *= y, o[n][i][2] *= x, o[n][i][3] *= y;
  }
  // Adds the page's values, weighed by p (held as the scores are); `values` is the lane's part of the page's streams.
  template <int PB>
  __forceinline__ void accumulate(
      const float (&p)[NT][4][4], const uint (&values)[DV / 8][STREAM_WORDS(8 * PB)], const uint* levels, uint lane) {
    const LaneTable table = lane_table(levels, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint b[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) b[n][h] = transpose8x8(pack_half2(p[n][j][2 * h], p[n][j][2 * h + 1]));
#pragma unroll
      for (int i = 0; i < DV / 16; i++) {
        const uint a0 = pair_at<PB>(values[2 * i], 2 * j, table), a1 = pair_at<PB>(values[2 * i + 1], 2 * j, table);
        const uint a2 = pair_at<PB>(values[2 * i], 2 * j + 1, table);
        const uint a3 = pair_at<PB>(values[2 * i + 1], 2 * j + 1, table);
#pragma unroll
        for (int n = 0; n < NT; n++) multiply_add(o[n][i], a0, a1, a2, a3, b[n][0], b[n][1]);
      }
    }
  }
  // Puts (or adds, if `more`) the queries of tile n, times one factor for each of the lane's two, into out [8, OUT_STRIDE].
  __forceinline__ void put(float* out, int n, float x, float y, bool more, uint lane) const {
    const int g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int i = 0; i < DV / 16; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float* at = out + (2 * c + (e & 1)) * OUT_STRIDE(DV) + 16 * i + 8 * (e >> 1) + g;
        *at = (more ? *at : 0.0f) + o[n][i][e] * ((e & 1) ? y : x);
      }
    }
  }
};
