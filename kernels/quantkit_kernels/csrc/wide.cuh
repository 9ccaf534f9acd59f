// What the kernels for hundreds to thousands of rows share: how tiles of y are dealt out, how x and w get to shared
// memory, how y leaves it. wide.cu draws it; wide_codes.cu multiplies 8-bit inputs.
//
// Definitions: those of weights.cuh, and X_SIZE (bytes of an input), M_TILE, GROUP_ROWS (groups in a stage; 0: scales
// are per row of w), GROUP_STAGES (stages of a group), WARPGROUPS (2, 3), STAGES (even: half a tile's warpgroups keep to
// their slots).
#pragma once

#include "weights.cuh"

struct Params {
  alignas(64) u8 x[128];      // tensor map of [M][K], boxes of M_TILE × COLUMNS
  alignas(64) u8 y_map[128];  // of [M][N], boxes of M_TILE × 64; if N is a multiple of 8
  u16* y;
  const u8* w;      // W_BITS 4: [strips][blocks][32][4] u32; 8: codes [N][w_columns], w_stride apart
  const u8* scale;  // [strips][groups][16]; GROUP_ROWS 0: f32 [N]
  const u8* zero;   // i8 [strips][groups][16]
  const u8* bias;   // [N], or null
#if X_SIZE == 1
  const float* x_scale;       // [M], or one
  const signed char* x_zero;  // likewise, or null
  const float* row_sum;       // [N], of w; null if x_zero is
#endif
  int m, n, num_blocks, num_groups, num_m_tiles, num_w_tiles, num_stages;
  int m_group, num_whole, num_halves;  // whole tiles, and halves of further ones
  int w_stride, w_columns;             // of 8-bit codes, multiples of 16
#if X_SIZE == 1
  int x_scale_step;  // 0 if x has one scale
#endif
};

constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS + 128, STRIPS = WARPS;
// Registers of a producer and of a consumer: a multiprocessor has 64 K.
constexpr int FEW = 40, MANY = (65536 / THREADS / 8 * 8 * (WARPGROUPS + 1) - FEW) / WARPGROUPS / 8 * 8;
constexpr int COLUMNS = 128 / X_SIZE, BLOCKS = COLUMNS / 64;  // of a stage, which has 128 bytes of each row of x
constexpr int W_STRIP = 2 * COLUMNS * W_BITS, X_BYTES = M_TILE * 128, W_BYTES = STRIPS * W_STRIP;
constexpr int S_STRIP = GROUP_ROWS * 16 * SCALE_SIZE, Z_STRIP = ZERO ? GROUP_ROWS * 16 : 0;
constexpr int Y_BYTES = M_TILE * 128;  // of a warpgroup: rows of x, 64 of w
constexpr int X_AT = 0, Y_AT = X_AT + STAGES * X_BYTES, W_AT = Y_AT + WARPGROUPS * Y_BYTES;
constexpr int S_AT = W_AT + STAGES * W_BYTES, Z_AT = S_AT + STAGES * STRIPS * S_STRIP;
constexpr int BARRIERS_AT = Z_AT + STAGES * STRIPS * Z_STRIP;
constexpr int BARRIERS = 1 + WARPGROUPS;  // of a slot: full, and empty for each warpgroup
constexpr int FRAGMENTS = 4;  // of a stage
static_assert(STAGES % 2 == 0 && STAGES >= 4, "slots of two warpgroups");
static_assert(W_BITS == 4 || BLOCKS == 1, "8-bit codes come with 16-bit inputs");

inline u32 barrier_at(u32 shared, int slot, int which) { return shared + BARRIERS_AT + (slot * BARRIERS + which) * 8; }

// What a block does at a time. strip: the first. is_half: each warpgroup has every second stage of the same rows.
struct Work {
  int strip, m_tile;
  bool is_half, is_any;
};

inline Work work_at(const Params& p, int tile) {
  const int per_group = p.m_group * p.num_w_tiles, first = tile / per_group * p.m_group, left = tile % per_group;
  const int here = min(p.m_group, p.num_m_tiles - first);
  return {left / here * STRIPS, first + left % here, false, true};
}

inline Work work_of(const Params& p, int i) {
  const int block = blockIdx.x, blocks = gridDim.x, tile = block + i * blocks;
  if (tile < p.num_whole) return work_at(p, tile);
  const bool is_last = i == (p.num_whole - block + blocks - 1) / blocks;
  if (!is_last || block >= p.num_halves) return {0, 0, false, false};
  Work work = work_at(p, p.num_whole + block / 2);
  work.strip += block % 2 * 4, work.is_half = true;
  return work;
}

// ---- the ring ----

// Of half a tile each warpgroup reads every second stage, after whole ones that all read.
inline void wait_for_room(u32 shared, const Work& work, int stage, int slot, int parity) {
#pragma unroll
  for (int of = 0; of < WARPGROUPS; ++of)
    if (!work.is_half || stage < STAGES || stage % 2 == of) barrier_wait(barrier_at(shared, slot, 1 + of), parity);
}

inline void copy_x(const Params& p, u32 to_shared, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to_shared),
      "l"(p.x), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// No branch: it would end the overlap of products.
inline void arrive_if(u32 barrier, bool is_wanted) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %1, 0;\n"
      "@wanted mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier), "r"(static_cast<u32>(is_wanted))
      : "memory");
}

// By one thread.
inline void produce_x(const Params& p, u32 shared) {
  int slot = 0, parity = 1;  // a ring that nobody has used yet is empty
  wait_for_previous();
#pragma unroll 1
  for (int i = 0;; ++i) {
    const Work work = work_of(p, i);
    if (!work.is_any) break;
#pragma unroll 1
    for (int stage = 0; stage < p.num_stages; ++stage) {
      wait_for_room(shared, work, stage, slot, parity);
      const u32 full = barrier_at(shared, slot, 0);
      barrier_expect(full, X_BYTES);
      copy_x(p, shared + X_AT + slot * X_BYTES, stage * COLUMNS, work.m_tile * M_TILE, full);
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
  }
  launch_dependents();
}

inline void copy_16(u32 to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

constexpr int MY_STRIPS = STRIPS / 2;

// Words, scales and zero points of half of a block's strips, by one warp of two. Beyond the last row or column the last
// strip, block or group is read again: such rows are not stored, and such columns of x are zero.
struct Source {
  static constexpr int COPIES = MY_STRIPS * W_BITS / 4, S_CHUNKS = S_STRIP / 16, Z_CHUNKS = Z_STRIP / 16;

  const u8* w[COPIES];
  int strip;

  static int strip_of(const Params& p, int strip) { return min(strip, (p.n + 15) / 16 - 1); }

  Source(const Params& p, int first_strip, int lane) : strip(first_strip) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      if constexpr (W_BITS == 4) {
        w[i] = p.w + static_cast<u64>(strip_of(p, strip + i)) * p.num_blocks * 512 + lane * 16;
      } else {
        const int row = min(strip_of(p, strip + i / 2) * 16 + i % 2 * 8 + lane / 4, p.n - 1);
        w[i] = p.w + static_cast<u64>(row) * p.w_stride;
      }
    }
  }

  void copy(const Params& p, int stage, int lane, u32 w_to, u32 s_to, u32 z_to) const {
    const int to = W_BITS == 4 ? lane * 16 : lane / 4 * 64 + (lane % 4 ^ lane / 8 % 2 * 2) * 16;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int block = stage * BLOCKS + b;
      const int at =
          W_BITS == 4 ? min(block, p.num_blocks - 1) * 512 : min(block * 64 + lane % 4 * 16, p.w_columns - 16);
#pragma unroll
      for (int i = 0; i < COPIES; ++i) copy_16(w_to + (i * BLOCKS + b) * 512 + to, w[i] + at);
    }
    const int group = GROUP_ROWS > 1 ? stage * GROUP_ROWS : stage / GROUP_STAGES, last = p.num_groups - 1;
#pragma unroll
    for (int i = 0; i < MY_STRIPS * S_CHUNKS; i += 32) {
      const int c = i + lane, chunk = c % max(S_CHUNKS, 1);
      const u64 at = static_cast<u64>(strip_of(p, strip + c / max(S_CHUNKS, 1))) * p.num_groups;
      if (c < MY_STRIPS * S_CHUNKS)
        copy_16(s_to + c * 16,
                p.scale + (at + min(group + chunk / SCALE_SIZE, last)) * (16 * SCALE_SIZE) + chunk % SCALE_SIZE * 16);
    }
    const u64 at = static_cast<u64>(strip_of(p, strip + lane / max(Z_CHUNKS, 1))) * p.num_groups;
    if (lane < MY_STRIPS * Z_CHUNKS)
      copy_16(z_to + lane * 16, p.zero + (at + min(group + lane % max(Z_CHUNKS, 1), last)) * 16);
  }
};

// By two warps, each half of the strips; of half a tile the first has them all.
inline void produce_w(const Params& p, u32 shared, int which, int lane) {
  int slot = 0, parity = 1;
#pragma unroll 1
  for (int i = 0;; ++i) {
    const Work work = work_of(p, i);
    if (!work.is_any) break;
    const Source source(p, work.strip + which * MY_STRIPS, lane);
#pragma unroll 1
    for (int stage = 0; stage < p.num_stages; ++stage) {
      wait_for_room(shared, work, stage, slot, parity);
      const int at = slot * STRIPS + which * MY_STRIPS;
      if (!work.is_half || which == 0)
        source.copy(p, stage, lane, shared + W_AT + at * W_STRIP, shared + S_AT + at * S_STRIP,
                    shared + Z_AT + at * Z_STRIP);
      const u32 full = barrier_at(shared, slot, 0);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
  }
}

// ---- y ----

using Sums = float[M_TILE / 2];  // of a lane, [4 i + 2 b + c]: row g + 8 b of a warp's strip, row 8 i + 2 t + c of x

inline void warpgroups_meet() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// The second warpgroup's sums to the first, through the ring, which nobody reads or writes any more.
inline void add_halves(Sums& d, u8* memory) {
  float* sums = reinterpret_cast<float*>(memory) + threadIdx.x % 128;
  warpgroups_meet();
  if (threadIdx.x >= 128) {
#pragma unroll
    for (int i = 0; i < M_TILE / 2; ++i) sums[i * 128] = d[i];
  }
  warpgroups_meet();
  if (threadIdx.x < 128) {
#pragma unroll
    for (int i = 0; i < M_TILE / 2; ++i) d[i] += sums[i * 128];
  }
}

// Four 8 × 8 matrices, transposed: lane 8 i + r says where row r of matrix i goes.
inline void store_transposed(u32 to_shared, const u32 (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to_shared),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

inline void warpgroup_meets(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(2 + warpgroup) : "memory"); }

inline void copy_y(const Params& p, u32 from_shared, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(p.y_map),
      "r"(column), "r"(row), "r"(from_shared)
      : "memory");
}

// Without the copy engine, which wants rows at multiples of 16 bytes.
inline void store_rows(const Params& p, u32 from_shared, int column, int row) {
  for (int i = threadIdx.x % 128; i < M_TILE * 64; i += 128) {
    const int r = i / 64, c = i % 64;
    const u32 at = from_shared + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2;
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at));
    if (row + r < p.m && column + c < p.n) p.y[static_cast<u64>(row + r) * p.n + column + c] = value;
  }
}

// A warpgroup's outputs: rounded, transposed in shared memory, [M_TILE][64] with the 128-byte swizzle, and copied from
// there while the next tile is multiplied. pair(at, b): two outputs, of sums at and at + 1, row g + 8 b. column: of y, the
// first.
template <class Pair>
inline void store(const Params& p, const Pair& pair, int column, int row, u32 shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warpgroup = warp / 4;
  const u32 staged = shared + Y_AT + warpgroup * Y_BYTES;
  const bool is_first = threadIdx.x % 128 == 0;
  if (is_first) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  warpgroup_meets(warpgroup);  // the tile in front has left
  const u32 to = staged + (lane / 16 * 8 + lane % 8) * 128 + ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
  for (int s = 0; s < M_TILE / 16; ++s) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair(8 * s + 4 * (i / 2) + 2 * (i % 2), i % 2);
    store_transposed(to + s * 2048, pairs);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  warpgroup_meets(warpgroup);
  if (p.n % 8 != 0)
    store_rows(p, staged, column, row);
  else if (is_first && column < p.n)
    copy_y(p, staged, column, row);
}

// ---- the parts of a block ----

template <class Consume>
inline void run(const Params& p, const Consume& consume) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(barrier_at(shared, slot, 0), 1 + 2 * 32);
      for (int of = 1; of <= WARPGROUPS; ++of) barrier_init(barrier_at(shared, slot, of), 4);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x / 128 == WARPGROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
    const int which = threadIdx.x / 32 - WARPS - 1;
    if (threadIdx.x == 32 * WARPS) produce_x(p, shared);
    if (which == 0 || which == 1) produce_w(p, shared, which, threadIdx.x % 32);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    consume(memory, shared);
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
