// y [M, N] = x [M, K] · wᵀ [N, K] for few rows M, bound by the bytes of w.
//
//   a block, persistent:  a producer warp streams strips of 16 rows of w through a ring in shared memory (bulk copies);
//                         WARPS consumer warps share the columns of a stage in pairs of blocks, multiply on tensor cores with w as the
//                         left operand (16 rows of w x 8 rows of x), and add up their sums in a fixed order
//
//   stage   STRIPS times  | w: 16 rows x 64 BLOCKS columns | scales: [groups][16] | zero points: [groups][16] |
//
// STRIPS strips at a time share what is read of x, which would otherwise keep L1 busier than the weights do.
//
// The ring is full of weights before x is there: with dependent launch the producer starts while the kernel in front
// still runs. Which columns a lane holds: docs/kernels.md, the same for all formats.
//
// Definitions: W_KIND X_KIND Y_KIND SCALE_KIND (common.cuh), W_BITS, GROUP (0: scale per row), ZERO (zero points),
// TILES (8 rows of x each), STRIPS, WARPS, BLOCKS, STAGES, VECTOR_X (eight values of x are one load: K is a
// multiple of 8 and rows start at multiples of 16 bytes).

#include "common.cuh"

struct Params {
  void* y;
  const void* x;
  const u8* w;
  const u8* scale;    // GROUP: [strips][groups][16] of SCALE_KIND; else f32 [N]
  const u8* zero;     // ZERO: i8 [strips][groups][16]
  const void* bias;   // Y_KIND [N], or null
  const float* x_scale;  // [M] with stride x_scale_step, or null
  const float* x_zero;   // likewise: zero points of x, or null
  const float* w_sum;    // [N]: sum of each row of the dequantized w; read with x_zero
  int num_rows, n, k, x_stride, y_stride, x_scale_step;
  int w_stride;  // bytes from a row of w to the next (row-major formats); a multiple of 16, as the length of a row is
  int num_strips, num_blocks, num_groups;
};

constexpr bool IS_PACKED = W_BITS == 4;
constexpr bool IS_INTEGER = X_KIND == INT;
constexpr bool IS_BF16 = X_KIND == BF16;
constexpr int A_KIND = IS_BF16 ? BF16 : F16;  // of what the tensor core multiplies; e4m3 becomes fp16
constexpr int ROW_BYTES = BLOCKS * 64 * W_BITS / 8;        // of a stage, row-major
constexpr int ROW_PITCH = ROW_BYTES + (W_BITS == 8 ? 32 : 64);  // rows of a quarter warp fall into different banks
constexpr int W_BYTES = IS_PACKED ? BLOCKS * 512 : 16 * ROW_PITCH;
constexpr int STAGE_GROUPS = GROUP ? BLOCKS * 64 / GROUP : 0;
constexpr int SCALE_SIZE = SCALE_KIND == F32 ? 4 : 2;
constexpr int SCALE_BYTES = STAGE_GROUPS * 16 * SCALE_SIZE;
constexpr int ZERO_BYTES = ZERO ? STAGE_GROUPS * 16 : 0;
constexpr int STRIP_BYTES = (W_BYTES + SCALE_BYTES + ZERO_BYTES + 127) / 128 * 128;
constexpr int STAGE_BYTES = STRIPS * STRIP_BYTES;
constexpr bool AHEAD = TILES < 4;  // x is loaded one pair ahead, as far as there are registers
// two pairs at a time, where that leaves no register in memory
constexpr int UNROLL = __CUDA_ARCH__ == 900 || TILES * STRIPS < 4 ? 2 : 1;
constexpr int SUM_PITCH = 10;  // floats of a row of 8 sums
constexpr int SUM_FLOATS = TILES * 16 * SUM_PITCH;  // of a warp and a strip
constexpr int BUFFERS = STRIPS * TILES > 2 ? 1 : 2;  // of sums
static_assert(!ZERO || W_BITS == 4 || (W_BITS == 8 && !IS_INTEGER), "zero points of what");
static_assert(!ZERO || GROUP, "zero points come in groups");
// a warp takes pairs of blocks: 128 columns, the largest group; x is loaded ahead as if all stages were one run of pairs
static_assert(BLOCKS % (2 * WARPS) == 0, "the same pairs of each stage are a warp's");

#if X_KIND == INT
using Sum = int;
#else
using Sum = float;
#endif

constexpr int X_SIZE = X_KIND == BF16 || X_KIND == F16 ? 2 : 1;

// A lane's eight values of a half block (32 columns) of x: as they are in memory, and as the tensor core takes them.
struct alignas(8 * X_SIZE) Raw {
  u32 w[2 * X_SIZE];
};
struct Half {
  u32 w[IS_INTEGER ? 2 : 4];
};

// ---- conversions ----

// Four codes of 4 bits, less their zero point, as bytes: columns 0 2 1 3.
inline u32 bytes_of_4(u32 w, u32 zero) { return (select_or(w, 0x0F0F0F0F, 0x80808080) - zero) ^ 0x80808080; }

// ---- products: 16 rows of w times 8 rows of x, 16 columns (integers: 32) ----

inline void multiply(Sum (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if X_KIND == INT
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif X_KIND == BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// ---- x ----

// Where a lane reads x: row `row`, or the last one where there are fewer (what comes of it is not written).
inline const u8* x_row(const Params& p, int row) {
  return static_cast<const u8*>(p.x) + static_cast<long long>(min(row, p.num_rows - 1)) * p.x_stride * X_SIZE;
}

// Eight values from column `column` on. IS_WHOLE: all of them exist; else zero for those that do not.
template <bool IS_WHOLE>
inline Raw load_x(const Params& p, const u8* row, int column) {
  Raw raw = {};
  const u8* at = row + column * X_SIZE;
  if constexpr (VECTOR_X) {
    if (IS_WHOLE || column < p.k) raw = *reinterpret_cast<const Raw*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + i >= p.k) continue;
      u32 value = X_SIZE == 2 ? reinterpret_cast<const u16*>(at)[i] : at[i];
      raw.w[i * X_SIZE / 4] |= value << (i * X_SIZE % 4 * 8);
    }
  }
  return raw;
}

// When it is used, not when it is loaded: who converts waits for the load.
inline Half to_half(const Raw& raw) {
  Half half;
#pragma unroll
  for (int i = 0; i < (IS_INTEGER ? 2 : 4); i++) {
    if constexpr (X_KIND == E4M3)
      half.w[i] = e4m3_to_f16(raw.w[i / 2], i % 2 * 2);
    else
      half.w[i] = IS_INTEGER && IS_PACKED ? __byte_perm(raw.w[i], 0, 0x3120) : raw.w[i];
  }
  return half;
}

// ---- one half block: 32 columns of the strip ----

// Zero points of rows g and g + 8, in the form that `multiply_half` subtracts.
struct Zeros {
  u32 low, high;
};

// An integer of up to eight bits and a sign, exact, twice.
inline u32 pair_of_integer(int value) {
  return narrow2<A_KIND>(static_cast<float>(value), static_cast<float>(value));
}

inline Zeros zeros_at(const u8* zeros, int group, int g) {
  int low = 0, high = 0;
  if constexpr (ZERO) {
    low = static_cast<signed char>(zeros[group * 16 + g]);
    high = static_cast<signed char>(zeros[group * 16 + g + 8]);
  }
  if constexpr (!IS_PACKED) return ZERO ? Zeros{pair_of_integer(low), pair_of_integer(high)} : Zeros{};
  low += 8, high += 8;
  if constexpr (IS_INTEGER) return {low * 0x01010101u, high * 0x01010101u};
  constexpr u32 magic = IS_BF16 ? 0x43004300 : 0x64006400;
  return {magic + low * 0x00010001u, magic + high * 0x00010001u};
}

inline void multiply_half(Sum (&sums)[TILES][4], const u32 (&low)[W_BITS / 2], const u32 (&high)[W_BITS / 2],
                          Zeros zero, const Half (&x)[TILES]) {
  if constexpr (IS_PACKED && IS_INTEGER) {
    u32 a0 = bytes_of_4(low[0], zero.low), a1 = bytes_of_4(low[0] >> 4, zero.high);
    u32 a2 = bytes_of_4(low[1], zero.low), a3 = bytes_of_4(low[1] >> 4, zero.high);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], a0, a1, a2, a3, x[tile].w[0], x[tile].w[1]);
  } else if constexpr (IS_INTEGER) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      multiply(sums[tile], low[0], high[0], low[1], high[1], x[tile].w[0], x[tile].w[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 a[4];
      if constexpr (IS_PACKED) {
        constexpr u32 magic = IS_BF16 ? 0x43004300 : 0x64006400;
#pragma unroll
        for (int r = 0; r < 4; r++)
          a[r] = sub2<A_KIND>(select_or(low[i] >> (4 * r), 0x000F000F, magic), r % 2 ? zero.high : zero.low);
      } else if constexpr (W_BITS == 8) {
        a[0] = pair_of_8<W_KIND, A_KIND>(low[i], 0), a[1] = pair_of_8<W_KIND, A_KIND>(high[i], 0);
        a[2] = pair_of_8<W_KIND, A_KIND>(low[i], 2), a[3] = pair_of_8<W_KIND, A_KIND>(high[i], 2);
        if constexpr (ZERO)  // at most 255 apart: exact
#pragma unroll
          for (int r = 0; r < 4; r++) a[r] = sub2<A_KIND>(a[r], r % 2 ? zero.high : zero.low);
      } else {
        a[0] = low[2 * i], a[1] = high[2 * i], a[2] = low[2 * i + 1], a[3] = high[2 * i + 1];
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        multiply(sums[tile], a[0], a[1], a[2], a[3], x[tile].w[2 * i % 4], x[tile].w[(2 * i + 1) % 4]);
    }
  }
}

// Codes of rows g and g + 8 in half h of a block of the stage.
inline void load_codes(u32 (&low)[W_BITS / 2], u32 (&high)[W_BITS / 2], const u8* stage, int block, int h, int lane) {
  if constexpr (IS_PACKED) {  // one word has both rows
    const u32* at = reinterpret_cast<const u32*>(stage + block * 512 + lane * 16) + 2 * h;
    low[0] = at[0], low[1] = at[1];
  } else {
    constexpr int BYTES = W_BITS;  // of eight codes
    const u8* at = stage + (lane >> 2) * ROW_PITCH + (block * 64 + h * 32 + (lane & 3) * 8) * (W_BITS / 8);
    const u8* below = at + 8 * ROW_PITCH;
#pragma unroll
    for (int i = 0; i < BYTES / 8; i++) {
      u64 a = reinterpret_cast<const u64*>(at)[i], b = reinterpret_cast<const u64*>(below)[i];
      low[2 * i] = static_cast<u32>(a), low[2 * i + 1] = static_cast<u32>(a >> 32);
      high[2 * i] = static_cast<u32>(b), high[2 * i + 1] = static_cast<u32>(b >> 32);
    }
  }
}

inline void add_scaled(float (&total)[TILES][4], Sum (&sums)[TILES][4], float low, float high) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      total[tile][i] += static_cast<float>(sums[tile][i]) * (i < 2 ? low : high);
      sums[tile][i] = 0;
    }
}

// ---- the two roles ----

struct Ring {
  u32 full, empty;  // first barriers of each kind
  int stage = 0;
  u32 parity = 0;

  void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// One strip's part of a stage.
inline void fetch_strip(const Params& p, u32 to, u32 full, int strip, int first, int lane, u64 policy) {
  const int blocks = min(BLOCKS, p.num_blocks - first);
  int group = 0, groups = 0;
  if constexpr (GROUP) {
    group = first * 64 / GROUP;
    groups = min(STAGE_GROUPS, p.num_groups - group);
  }
  const int rows = min(16, p.n - strip * 16);
  const int row_bytes = min(ROW_BYTES, (p.k * W_BITS / 8 + 15) / 16 * 16 - first * 64 * W_BITS / 8);
  const u32 bytes = IS_PACKED ? blocks * 512 : rows * row_bytes;
  if (lane == 0) {
    barrier_add_expected(full, bytes + groups * 16 * (SCALE_SIZE + ZERO));
    long long at = (static_cast<long long>(strip) * p.num_groups + group) * 16;
    if constexpr (IS_PACKED)
      bulk_copy(to, p.w + (static_cast<long long>(strip) * p.num_blocks + first) * 512, bytes, full, policy);
    if constexpr (GROUP)
      bulk_copy(to + W_BYTES, p.scale + at * SCALE_SIZE, groups * 16 * SCALE_SIZE, full, policy);
    if constexpr (ZERO) bulk_copy(to + W_BYTES + SCALE_BYTES, p.zero + at, groups * 16, full, policy);
  }
  if constexpr (!IS_PACKED) {
    __syncwarp();
    if (lane < rows) {
      const u8* row = p.w + (static_cast<long long>(strip) * 16 + lane) * p.w_stride;
      bulk_copy(to + lane * ROW_PITCH, row + first * 64 * W_BITS / 8, row_bytes, full, policy);
    }
  }
}

inline void produce(const Params& p, u8* memory, Ring ring, int lane) {
  u64 policy = evict_first();
  for (int unit = blockIdx.x * STRIPS; unit < p.num_strips; unit += gridDim.x * STRIPS) {
    for (int first = 0; first < p.num_blocks; first += BLOCKS) {
      u32 full = ring.full + ring.stage * 8;
      u32 to = shared_address(memory + ring.stage * STAGE_BYTES);
      barrier_wait(ring.empty + ring.stage * 8, ring.parity ^ 1);
#pragma unroll
      for (int r = 0; r < STRIPS; r++)
        if (unit + r < p.num_strips) fetch_strip(p, to + r * STRIP_BYTES, full, unit + r, first, lane, policy);
      __syncwarp();
      if (lane == 0) barrier_arrive(full);
      ring.next();
    }
  }
}

// x for a pair of blocks.
struct Pair {
  Raw raw[4][TILES];
};

template <bool IS_WHOLE>
inline void load_pair(Pair& x, const Params& p, const u8* const (&rows)[TILES], int block, int t) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      x.raw[i][tile] = load_x<IS_WHOLE>(p, rows[tile], block * 64 + i * 32 + t * 8);
}

// Adds one pair of blocks, `block` of the stage whose first is `first`, to the sums of the strip. IS_WHOLE: all of its
// columns exist.
template <bool IS_WHOLE>
inline void multiply_pair(const Params& p, const u8* stage, int first, int block, const Pair& x, int lane,
                          Sum (&sums)[STRIPS][TILES][4], float (&total)[STRIPS][TILES][4]) {
  const int g = lane >> 2, t = lane & 3;
  Half half[TILES];
#pragma unroll
  for (int j = 0; j < 4 * STRIPS; j++) {
    const int i = j / STRIPS, r = j % STRIPS;
    if (r == 0)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) half[tile] = to_half(x.raw[i][tile]);
    const u8 *strip = stage + r * STRIP_BYTES, *scales = strip + W_BYTES, *zeros = scales + SCALE_BYTES;
    int column = (first + block) * 64 + i * 32;
    if (!IS_WHOLE && column >= p.k) break;
    u32 low[W_BITS / 2], high[W_BITS / 2];
    load_codes(low, high, strip, block + i / 2, i % 2, lane);
    if constexpr (!IS_WHOLE && !IS_PACKED)  // past the last column lies what an earlier stage left
      if (column + t * 8 >= p.k)
#pragma unroll
        for (int c = 0; c < W_BITS / 2; c++) low[c] = high[c] = 0;
    int group = GROUP ? (block * 64 + i * 32) / (GROUP ? GROUP : 1) : 0;
    multiply_half(sums[r], low, high, zeros_at(zeros, group, g), half);
    if constexpr (GROUP)
      if ((i * 32 + 32) % (GROUP ? GROUP : 1) == 0 || (!IS_WHOLE && GROUP > 32 && column + 32 >= p.k))
        add_scaled(total[r], sums[r], value_at<SCALE_KIND>(scales, group * 16 + g),
                   value_at<SCALE_KIND>(scales, group * 16 + g + 8));
  }
}

// The sums of a unit's strips over this warp's columns. x: of this warp's first pair, which every unit has.
inline void consume_unit(const Params& p, const u8* memory, Ring& ring, Pair& x, const u8* const (&rows)[TILES],
                         int warp, int lane, float (&total)[STRIPS][TILES][4]) {
  Sum sums[STRIPS][TILES][4] = {};
  const int t = lane & 3, whole = p.k / 128 * 2;  // blocks of whole pairs
  for (int first = 0; first < p.num_blocks; first += BLOCKS) {
    const int end = min(BLOCKS, whole - first);
    const u8* stage = memory + ring.stage * STAGE_BYTES;
    barrier_wait(ring.full + ring.stage * 8, ring.parity);
    int block = 2 * warp;
#pragma unroll UNROLL
    for (; block < end; block += 2 * WARPS) {
      if constexpr (AHEAD) {
        int next = first + (block + 2 * WARPS < BLOCKS ? block + 2 * WARPS : BLOCKS + 2 * warp);
        Pair now = x;
        load_pair<true>(x, p, rows, next < whole ? next : 2 * warp < whole ? 2 * warp : 0, t);
        multiply_pair<true>(p, stage, first, block, now, lane, sums, total);
      } else {
        load_pair<true>(x, p, rows, first + block, t);
        multiply_pair<true>(p, stage, first, block, x, lane, sums, total);
      }
    }
    if (block < BLOCKS && first + block < p.num_blocks) {  // the last columns, no whole pair: one warp has them
      Pair rest;
      load_pair<false>(rest, p, rows, first + block, t);
      multiply_pair<false>(p, stage, first, block, rest, lane, sums, total);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + ring.stage * 8);
    ring.next();
  }
#pragma unroll
  for (int r = 0; r < STRIPS && !GROUP; r++) add_scaled(total[r], sums[r], 1.0f, 1.0f);
}

// Leaves this warp's sums for all to add up.
inline void leave_sums(float* sums, const float (&total)[STRIPS][TILES][4], int lane) {
#pragma unroll
  for (int j = 0; j < STRIPS * TILES; j++) {
    const float(&from)[4] = total[j / TILES][j % TILES];
    float* at = sums + (j * 16 + (lane >> 2)) * SUM_PITCH + (lane & 3) * 2;
    at[0] = from[0], at[1] = from[1];
    at[8 * SUM_PITCH] = from[2], at[8 * SUM_PITCH + 1] = from[3];
  }
}

// Adds up what the warps left, in their order, and writes y.
inline void write_unit(const Params& p, const float* sums, int unit, int thread) {
  for (int i = thread; i < STRIPS * TILES * 128; i += WARPS * 32) {
    int row = i % 16, column = i / 16 % 8, tile = i / 128 % TILES, r = i / 128 / TILES;
    int m = tile * 8 + column, n = (unit + r) * 16 + row;
    if (m >= p.num_rows || n >= p.n) continue;
    const float* at = sums + ((r * TILES + tile) * 16 + row) * SUM_PITCH + column;
    float value = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) value += at[warp * STRIPS * SUM_FLOATS];
    if constexpr (!GROUP)
      if (p.scale) value *= reinterpret_cast<const float*>(p.scale)[n];
    if (p.x_zero) value -= p.x_zero[m * p.x_scale_step] * p.w_sum[n];
    if (p.x_scale) value *= p.x_scale[m * p.x_scale_step];
    if (p.bias) value += value_at<Y_KIND>(p.bias, n);
    static_cast<u16*>(p.y)[static_cast<long long>(m) * p.y_stride + n] = narrow<Y_KIND>(value);
  }
}

inline void wait_for_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 1) skinny(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 memory[];
  float* sums = reinterpret_cast<float*>(memory + STAGES * STAGE_BYTES);
  u32 barriers = shared_address(sums + BUFFERS * WARPS * STRIPS * SUM_FLOATS);
  Ring ring{barriers, barriers + STAGES * 8};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(ring.full + stage * 8, 1);
      barrier_init(ring.empty + stage * 8, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  launch_dependents();
  if (warp == WARPS) {
    produce(p, memory, ring, lane);
    return;
  }
  wait_for_previous();
  const u8* rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) rows[tile] = x_row(p, tile * 8 + (lane >> 2));
  Pair x;
  if (AHEAD && 2 * warp < p.k / 128 * 2) load_pair<true>(x, p, rows, 2 * warp, lane & 3);
  int turn = 0;
  for (int unit = blockIdx.x * STRIPS; unit < p.num_strips; unit += gridDim.x * STRIPS, turn ^= 1) {
    float total[STRIPS][TILES][4] = {};
    consume_unit(p, memory, ring, x, rows, warp, lane, total);
    float* buffer = sums + (BUFFERS == 2 ? turn * WARPS * STRIPS * SUM_FLOATS : 0);
    leave_sums(buffer + warp * STRIPS * SUM_FLOATS, total, lane);
    wait_for_consumers();
    write_unit(p, buffer, unit, threadIdx.x);
    if constexpr (BUFFERS == 1) wait_for_consumers();  // with two, the next unit's barrier says that this is read
  }
}
