// y [M, N] = x [M, K] · wᵀ [N, K], both in codes of 8 bits, M ≤ 64, bound by the bytes of w: tensor cores (wgmma) read both
// from shared memory as they lie on disk.
//
//   a block      tile after tile: TILE_ROWS rows of w, all columns, all of x
//   two threads  stream w and x through rings of their own (tensor maps); w starts before x is there (dependent launch)
//   warpgroups   64 rows each (those past the tile's are multiplied and forgotten), every K_GROUPS-th box of 128 columns
//
//   w ring  W_STAGES × BOXES × [TILE_ROWS][128]     x ring  X_STAGES × X_BOXES × [M_TILE][128]      128-byte swizzle
//
// A tensor core's own sum of FP8 products keeps 14 bits: every 128 columns it goes to float32. Sums of warpgroups are added
// in their order.
//
// Definitions: IS_INT8 (else e4m3), IN_BLOCKS (scales of 128 × 128 of w and of 128 columns of x), Y_KIND (0: bf16, 1: fp16,
// 2: fp32), M_TILE (8, 16, 32, 64), TILE_ROWS (a multiple of 16, at most 256), K_GROUPS, X_BOXES (a multiple of it: of a
// slot of x), BOXES (a multiple of that: of a slot of w), W_STAGES, X_STAGES.

#include "common.cuh"

#if IS_INT8
using Sum = int;
using Sum4 = int4;
#else
using Sum = float;
using Sum4 = float4;
#endif

struct alignas(64) TensorMap {
  u64 words[16];
};

struct Params {
  TensorMap w, x;             // boxes of [TILE_ROWS][128] and [M_TILE][128]
  void* y;                    // [M][N]
  const float* w_scale;       // [N]; IN_BLOCKS: [ceil(N / 128)][num_blocks]
  const float* x_scale;       // [M], x_scale_step apart; IN_BLOCKS: [M][num_blocks]
  const signed char* x_zero;  // like x_scale, or null
  const int* w_sum;           // [N]: of the codes of a row; read with x_zero
  const void* bias;           // [N] like y, or null
  int m, n, num_blocks, x_scale_step;  // num_blocks: of 128 columns
};

constexpr int ROW_GROUPS = (TILE_ROWS + 63) / 64, ROW_WARPS = TILE_ROWS / 16;
constexpr int SUMS = M_TILE / 2, PIECES = SUMS / 4;  // of a thread
constexpr int CONSUMERS = 128 * ROW_GROUPS * K_GROUPS, THREADS = CONSUMERS + 64;
constexpr int W_BOX = TILE_ROWS * 128, X_BOX = M_TILE * 128;
constexpr int W_BYTES = BOXES * W_BOX, X_BYTES = X_BOXES * X_BOX;
constexpr int X_AT = W_STAGES * W_BYTES, PARTS_AT = X_AT + X_STAGES * X_BYTES;
constexpr int W_BARRIERS_AT = PARTS_AT + (K_GROUPS - 1) * TILE_ROWS * M_TILE * 4;
constexpr int X_BARRIERS_AT = W_BARRIERS_AT + 16 * W_STAGES, FACTS_AT = X_BARRIERS_AT + 16 * X_STAGES;
static_assert(X_BOXES % K_GROUPS == 0 && BOXES % X_BOXES == 0, "every group has its boxes");

// ---- tensor maps ----

inline void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

inline u64 evict_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- tensor cores: d [64 × M_TILE] (+)= w [64 × 32] · x [M_TILE × 32]ᵀ, asynchronously ----

#if IS_INT8
#define IO "+r"
#define KINDS "k32.s32.s8.s8 "
#define TAIL ", add; }"
#else
#define IO "+f"
#define KINDS "k32.f32.e4m3.e4m3 "
#define TAIL ", add, 1, 1; }"
#endif
#define D4(i) IO(d[i]), IO(d[i + 1]), IO(d[i + 2]), IO(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#if M_TILE == 8
#define OUTPUTS D4(0)
#define OPERANDS "n8" KINDS "{%0, %1, %2, %3}, %4, %5"
#define FLAG "%6"
#elif M_TILE == 16
#define OUTPUTS D4(0), D4(4)
#define OPERANDS "n16" KINDS "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9"
#define FLAG "%10"
#elif M_TILE == 32
#define OUTPUTS D16(0)
#define OPERANDS "n32" KINDS "{" TEN() ", %10, %11, %12, %13, %14, %15}, %16, %17"
#define FLAG "%18"
#elif M_TILE == 64
#define OUTPUTS D16(0), D16(16)
#define OPERANDS "n64" KINDS "{" TEN() ", " TEN(1) ", " TEN(2) ", %30, %31}, %32, %33"
#define FLAG "%34"
#endif

// adds: 0: d is not read.
inline void multiply(Sum (&d)[SUMS], u64 w, u64 x, int adds) {
  asm volatile("{ .reg .pred add; setp.ne.s32 add, " FLAG ", 0;\nwgmma.mma_async.sync.aligned.m64" OPERANDS TAIL
               : OUTPUTS
               : "l"(w), "l"(x), "r"(adds));
}

inline void registers_are_written() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
inline void wait_for_all() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// [rows][128 bytes] in shared memory, the eight 16-byte chunks of row r in the order c ^ (r % 8).
inline u64 descriptor(u32 address) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 64ull << 32, UNUSED = 1ull << 16;
  return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address & 0x3FFFF) >> 4;
}

// ---- what a block goes over ----

struct Ring {
  u32 barriers;  // of each slot: full, empty
  int stages, slot = 0;
  u32 parity = 0;

  u32 full() const { return barriers + slot * 16; }
  u32 empty() const { return full() + 8; }
  void next() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// Tiles first, first + stride, …, each in steps of BOXES boxes.
struct Run {
  int first, stride, end, steps;

  inline Run(const Params& p)
      : first(blockIdx.x), stride(gridDim.x), end((p.n + TILE_ROWS - 1) / TILE_ROWS),
        steps((p.num_blocks + BOXES - 1) / BOXES) {}
};

inline void produce_w(const Params& p, const Run& run, u32 shared) {
  const u64 once = evict_first();
  Ring ring{shared + W_BARRIERS_AT, W_STAGES};
  for (int tile = run.first; tile < run.end; tile += run.stride)
    for (int i = 0; i < run.steps; ++i, ring.next()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), W_BYTES);
      const u32 to = shared + ring.slot * W_BYTES;
      for (int box = 0; box < BOXES; ++box)
        copy_box(to + box * W_BOX, p.w, (i * BOXES + box) * 128, tile * TILE_ROWS, ring.full(), once);
    }
}

// IN_BLOCKS: what x is multiplied by in the boxes of a slot, [X_STAGES][X_BOXES][M_TILE]; lanes load it a slot ahead.
struct SlotScales {
  static constexpr int PER_LANE = (X_BOXES * M_TILE + 31) / 32;
  float value[PER_LANE];

  inline void load(const Params& p, int first) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int at = i * 32 + threadIdx.x % 32, m = min(at % M_TILE, p.m - 1);
      const int block = min(first + at / M_TILE, p.num_blocks - 1);
      value[i] = p.x_scale[static_cast<long long>(m) * p.num_blocks + block];
    }
  }

  inline void store(float* to) const {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + threadIdx.x % 32 < X_BOXES * M_TILE) to[i * 32 + threadIdx.x % 32] = value[i];
    __syncwarp();
  }
};

inline void produce_x(const Params& p, const Run& run, u32 shared, float* scales) {
  const u64 often = evict_last();
  Ring ring{shared + X_BARRIERS_AT, X_STAGES};
  SlotScales next;
  asm volatile("prefetch.tensormap [%0];" ::"l"(&p.x) : "memory");
  wait_for_previous();
  if constexpr (IN_BLOCKS) next.load(p, 0);
  for (int tile = run.first; tile < run.end; tile += run.stride)
    for (int i = 0; i < run.steps; ++i)
      for (int part = 0; part < BOXES; part += X_BOXES, ring.next()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        if constexpr (IN_BLOCKS) {
          next.store(scales + ring.slot * X_BOXES * M_TILE);
          next.load(p, (i * BOXES + part + X_BOXES) % (run.steps * BOXES));
        }
        if (threadIdx.x % 32 != 0) continue;
        barrier_expect(ring.full(), X_BYTES);
        const u32 to = shared + X_AT + ring.slot * X_BYTES;
        for (int box = 0; box < X_BOXES; ++box)
          copy_box(to + box * X_BOX, p.x, (i * BOXES + part + box) * 128, 0, ring.full(), often);
      }
}

// ---- the end of a tile ----

// What there is of each row of x: thread m asks for it before anything is multiplied.
struct Fact {
  float scale;
  int zero;

  inline Fact(const Params& p) {
    const int at = min(static_cast<int>(threadIdx.x), p.m - 1) * p.x_scale_step;
    scale = IN_BLOCKS ? 1.0f : p.x_scale[at];
    zero = p.x_zero ? p.x_zero[at] : 0;
  }
};

inline float bias_at(const Params& p, int n) {
  if (!p.bias) return 0;
#if Y_KIND == 2
  return static_cast<const float*>(p.bias)[n];
#else
  const u16 bits = static_cast<const u16*>(p.bias)[n];
#if Y_KIND == 0
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#endif
#endif
}

inline void store(const Params& p, long long at, float value) {
#if Y_KIND == 2
  static_cast<float*>(p.y)[at] = value;
#else
  u16 bits;
#if Y_KIND == 0
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  static_cast<u16*>(p.y)[at] = bits;
#endif
}

// What there is of two rows of w: asked for before they are multiplied.
struct Rows {
  int n[2], sum[2];
  float scale[2], bias[2];

  inline Rows(const Params& p, int first) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      n[below] = first + 8 * below;
      const int at = min(n[below], p.n - 1);
      scale[below] = IN_BLOCKS ? 1.0f : p.w_scale[at];
      bias[below] = bias_at(p, at);
      sum[below] = p.x_zero ? p.w_sum[at] : 0;
    }
  }
};

// total[4 i + 2 b + c] is row n[b] of w, row 8 i + 2 t + c of x.
inline void write(const Params& p, const Fact* facts, const Rows& rows, const Sum (&total)[SUMS], int t) {
#pragma unroll
  for (int j = 0; j < SUMS; ++j) {
    const int m = j / 4 * 8 + 2 * t + j % 2, below = j / 2 % 2, n = rows.n[below];
    if (m >= p.m || n >= p.n) continue;
    const Sum sum = IS_INT8 ? total[j] - facts[m].zero * rows.sum[below] : total[j];
    const float value = static_cast<float>(sum) * rows.scale[below] * facts[m].scale + rows.bias[below];
    store(p, static_cast<long long>(m) * p.n + n, value);
  }
}

// Sums of the same rows in [K_GROUPS - 1][PIECES][ROW_WARPS][32], added up in order by the first group.
inline void add_up(Sum4* parts, Sum (&total)[SUMS], int k_group, bool is_real) {
  constexpr int STEP = ROW_WARPS * 32;
  if (k_group > 0 && is_real)
#pragma unroll
    for (int j = 0; j < PIECES; ++j)
      parts[((k_group - 1) * PIECES + j) * STEP] = {total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]};
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  if (k_group > 0 || !is_real) return;
  for (int other = 0; other < K_GROUPS - 1; ++other)
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      const Sum4 sum = parts[(other * PIECES + j) * STEP];
      total[4 * j] += sum.x, total[4 * j + 1] += sum.y, total[4 * j + 2] += sum.z, total[4 * j + 3] += sum.w;
    }
}

// ---- multiplying ----

// Adds a slot of x to the sums of 64 rows: sums of FP8 by way of `d`, integers in `d`. w_scale: of this warp's rows, for
// each box; x_scale: of the slot.
inline void multiply_slot(u32 w, u32 x, Sum (&d)[SUMS], Sum (&total)[SUMS], const float* x_scale, const float* w_scale) {
#pragma unroll
  for (int box = 0; box < X_BOXES; box += K_GROUPS) {
    const u64 w_at = descriptor(w + box * W_BOX), x_at = descriptor(x + box * X_BOX);
    registers_are_written();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply(d, w_at + 2 * k, x_at + 2 * k, IS_INT8 || k > 0);
    commit();
    if (IS_INT8 && box < X_BOXES - K_GROUPS) continue;
    float scale[M_TILE / 4];
    if constexpr (IN_BLOCKS)
#pragma unroll
      for (int i = 0; i < M_TILE / 8; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(x_scale + box * M_TILE + 8 * i);
        scale[2 * i] = pair.x * w_scale[box], scale[2 * i + 1] = pair.y * w_scale[box];
      }
    wait_for_all();
    if constexpr (!IS_INT8)
#pragma unroll
      for (int j = 0; j < SUMS; ++j) total[j] += IN_BLOCKS ? d[j] * scale[j / 4 * 2 + j % 2] : d[j];
  }
}

inline void consume(const Params& p, const Run& run, u8* memory, u32 shared) {
  const int lane = threadIdx.x % 32, t = lane % 4, warpgroup = threadIdx.x / 128;
  const int row_group = warpgroup % ROW_GROUPS, k_group = warpgroup / ROW_GROUPS;
  const int row_warp = row_group * 4 + threadIdx.x / 32 % 4;
  const bool is_real = row_warp < ROW_WARPS;
  Sum4* parts = reinterpret_cast<Sum4*>(memory + PARTS_AT) + row_warp * 32 + lane;
  Fact* facts = reinterpret_cast<Fact*>(memory + FACTS_AT);
  const float* x_scales = reinterpret_cast<const float*>(facts + M_TILE) + k_group * M_TILE + 2 * t;
  Ring w{shared + W_BARRIERS_AT, W_STAGES}, x{shared + X_BARRIERS_AT, X_STAGES};
  wait_for_previous();
  const Fact fact(p);
  for (int tile = run.first; tile < run.end; tile += run.stride) {
    const Rows rows(p, tile * TILE_ROWS + row_warp * 16 + lane / 4);
    const int row_block = min(tile * TILE_ROWS + row_warp * 16, p.n - 1) / 128;
    const float* w_scales = p.w_scale + static_cast<long long>(row_block) * p.num_blocks;
    float w_scale[BOXES], next[BOXES];
    auto load_scales = [&](int i) {
#pragma unroll
      for (int box = 0; box < BOXES; box += K_GROUPS)
        next[box] = w_scales[min(i * BOXES + box + k_group, p.num_blocks - 1)];
    };
    Sum d[SUMS] = {}, total[SUMS] = {};
    if constexpr (IN_BLOCKS) load_scales(0);
    for (int i = 0; i < run.steps; ++i, w.next()) {
      if constexpr (IN_BLOCKS) {
#pragma unroll
        for (int box = 0; box < BOXES; box += K_GROUPS) w_scale[box] = next[box];
        load_scales(i + 1 < run.steps ? i + 1 : 0);
      }
      barrier_wait(w.full(), w.parity);
      const u32 w_at = shared + w.slot * W_BYTES + k_group * W_BOX;
#pragma unroll
      for (int box = 0; box < BOXES; box += X_BOXES, x.next()) {
        barrier_wait(x.full(), x.parity);
        const u32 x_at = shared + X_AT + x.slot * X_BYTES + k_group * X_BOX;
        multiply_slot(w_at + box * W_BOX + row_group * 8192, x_at, d, total, x_scales + x.slot * X_BOXES * M_TILE,
                      w_scale + box);
        if (lane == 0) barrier_arrive(x.empty());
      }
      if (lane == 0) barrier_arrive(w.empty());
    }
    Sum(&sums)[SUMS] = IS_INT8 ? d : total;
    if (tile == run.first && threadIdx.x < M_TILE) facts[threadIdx.x] = fact;  // a store waits for what it stores
    add_up(parts, sums, k_group, is_real);
    if (k_group == 0 && is_real) write(p, facts, rows, sums, t);
    if (K_GROUPS > 1 && tile + run.stride < run.end)  // the next may be left
      asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) byte_stream(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  if (threadIdx.x == CONSUMERS) {
    for (int slot = 0; slot < W_STAGES + X_STAGES; ++slot) {
      barrier_init(shared + W_BARRIERS_AT + slot * 16, 1);                   // full
      barrier_init(shared + W_BARRIERS_AT + slot * 16 + 8, CONSUMERS / 32);  // empty
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    launch_dependents();
  }
  __syncthreads();
  const Run run(p);
  if (threadIdx.x == CONSUMERS) produce_w(p, run, shared);
  __syncwarp();
  if (threadIdx.x < CONSUMERS)
    consume(p, run, memory, shared);
  else if (threadIdx.x >= CONSUMERS + 32)
    produce_x(p, run, shared, reinterpret_cast<float*>(memory + FACTS_AT + 8 * M_TILE));
  __syncwarp();  // no branch ends the kernel: the compiler keeps descriptors where a warp has one
}
