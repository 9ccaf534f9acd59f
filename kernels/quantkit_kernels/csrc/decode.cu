// Attention of a few new tokens per sequence over paged keys and values, in one launch: a cluster of blocks has one
// sequence and one head of keys, its warps take 16 tokens at a time, and their results meet in shared memory.
//
//   warp w of CLUSTER · WARPS   tokens 16 w … 16 w + 15, then 16 CLUSTER · WARPS further …     each its own softmax
//            K, V: memory ──► registers, as mma.sync wants them ──► sums of the warp ──► shared memory
//   block                       sums of its WARPS, in their order ──► shared memory of the block that owns a part
//   cluster                     each block adds up its part of the result, in the order of the blocks
//
//   lane (g = lane / 4, t = lane % 4)   k: tokens g, g + 8, every fourth 16 bytes from t on; q: rows g, g + 8 likewise
//                                       v: tokens 2t, 2t + 1, 2t + 8, 2t + 9, every eighth 16 bytes from g on
//
// So score = q · kᵀ sums over D in the order in which lanes hold it, p is the left operand where it is, and pairs of
// tokens of v become registers by one byte permutation: nothing passes through shared memory but results.
// Which tokens a warp has depends on CLUSTER, WARPS and the length of the sequence alone, and sums have one order.
//
// Definitions: Q_KIND (BF16, F16), KV_KIND (Q_KIND, E4M3, INT), PER_TOKEN (scales of tokens, else of heads), WINDOW,
// CAP, D, BLOCK_SIZE, CLUSTER, WARPS, ROWS (8 or 16: new tokens x query heads of a head), SPAN (how many times 16 tokens
// a warp waits for at a time).

#include "common.cuh"

#define INT 0
#define E4M3 1
#define BF16 2
#define F16 3

struct Params {
  u16* out;
  const u16* q;
  const u8* k;
  const u8* v;
  const float* k_scale;
  const float* v_scale;
  const int* table;
  const int* lengths;
  const int* first_rows;
  long long q_stride, query_stride;                    // elements
  long long block_stride, head_stride, token_stride;   // bytes
  int table_stride, table_width, num_blocks, group, window;
  float softmax_scale, soft_cap;  // times log2 e
};

constexpr bool IS_CODE = KV_KIND == E4M3 || KV_KIND == INT;
constexpr bool IS_BF16 = KV_KIND == BF16;
constexpr int CHUNKS = D * (IS_CODE ? 1 : 2) / 16;  // 16 bytes of a token
constexpr int K_LOADS = (CHUNKS + 3) / 4, V_LOADS = (CHUNKS + 7) / 8;
constexpr int CHUNK = IS_CODE ? 16 : 8;  // elements
constexpr int PAIRS = V_LOADS * CHUNK / 2;  // of elements of the result that a lane has
constexpr int HALVES = ROWS / 8;
constexpr int PITCH = D + 4;             // floats of a row in shared memory
constexpr int OUT_OF_BLOCK = ROWS * D / CLUSTER;
constexpr float NOTHING = -1e30f;        // a maximum of no scores: finite, so that differences of maxima are numbers
static_assert(D % CHUNK == 0 && D % CLUSTER == 0, "heads are whole chunks and parts");

struct Shared {
  float sums[WARPS][ROWS][PITCH];
  float maxima[WARPS][ROWS], totals[WARPS][ROWS];
  float parts[CLUSTER][OUT_OF_BLOCK];  // of the blocks, from them
  float part_maxima[CLUSTER][ROWS], part_totals[CLUSTER][ROWS];
  u64 arrived;  // barrier of the parts
};

// ---- the cluster ----

inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

inline u32 block_of_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

inline u32 address_in_block(u32 mine, u32 block) {
  u32 theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(block));
  return theirs;
}

// Into the same place of another block's shared memory, whose barrier counts the bytes.
inline void send(float* mine, u32 barrier, u32 block, float x) {
  if constexpr (CLUSTER == 1) {
    *mine = x;
    return;
  }
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in_block(shared_address(mine), block)),
               "r"(__float_as_uint(x)), "r"(address_in_block(barrier, block))
               : "memory");
}

// ---- numbers ----

inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline float log2_of(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline u32 permute(u32 a, u32 b, u32 how) { return __byte_perm(a, b, how); }

// Four codes of one word as fp16, in their order.
inline void to_halves(u32 word, u32& low, u32& high) {
  if constexpr (KV_KIND == E4M3) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
  } else {  // code + 128 under the exponent of 1024, minus 1152
    word ^= 0x80808080u;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(low) : "r"(permute(word, 0x64646464u, 0x4140)), "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(high) : "r"(permute(word, 0x64646464u, 0x4342)), "r"(0x64806480u));
  }
}

// The low number in the low half.
template <bool AS_BF16>
inline u32 to_pair(float low, float high) {
  u32 pair;
  if constexpr (AS_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

inline float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (IS_BF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Past L1: what it held before the kernel in front ended would be found there afterwards.
inline int load_number(const int* at) {
  int number;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(number) : "l"(at));
  return number;
}

inline void fetch_into_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

inline Vec16 nothing() { return Vec16{{0, 0, 0, 0}}; }

// ---- queries ----

// Row `row`, as lane t of its four reads k: 16-bit pairs of the chunks t, t + 4 …; and what multiplies its scores.
struct Query {
  u32 pairs[K_LOADS][CHUNK / 2];
  float factor;
};

inline void load_query(Query& query, const u16* at, bool is_row, int t) {
  for (int i = 0; i < K_LOADS; i++) {
    const int chunk = t + 4 * i;
    for (int j = 0; j < CHUNK / 8; j++) {
      Vec16 eight = nothing();
      if (is_row && chunk < CHUNKS) eight = *reinterpret_cast<const Vec16*>(at + chunk * CHUNK + 8 * j);
      for (int k = 0; k < 4; k++) query.pairs[i][4 * j + k] = eight.w[k];
    }
  }
  query.factor = 1.0f;
}

// bf16 to fp16, divided by a power of two, so that nothing is rounded.
inline void normalise(Query& query) {
  float largest = 0.0f;
  for (int i = 0; i < K_LOADS; i++)
    for (int j = 0; j < CHUNK / 2; j++) {
      const u32 pair = query.pairs[i][j];
      largest = fmaxf(largest, fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair))));
    }
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  const float power = __uint_as_float(__float_as_uint(largest) & 0x7F800000u);
  if (power > 0.0f && power < __uint_as_float(0x7F800000u)) query.factor = power;
  const float inverse = 1.0f / query.factor;
  for (int i = 0; i < K_LOADS; i++)
    for (int j = 0; j < CHUNK / 2; j++) {
      const u32 pair = query.pairs[i][j];
      query.pairs[i][j] = to_pair<false>(low_bf16(pair) * inverse, high_bf16(pair) * inverse);
    }
}

// ---- sixteen tokens ----

struct Keys {
  Vec16 chunks[2][K_LOADS];
  float scales[4];
};

struct Values {
  Vec16 chunks[4][V_LOADS];
  float scales[4];
};

// Tokens of a lane's columns of scores: 2t, 2t + 1, 2t + 8, 2t + 9.
inline int column(int t, int j) { return 2 * t + (j & 1) + 4 * (j & 2); }

struct Place {  // of sixteen tokens
  long long scales;
  int first, start, stop;  // its first token; those from `start` on and before `stop` are read
};

inline bool is_read(const Place& place, int token) {
  return place.first + token >= place.start && place.first + token < place.stop;
}

inline void load_scales(float (&scales)[4], const float* from, const Place& place, int t) {
  if constexpr (PER_TOKEN)
    for (int j = 0; j < 4; j++) {
      scales[j] = 1.0f;
      if (is_read(place, column(t, j))) scales[j] = __ldg(from + place.scales + column(t, j));
    }
}

inline void load_keys(Keys& keys, const Params& p, const Place& place, long long at, int g, int t) {
  for (int half = 0; half < 2; half++) {
    const int token = g + 8 * half;
    const u8* from = p.k + at + token * p.token_stride;
    for (int i = 0; i < K_LOADS; i++) {
      keys.chunks[half][i] = nothing();
      if (is_read(place, token) && t + 4 * i < CHUNKS) keys.chunks[half][i] = load_streaming(from + 16 * (t + 4 * i));
    }
  }
  load_scales(keys.scales, p.k_scale, place, t);
}

inline void load_values(Values& values, const Params& p, const Place& place, long long at, int g, int t) {
  for (int j = 0; j < 4; j++) {
    const int token = column(t, j);
    const u8* from = p.v + at + token * p.token_stride;
    for (int i = 0; i < V_LOADS; i++) {
      values.chunks[j][i] = nothing();
      if (is_read(place, token) && g + 8 * i < CHUNKS) values.chunks[j][i] = load_streaming(from + 16 * (g + 8 * i));
    }
  }
  load_scales(values.scales, p.v_scale, place, t);
}

// Scores of rows g, g + 8 with columns 2t, 2t + 1 (+ 8 in the second).
inline void multiply_keys(float (&scores)[2][4], const Query (&queries)[HALVES], const Keys& keys) {
  for (int half = 0; half < 2; half++)
    for (int j = 0; j < 4; j++) scores[half][j] = 0.0f;
  for (int i = 0; i < K_LOADS; i++)
    for (int half = 0; half < 2; half++)
      for (int step = 0; step < CHUNK / 4; step++) {
        u32 b0, b1;
        if constexpr (IS_CODE) {
          to_halves(keys.chunks[half][i].w[step], b0, b1);
        } else {
          b0 = keys.chunks[half][i].w[2 * step], b1 = keys.chunks[half][i].w[2 * step + 1];
        }
        const u32 a0 = queries[0].pairs[i][2 * step], a2 = queries[0].pairs[i][2 * step + 1];
        const u32 a1 = HALVES == 2 ? queries[HALVES - 1].pairs[i][2 * step] : 0;
        const u32 a3 = HALVES == 2 ? queries[HALVES - 1].pairs[i][2 * step + 1] : 0;
        mma(scores[half], a0, a1, a2, a3, b0, b1);
      }
}

// Sums of rows 2t, 2t + 1 (+ 8 in the second), transposed: the elements of v are the left operand's rows, two at a time.
inline void multiply_values(float (&sums)[HALVES][PAIRS][4], const u32 (&p)[HALVES][2], const Values& values) {
  for (int i = 0; i < V_LOADS; i++)
    for (int word = 0; word < 4; word++) {
      constexpr int ELEMENTS = CHUNK / 4;
      u32 first[4], second[4];  // pairs of tokens 2t, 2t + 1 and of 2t + 8, 2t + 9, an element each
      const u32 a = values.chunks[0][i].w[word], b = values.chunks[1][i].w[word];
      const u32 c = values.chunks[2][i].w[word], d = values.chunks[3][i].w[word];
      if constexpr (IS_CODE) {
        to_halves(permute(a, b, 0x5140), first[0], first[1]);
        to_halves(permute(a, b, 0x7362), first[2], first[3]);
        to_halves(permute(c, d, 0x5140), second[0], second[1]);
        to_halves(permute(c, d, 0x7362), second[2], second[3]);
      } else {
        first[0] = permute(a, b, 0x5410), first[1] = permute(a, b, 0x7632);
        second[0] = permute(c, d, 0x5410), second[1] = permute(c, d, 0x7632);
      }
      for (int e = 0; e < ELEMENTS; e += 2)
        for (int half = 0; half < HALVES; half++)
          mma(sums[half][(i * CHUNK + word * ELEMENTS + e) / 2], first[e], first[e + 1], second[e], second[e + 1],
              p[half][0], p[half][1]);
    }
}

// ---- a sequence ----

struct Lengths {
  int all, added, first_row;  // tokens, new ones among them, row of the first of these
};

inline Lengths read_lengths(const Params& p, int sequence) {
  Lengths lengths;
  lengths.all = load_number(p.lengths + sequence);
  lengths.first_row = load_number(p.first_rows + sequence);
  lengths.added = load_number(p.first_rows + sequence + 1) - lengths.first_row;
  return lengths;
}

// The first token that a row sees.
inline int start_of(const Params& p, const Lengths& lengths) {
  return WINDOW ? max(lengths.all - lengths.added - p.window + 1, 0) : 0;
}

inline long long codes_at(const Params& p, int head, int number, int unit) {
  return number * p.block_stride + head * p.head_stride + unit * 16 % BLOCK_SIZE * p.token_stride;
}

inline long long scales_at(int num_heads, int head, int number, int unit) {
  return (static_cast<long long>(number) * num_heads + head) * BLOCK_SIZE + unit * 16 % BLOCK_SIZE;
}

// A warp's first keys and values into the L2 cache while the kernel in front still runs. Everything is read again
// afterwards: numbers that are not the right ones yet only fetch in vain.
inline void fetch_early(
    const Params& p, const int* table, const Lengths& lengths, int head, int num_heads, int unit, int lane) {
  constexpr int UNITS = BLOCK_SIZE / 16;
  unit += start_of(p, lengths) / 16;
  if (unit > lengths.all / 16 || unit >= p.table_width * UNITS) return;
  const int number = load_number(table + unit / UNITS);
  if (number < 0 || number >= p.num_blocks) return;
  constexpr int LINES = (CHUNKS + 7) / 8;  // of a token
  const long long at = codes_at(p, head, number, unit);
  for (int i = lane; i < 16 * LINES; i += 32) {
    const long long line = at + i / LINES * p.token_stride + i % LINES * 128;
    fetch_into_l2(p.k + line);
    fetch_into_l2(p.v + line);
  }
  if (PER_TOKEN && lane < 2) fetch_into_l2((lane ? p.v_scale : p.k_scale) + scales_at(num_heads, head, number, unit));
}

// ---- the kernel ----

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) decode(const __grid_constant__ Params p) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, num_heads = gridDim.y, sequence = blockIdx.z;
  const u32 block = block_of_cluster();
  const u32 arrived = shared_address(&shared.arrived);
  if constexpr (CLUSTER > 1) {  // all blocks have started, with their barriers, before one writes into another
    if (threadIdx.x == 0) {
      barrier_init(arrived, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_arrive();
  }
  constexpr int STEP = CLUSTER * WARPS;
  const int* table = p.table + static_cast<long long>(sequence) * p.table_stride;
  fetch_early(p, table, read_lengths(p, sequence), head, num_heads, block * WARPS + warp, lane);
  wait_for_previous();
  launch_dependents();

  int first_unit = block * WARPS + warp, number = 0;
  if constexpr (!WINDOW)  // before it is known whether the sequence is that long
    if (first_unit * 16 / BLOCK_SIZE < p.table_width) number = load_number(table + first_unit * 16 / BLOCK_SIZE);
  const Lengths lengths = read_lengths(p, sequence);
  const int length = lengths.all, first_row = lengths.first_row, q_len = lengths.added;
  const int start = start_of(p, lengths), num_rows = min(q_len * p.group, ROWS);
  const int stop_unit = num_rows ? (length + 15) / 16 : 0;
  const auto block_number = [&](int unit) {
    return unit < stop_unit ? load_number(table + unit * 16 / BLOCK_SIZE) : 0;
  };
  const auto place_of = [&](int unit, int number) {
    Place place;
    place.first = unit * 16, place.start = start, place.stop = unit < stop_unit ? length : 0;
    place.scales = scales_at(num_heads, head, number, unit);
    return place;
  };
  if constexpr (WINDOW) {
    first_unit += start / 16;
    number = block_number(first_unit);
  }
  int numbers[SPAN];  // of the blocks of the next tokens
  for (int i = 0; i < SPAN; i++) numbers[i] = i ? block_number(first_unit + i * STEP) : number;

  Query queries[HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const int row = g + 8 * half;
    const u16* at = p.q + (first_row + row / p.group) * p.q_stride + (head * p.group + row % p.group) * p.query_stride;
    load_query(queries[half], at, row < num_rows, t);
  }
  Place places[SPAN];
  Keys keys[SPAN];
  Values values[SPAN];
  for (int i = 0; i < SPAN; i++) {
    const int unit = first_unit + i * STEP;
    places[i] = place_of(unit, numbers[i]);
    load_keys(keys[i], p, places[i], codes_at(p, head, numbers[i], unit), g, t);
    load_values(values[i], p, places[i], codes_at(p, head, numbers[i], unit), g, t);
    numbers[i] = block_number(unit + SPAN * STEP);
  }

  int position[HALVES];
  float row_scale[HALVES], maximum[HALVES], total[HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const int row = g + 8 * half;
    if constexpr (IS_CODE && Q_KIND == BF16) normalise(queries[half]);
    position[half] = row < num_rows ? length - q_len + row / p.group : -1;
    row_scale[half] = queries[half].factor * p.softmax_scale;
    if constexpr (IS_CODE && !PER_TOKEN) row_scale[half] *= __ldg(p.k_scale + head);
    maximum[half] = NOTHING, total[half] = 0.0f;
  }
  float sums[HALVES][PAIRS][4] = {};

  for (int first = first_unit; first < stop_unit; first += SPAN * STEP) {
#pragma unroll
    for (int i = 0; i < SPAN; i++) {
      const int unit = first + i * STEP, next_unit = unit + SPAN * STEP;
      if (unit >= stop_unit) break;
      float scores[2][4], key_scales[4];
      multiply_keys(scores, queries, keys[i]);
      for (int j = 0; j < 4; j++) key_scales[j] = keys[i].scales[j];
      const Place place = places[i];
      const long long next_at = codes_at(p, head, numbers[i], next_unit);
      places[i] = place_of(next_unit, numbers[i]);
      load_keys(keys[i], p, places[i], next_at, g, t);

      u32 probabilities[HALVES][2];
      float inverse[4], logs[4];
      if constexpr (PER_TOKEN)
        for (int j = 0; j < 4; j++) {
          const float scale = fmaxf(values[i].scales[j], 1e-30f);
          inverse[j] = __fdividef(1.0f, scale), logs[j] = log2_of(scale);
        }
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        float s[4];
        float largest = NOTHING;
        for (int j = 0; j < 4; j++) {
          s[j] = scores[j / 2][2 * half + j % 2] * row_scale[half];
          if constexpr (PER_TOKEN) s[j] *= key_scales[j];
          if constexpr (CAP) {  // tanh
            s[j] = p.soft_cap * (1.0f - 2.0f / (exp2_of(s[j] * (2 * 1.4426950408889634f / p.soft_cap)) + 1.0f));
          }
          const int token = place.first + column(t, j);
          bool is_seen = token <= position[half] && token >= start;
          if constexpr (WINDOW) is_seen = is_seen && token > position[half] - p.window;
          if constexpr (PER_TOKEN) s[j] += logs[j];
          s[j] = is_seen ? s[j] : -__uint_as_float(0x7F800000u);
          largest = fmaxf(largest, s[j]);
        }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float next_maximum = fmaxf(maximum[half], largest);
        const float shrink = exp2_of(maximum[half] - next_maximum);
        maximum[half] = next_maximum;
        total[half] *= shrink;
        for (int j = 0; j < 4; j++) {
          s[j] = exp2_of(s[j] - next_maximum);
          total[half] += PER_TOKEN ? s[j] * inverse[j] : s[j];
        }
        probabilities[half][0] = to_pair<IS_BF16>(s[0], s[1]);
        probabilities[half][1] = to_pair<IS_BF16>(s[2], s[3]);
        const float shrinks[2] = {__shfl_sync(~0u, shrink, 8 * t), __shfl_sync(~0u, shrink, 8 * t + 4)};
        for (int pair = 0; pair < PAIRS; pair++)
          for (int e = 0; e < 4; e++) sums[half][pair][e] *= shrinks[e % 2];
      }
      multiply_values(sums, probabilities, values[i]);
      load_values(values[i], p, places[i], next_at, g, t);
      numbers[i] = block_number(next_unit + SPAN * STEP);
    }
  }

#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    total[half] += __shfl_xor_sync(~0u, total[half], 1);
    total[half] += __shfl_xor_sync(~0u, total[half], 2);
    if (t == 0) shared.maxima[warp][g + 8 * half] = maximum[half], shared.totals[warp][g + 8 * half] = total[half];
    for (int pair = 0; pair < PAIRS; pair++)
      for (int e = 0; e < 4; e++) {
        const int row = 8 * half + 2 * t + e % 2, place = 2 * pair + e / 2;  // of the lane's elements
        const int element = (g + 8 * (place / CHUNK)) * CHUNK + place % CHUNK;
        if (row < num_rows && element < D) shared.sums[warp][row][element] = sums[half][pair][e];
      }
  }
  __syncthreads();
  if constexpr (CLUSTER > 1) cluster_wait();
  const int owned = num_rows * D / CLUSTER;  // elements of the result that a block adds up
  if (CLUSTER > 1 && threadIdx.x == 0) barrier_expect(arrived, CLUSTER * 4 * (owned + 2 * num_rows));
  for (int i = threadIdx.x; i < num_rows * D; i += 32 * WARPS) {
    const int row = i / D, element = i % D;
    float largest = NOTHING, sum = 0.0f, whole = 0.0f;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.maxima[w][row]);
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_of(shared.maxima[w][row] - largest);
      sum += weight * shared.sums[w][row][element];
      whole += weight * shared.totals[w][row];
    }
    send(&shared.parts[block][i % owned], arrived, i / owned, sum);
    if (element < CLUSTER) {  // to every block
      send(&shared.part_maxima[block][row], arrived, element, largest);
      send(&shared.part_totals[block][row], arrived, element, whole);
    }
  }
  if constexpr (CLUSTER > 1) {
    barrier_wait(arrived, 0);
  } else {
    __syncthreads();
  }
  const float value_scale = IS_CODE && !PER_TOKEN ? __ldg(p.v_scale + head) : 1.0f;
  for (int i = threadIdx.x; i < owned; i += 32 * WARPS) {
    const int row = (block * owned + i) / D, element = (block * owned + i) % D;
    float largest = NOTHING, sum = 0.0f, whole = 0.0f;
    for (int c = 0; c < CLUSTER; c++) largest = fmaxf(largest, shared.part_maxima[c][row]);
    for (int c = 0; c < CLUSTER; c++) {
      const float weight = exp2_of(shared.part_maxima[c][row] - largest);
      sum += weight * shared.parts[c][i];
      whole += weight * shared.part_totals[c][row];
    }
    const float result = sum / (whole > 0.0f ? whole : 1.0f) * value_scale;
    const long long token = first_row + row / p.group;
    const long long at = (token * num_heads * p.group + head * p.group + row % p.group) * D + element;
    p.out[at] = static_cast<u16>(to_pair<Q_KIND == BF16>(result, 0.0f) & 0xFFFFu);
  }
}
