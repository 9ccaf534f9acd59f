// y [M, N] = x [M, K] · wᵀ [N, K] for hundreds to thousands of rows M, w in 4 or 8 bits: tensor cores (wgmma) take w
// from registers, where it became 16 bits, and x from shared memory, as it is in memory.
//
//   a block:  stays on its multiprocessor and goes over tiles of y, 64 WARPGROUPS rows of w × M_TILE rows of x. Of two
//             warpgroups' tiles those that do not fill a last round of all multiprocessors are cut in two, 64 rows of w
//   a ring:   of stages of 64 columns, which no tile ends. One thread copies x, two warps copy w
//   a warp:   multiplies a strip of 16 rows of w with all of x's. In half a tile both warpgroups have the same rows,
//             and every second stage
//   tiles:    m_group of x's for one of w, then the next of w: what is read of x at a time stays in the L2
//   a stage   | x: [M_TILE][64], 128-byte swizzle |   | w: [strips][W_STRIP] | scales: [strips][rows][16] | zero points |
//
// x in its own order of columns wants weights in that order: lane t of the four that share a row of w has columns
// 8 t … 8 t + 7 of 32, and the tensor core wants 2 t, 2 t + 1 of every eight. Two shuffles of codes exchange them.
//
// Definitions: those of wgmma.cuh and wide.cuh.

#include "wgmma.cuh"
#include "wide.cuh"

// A lane has units u0 … u3 of 16 bits, columns 8 t + 2 p, + 1 of 32 for unit p, and gets unit t of lanes 0 … 3: of 0 and
// 1 in `first`, of 2 and 3 in `second`. INT4: a word has two units, rows g and g + 8, in bytes 0, 2 and bytes 1, 3; else
// in bytes 0, 1 and 2, 3. Selectors are of odd and of even lanes.
struct Exchange {
  u32 give, keep_first, keep_second;
  bool is_lower;

  Exchange(int lane) {
    const bool is_odd = lane & 1;
    is_lower = (lane & 2) == 0;
    if constexpr (W_BITS == 4) {
      give = is_odd ? 0x6240 : 0x7351, keep_first = is_odd ? 0x3614 : 0x6240, keep_second = is_odd ? 0x3715 : 0x7250;
    } else {
      give = is_odd ? 0x5410 : 0x7632, keep_first = is_odd ? 0x3254 : 0x5410, keep_second = is_odd ? 0x3276 : 0x7610;
    }
    asm volatile("" : "+r"(give), "+r"(keep_first), "+r"(keep_second));  // kept, not made anew each time
  }

  void run(u32& first, u32& second) const {
    const u32 got = __shfl_xor_sync(~0u, __byte_perm(first, second, give), 1);
    const u32 a = __byte_perm(first, got, keep_first), b = __byte_perm(second, got, keep_second);
    const u32 other = __shfl_xor_sync(~0u, is_lower ? b : a, 2);
    first = is_lower ? a : other, second = is_lower ? other : b;
  }
};

// What a lane has of a strip's 64 columns, in the order of x: words of MMA j, of 8 bits for rows g and g + 8.
struct Codes {
  u32 w[4][W_BITS / 4];

  void load(u32 strip, int lane, const Exchange& exchange) {
    if constexpr (W_BITS == 4) {
      const Vec16 v = load_shared(strip + lane * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j][0] = v.w[j];
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const u32 at = strip + (g + 8 * below) * 64 + ((2 * h + t / 2) ^ g / 2 % 2 * 2) * 16 + t % 2 * 8;
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                       : "=r"(w[2 * h][below]), "=r"(w[2 * h + 1][below])
                       : "r"(at));
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int below = 0; below < W_BITS / 4; ++below) exchange.run(w[2 * h][below], w[2 * h + 1][below]);
  }

  void to_fragment(u32 (&a)[4], int j, const Grid& grid) const {
    if constexpr (W_BITS == 4)
      fragment(a, w[j][0], grid);
    else
      fragment(a, w[j][0], w[j][W_BITS / 4 - 1], grid);
  }
};

// ---- products ----

inline void store_sums(const Params& p, const Sums& d, int column, int row, u32 shared) {
  float scale[2] = {SUM_SCALE, SUM_SCALE}, bias[2] = {0, 0};
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int n = min(column + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * b, p.n - 1);
    if (GROUP_ROWS == 0) scale[b] = SUM_SCALE * reinterpret_cast<const float*>(p.scale)[n];
    if (p.bias != nullptr) bias[b] = widen<KIND>(reinterpret_cast<const u16*>(p.bias)[n]);
  }
  auto pair = [&](int at, int b) { return narrow2<KIND>(d[at] * scale[b] + bias[b], d[at + 1] * scale[b] + bias[b]); };
  store(p, pair, column, row, shared);
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

inline void consume(const Params& p, u8* memory, u32 shared) {
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  const Exchange exchange(lane);
  Sums d;
  u32 a[FRAGMENTS][4];
  int slot = 0, parity = 0;
  Codes loaded;
  Grid loaded_grid;
  auto grid_at = [&](int slot, int place, int row) {
    const int at = slot * STRIPS + place;
    const u8* scale = memory + S_AT + at * S_STRIP + row * 16 * SCALE_SIZE;
    return grid_of(scale, memory + Z_AT + at * Z_STRIP + row * 16, lane / 4);
  };
  auto load = [&](int slot, int parity, int place) {
    barrier_wait(barrier_at(shared, slot, 0), parity);
    loaded.load(shared + W_AT + (slot * STRIPS + place) * W_STRIP, lane, exchange);
    loaded_grid = grid_at(slot, place, 0);
  };
  // Codes are loaded a stage ahead; for half a tile, which keeps twice as many slots, when they are needed.
  auto multiply_tile = [&](auto is_half, int place, int count) {
    constexpr int STEP = decltype(is_half)::value ? 2 : 1;
    int last = slot;
    if (STEP == 1) load(slot, parity, place);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const u64 x = descriptor(shared + X_AT + slot * X_BYTES);
      const bool is_more = STEP == 1 && i + 1 < count;
      int next = slot + STEP, next_parity = parity;
      if (next >= STAGES) next -= STAGES, next_parity ^= 1;
      if (STEP == 2) load(slot, parity, place);
      const Codes codes = loaded;
      Grid grid = loaded_grid;
      if (STEP == 1) load(is_more ? next : slot, is_more ? next_parity : parity, place);
#pragma unroll
      for (int j = 0; j < FRAGMENTS; ++j) {
        if (GROUP_ROWS == 2 && j == 2) grid = grid_at(slot, place, 1);
        wait_but<FRAGMENTS - 1>();
        if (j == FRAGMENTS - 1)  // the stage in front is done with
          arrive_if(barrier_at(shared, last, 1 + warpgroup), i > 0 && lane == 0);
        codes.to_fragment(a[j], j, grid);
        registers_are_written();
        multiply(d, a[j], x + 2 * j);
        commit();
      }
      last = slot, slot = next, parity = next_parity;
    }
    wait_but<0>();
    arrive_if(barrier_at(shared, last, 1 + warpgroup), count > 0 && lane == 0);
  };
#pragma unroll 1
  for (int round = 0;; ++round) {
    const Work work = work_of(p, round);
    if (!work.is_any) break;
#pragma unroll
    for (int i = 0; i < M_TILE / 2; ++i) d[i] = 0;
    const int row = work.m_tile * M_TILE;
    if (!work.is_half) {
      multiply_tile(Flag<false>(), warp, p.num_stages);
      store_sums(p, d, (work.strip + warpgroup * 4) * 16, row, shared);
    } else if constexpr (WARPGROUPS == 2) {
      if (warpgroup == 1 && ++slot == STAGES) slot = 0, parity ^= 1;
      multiply_tile(Flag<true>(), warp % 4, (p.num_stages + 1 - warpgroup) / 2);
      add_halves(d, memory);
      if (warpgroup == 0) store_sums(p, d, work.strip * 16, row, shared);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide(const __grid_constant__ Params p) {
  run(p, [&](u8* memory, u32 shared) { consume(p, memory, shared); });
}
