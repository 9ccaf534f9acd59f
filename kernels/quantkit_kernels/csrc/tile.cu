// y [M, N] = x [M, K] · wᵀ [N, K] for tens to hundreds of rows M, w in 4 or 8 bits: tensor cores (wgmma) take w from
// registers, where it became 16 bits, and x from shared memory.
//
//   a cluster:   one tile of y, 64 HALVES WARPGROUPS rows of w × M_TILE rows of x; its blocks share K
//   a block:     a producer thread streams x through a ring in shared memory, 128 columns a stage; each warpgroup
//                multiplies HALVES times 64 rows of w with all of x's, and each lane of it streams its own words of w
//                through a ring; then the cluster's sums are added in the order of its blocks
//   a stage   | x: 2 × [M_TILE][64], swizzled |     | w: [strips][2][32][4] | scales: [strips][rows][16] | zero points |
//
// w is the left operand: warp q of a warpgroup holds its 16 × 16 fragments just as fragment order has them. Four of them
// are in flight, so that the next is made while the tensor cores are at work. x was put into the same order of columns
// and into the tensor core's order of bytes by tile_x.cu. Rows of 8-bit codes are read in that order of columns too. The first weights are on their way before x is there
// (dependent launch). A bulk copy for every strip of w would cost more time than its bytes do.
//
// Definitions: M_TILE (32, 64, 96, 128, 192, 256), WARPGROUPS, HALVES, RESIDENT (blocks on a multiprocessor), X_STAGES,
// W_STAGES, W_BITS (4, 8), IS_E4M3 (else integers), GROUP_ROWS (rows of scales in a stage; 0: one scale per row of w),
// GROUP_STAGES (stages of a group), ZERO (zero points), IS_BF16 (else fp16), SCALE_KIND (of groups).

#include "wgmma.cuh"

struct Params {
  u16* y;
  const u8* x;      // [M tiles][stages][2][M_TILE][64], from tile_x.cu
  const u8* w;      // W_BITS 4: [strips][blocks][32][4] u32; 8: codes [N][w_columns], w_stride apart
  const u8* scale;  // [strips][groups][16]; GROUP_ROWS 0: f32 [N]
  const u8* zero;   // i8 [strips][groups][16]
  const u16* bias;  // [N], or null
  int m, n, num_blocks, num_groups, num_m_tiles, w_stride, w_columns;  // of 8-bit codes, multiples of 16
};

constexpr int ROWS = 64 * HALVES * WARPGROUPS, STRIPS = ROWS / 16, WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS + 128;
// Registers of a thread at the start, of a producer and of a consumer: a multiprocessor has 64 K.
constexpr int REGISTERS = 65536 / (RESIDENT * THREADS) / 8 * 8, FEW = 24;
constexpr int MANY = (REGISTERS * (WARPGROUPS + 1) - FEW) / WARPGROUPS / 8 * 8 < 240
                         ? (REGISTERS * (WARPGROUPS + 1) - FEW) / WARPGROUPS / 8 * 8 : 240;
constexpr int W_STRIP = 256 * W_BITS, X_BYTES = M_TILE * 256, W_BYTES = STRIPS * W_STRIP;
constexpr int S_STRIP = GROUP_ROWS * 16 * SCALE_SIZE, Z_STRIP = ZERO ? GROUP_ROWS * 16 : 0;
constexpr int X_AT = 0, W_AT = X_AT + X_STAGES * X_BYTES, S_AT = W_AT + W_STAGES * W_BYTES;
constexpr int Z_AT = S_AT + W_STAGES * STRIPS * S_STRIP, RING_END = Z_AT + W_STAGES * STRIPS * Z_STRIP;
constexpr int PITCH = ROWS + 4;  // floats of a row of sums: banks
constexpr int SUMS_END = M_TILE * PITCH * 4;
constexpr int BARRIERS_AT = (RING_END > SUMS_END ? RING_END : SUMS_END) / 8 * 8 + 8;
constexpr int FRAGMENTS = 8 * HALVES, PER_GROUP = 2, SETS = 2;  // of a stage; issued together; such groups in flight

// What a lane has of a strip at a time: INT4: a block of 64 columns; 8 bits: half of one, rows g and g + 8.
struct Codes {
  u32 w[4];

  // Products whose codes one load brings.
  static constexpr int STEP = W_BITS == 4 ? 4 : 2;

  // strip: where its stage lies. Chunks of 16 bytes of row r of 8-bit codes are in the order c ^ 2 (r % 4): banks.
  inline void load(u32 strip, int j, int lane) {
    if constexpr (W_BITS == 4) {
      const Vec16 v = load_shared(strip + j / 4 * 512 + lane * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = v.w[i];
    } else {
      const int g = lane / 4, t = lane % 4, chunk = j / 2 * 2 + t / 2;
      const u32 at = strip + g * 128 + (chunk ^ 2 * (g % 4)) * 16 + t % 2 * 8;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at));
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[2]), "=r"(w[3]) : "r"(at + 1024));
    }
  }

  inline void to_fragment(u32 (&a)[4], int j, const Grid& grid) const {
    if constexpr (W_BITS == 4)
      fragment(a, w[j % 4], grid);
    else
      fragment(a, w[j % 2], w[2 + j % 2], grid);
  }
};

// ---- memory, clusters ----

inline void warpgroups_sync() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

inline u64 evict_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies into shared memory see barriers that are initialised.
inline void barriers_are_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

inline u32 cluster_size() {
  u32 n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return n;
}

inline u32 cluster_rank() {
  u32 r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// The warps of all blocks that multiply; the others have left or will not wait. Where a block has no cluster the instruction
// is a barrier of all of its warps, which these would reach from another place.
inline void cluster_sync(int split) {
  if (split == 1)
    warpgroups_sync();
  else
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// 16 bytes into shared memory, past L1, or nothing. No branch: it would end the overlap of products.
inline void copy_16(u32 to_shared, const void* from, u64 policy, bool is_wanted) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2; }" ::"r"(to_shared), "l"(from), "l"(policy),
      "r"(static_cast<u32>(is_wanted))
      : "memory");
}

inline void copies_are_a_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int COPYING>
inline void wait_for_groups_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COPYING) : "memory");
}

// Shared memory of another block of the cluster.
inline float4 load_of(u32 address, u32 rank) {
  float4 v;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// ---- the parts of a block ----

struct Work {
  int strip, m_tile, first_stage, num_stages;
};

inline Work work_of(const Params& p, int split, int rank) {
  const int tile = blockIdx.x / split, stages = (p.num_blocks + 1) / 2, first = stages * rank / split;
  return {tile / p.num_m_tiles * STRIPS, tile % p.num_m_tiles, first, stages * (rank + 1) / split - first};
}

// One thread copies x.
inline void produce(const Params& p, const Work& work, u32 shared) {
  const u64 often = evict_last();
  const u8* x = p.x + (static_cast<u64>(work.m_tile) * ((p.num_blocks + 1) / 2) + work.first_stage) * X_BYTES;
  int slot = 0, parity = 1;  // a ring that nobody has used yet is empty
  wait_for_previous();
#pragma unroll 1
  for (int i = 0; i < work.num_stages; ++i, x += X_BYTES) {
    const u32 full = shared + BARRIERS_AT + slot * 16;
    barrier_wait(full + 8, parity);
    barrier_expect(full, X_BYTES);
    bulk_copy(shared + X_AT + slot * X_BYTES, x, X_BYTES, full, often);
    if (++slot == X_STAGES) slot = 0, parity ^= 1;
  }
  launch_dependents();
}

// The words, scales and zero points of one strip, as its warp copies them: always whole stages. Beyond the last row or
// column the last strip, block or group is read again: such rows are not stored, and such columns of x are zero.
struct Source {
  const u8 *w, *scale, *zero;

  int strip;

  Source(const Params& p, int any_strip, int lane) : strip(min(any_strip, (p.n + 15) / 16 - 1)) {
    const u64 at = strip;
    w = p.w + (W_BITS == 4 ? at * p.num_blocks * 512 + lane * 16 : 0);
    scale = p.scale + at * p.num_groups * (16 * SCALE_SIZE) + lane % SCALE_SIZE * 16;
    zero = p.zero + at * p.num_groups * 16;
  }

  void copy(const Params& p, int stage, int lane, u32 w_to, u32 s_to, u32 z_to, u64 policy, bool is_wanted) const {
    if constexpr (W_BITS == 4) {
#pragma unroll
      for (int b = 0; b < 2; ++b)
        copy_16(w_to + b * 512 + lane * 16, w + static_cast<u64>(min(2 * stage + b, p.num_blocks - 1)) * 512, policy,
                is_wanted);
    } else {
      const int chunk = lane % 8, at = min(stage * 128 + chunk * 16, p.w_columns - 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = 4 * q + lane / 8, from = min(strip * 16 + row, p.n - 1);
        copy_16(w_to + row * 128 + (chunk ^ 2 * (row % 4)) * 16, w + static_cast<u64>(from) * p.w_stride + at, policy,
                is_wanted);
      }
    }
    if constexpr (GROUP_ROWS > 0) {
      const int group = GROUP_ROWS > 1 ? stage * GROUP_ROWS : stage / GROUP_STAGES, last = p.num_groups - 1;
      copy_16(s_to + lane * 16, scale + min(group + lane / SCALE_SIZE, last) * (16 * SCALE_SIZE), policy,
              is_wanted && lane < S_STRIP / 16);
      if constexpr (ZERO)
        copy_16(z_to + lane * 16, zero + min(group + lane, last) * 16, policy, is_wanted && lane < GROUP_ROWS);
    }
  }
};

// The sums of one warpgroup: d[h][4 i + 2 b + c] is row g + 8 b of this warp's strip h, row 8 i + 2 t + c of x.
inline void consume(const Params& p, const Work& work, u8* memory, u32 shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int strip = warp / 4 * 4 * HALVES + warp % 4;  // and every fourth after it
  float d[HALVES][M_TILE / 2] = {};
  u32 a[SETS][PER_GROUP][4];
  const u64 once = evict_first();
  const Source sources[2] = {{p, work.strip + strip, lane}, {p, work.strip + strip + 4, lane}};
  auto fetch = [&](int i, int slot) {
    const int at = slot * STRIPS + strip;
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
      sources[h].copy(p, work.first_stage + i, lane, shared + W_AT + (at + 4 * h) * W_STRIP,
                      shared + S_AT + (at + 4 * h) * S_STRIP, shared + Z_AT + (at + 4 * h) * Z_STRIP, once,
                      i < work.num_stages);
    copies_are_a_group();
  };
  for (int i = 0; i < W_STAGES - 1; ++i) fetch(i, i);
  int slot = 0, parity = 0, last = X_STAGES - 1, w_slot = 0, w_last = W_STAGES - 1;
#pragma unroll 1
  for (int i = 0; i < work.num_stages; ++i) {
    wait_for_groups_but<W_STAGES - 2>();
    barrier_wait(shared + BARRIERS_AT + slot * 16, parity);
    __syncwarp();
    const int at = w_slot * STRIPS + strip;
    const u64 x = descriptor(shared + X_AT + slot * X_BYTES);
    Grid grid[HALVES];
    Codes codes[HALVES];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const int j = f / HALVES, h = f % HALVES, set = f / PER_GROUP % SETS;
      if (j % Codes::STEP == 0) codes[h].load(shared + W_AT + (at + 4 * h) * W_STRIP, j, lane);
      if (j % (8 / max(GROUP_ROWS, 1)) == 0) {
        const int row = j * GROUP_ROWS / 8;
        grid[h] = grid_of(memory + S_AT + (at + 4 * h) * S_STRIP + row * 16 * SCALE_SIZE,
                          memory + Z_AT + (at + 4 * h) * Z_STRIP + row * 16, g);
      }
      if (f % PER_GROUP == 0) wait_but<SETS - 1>();
      if (f == (SETS - 1) * PER_GROUP) {  // the stage in front is done with
        if (i > 0 && lane == 0) barrier_arrive(shared + BARRIERS_AT + last * 16 + 8);
        fetch(i + W_STAGES - 1, w_last);
      }
      codes[h].to_fragment(a[set][f % PER_GROUP], j, grid[h]);
      if (f % PER_GROUP < PER_GROUP - 1) continue;
      registers_are_written();
#pragma unroll
      for (int e = f - PER_GROUP + 1; e <= f; ++e)
        multiply(d[e % HALVES], a[set][e % PER_GROUP],
                 x + e / HALVES / 4 * (M_TILE * 128 / 16) + e / HALVES % 4 * 2);
      commit();
    }
    last = slot, w_last = w_slot;
    if (++slot == X_STAGES) slot = 0, parity ^= 1;
    if (++w_slot == W_STAGES) w_slot = 0;
  }
  wait_but<0>();
  warpgroups_sync();  // nobody reads the ring any more
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    float* sums = reinterpret_cast<float*>(memory) + 16 * (strip + 4 * h) + g;
#pragma unroll
    for (int i = 0; i < M_TILE / 8; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[(8 * i + 2 * t + c % 2) * PITCH + 8 * (c / 2)] = d[h][4 * i + c];
  }
}

// Rows rank, rank + split, … of the tile: add up the blocks' sums in order, scale, round, store.
inline void store(const Params& p, const Work& work, u32 shared, int split, int rank) {
  constexpr int PER_ROW = ROWS / 4, STEP = 32 * WARPS / PER_ROW;
  const int column = threadIdx.x % PER_ROW * 4, n = work.strip * 16 + column, first_m = work.m_tile * M_TILE;
  const int num_rows = min(M_TILE, p.m - first_m), here = min(4, p.n - n);
  float scale[4] = {SUM_SCALE, SUM_SCALE, SUM_SCALE, SUM_SCALE}, bias[4] = {0, 0, 0, 0};
  for (int c = 0; c < here; ++c) {
    if (GROUP_ROWS == 0) scale[c] = SUM_SCALE * reinterpret_cast<const float*>(p.scale)[n + c];
    if (p.bias != nullptr) bias[c] = widen<KIND>(p.bias[n + c]);
  }
  for (int row = rank + threadIdx.x / PER_ROW * split; row < num_rows; row += STEP * split) {
    float4 sum = {0, 0, 0, 0};
    for (int from = 0; from < split; ++from) {
      const float4 part = load_of(shared + (row * PITCH + column) * 4, from);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    u32 pair[2] = {narrow2<KIND>(sum.x * scale[0] + bias[0], sum.y * scale[1] + bias[1]),
                   narrow2<KIND>(sum.z * scale[2] + bias[2], sum.w * scale[3] + bias[3])};
    u16* y = p.y + static_cast<u64>(first_m + row) * p.n + n;
    if (here == 4 && p.n % 4 == 0) {
      *reinterpret_cast<uint2*>(y) = {pair[0], pair[1]};
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < here) y[c] = static_cast<u16>(pair[c / 2] >> 16 * (c % 2));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tile(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  const int split = cluster_size(), rank = cluster_rank();
  const Work work = work_of(p, split, rank);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < X_STAGES; ++slot) {
      barrier_init(shared + BARRIERS_AT + slot * 16, 1);          // full
      barrier_init(shared + BARRIERS_AT + slot * 16 + 8, WARPS);  // empty
    }
    barriers_are_written();
  }
  __syncthreads();
  if (threadIdx.x / 128 == WARPGROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
    if (threadIdx.x == 32 * WARPS) produce(p, work, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    consume(p, work, memory, shared);
    cluster_sync(split);
    store(p, work, shared, split, rank);
    if (split > 1) cluster_sync(split);  // the others may still read these sums
  }
}
