// y [M, N] = (x [M, K] − zero points) · wᵀ [N, K], scaled, for x in 8-bit codes and INT4 weights: as wide.cu, which
// draws it, but weights become 8-bit codes, and tensor cores multiply these twice as fast.
//
//   a stage:  128 columns, 4 products of 32; in groups each group's products are a sum of their own, exact in int32 or
//             fresh in float32, that is scaled and added to the tile's sums
//   lanes:    t has columns 8 t … 8 t + 7 of 32, the tensor core wants 4 t … 4 t + 3 and 16 + 4 t …: two shuffles
//   a code:   u, less 8: as an integer 16 (u − 8), its four bits on top; as e4m3 (u − 8) · 2^-9, which is a sign and up
//             to four bits at the lower end
//
// While one warpgroup scales its sums the other multiplies.
//
// Definitions: those of wide.cuh, IS_INT8 (inputs; else e4m3), BIAS_KIND (common.cuh). IS_BF16: outputs.

#if IS_INT8
#define SUM(d) "+r"(d)
#define TYPES "s32.s8.s8"
#define SIGNS ""
using Product = int;
#else
#define TYPES "f32.e4m3.e4m3"
#define SIGNS ", 1, 1"
using Product = float;
#endif

#include "wgmma.cuh"
#include "wide.cuh"

constexpr int PARTS = GROUP_ROWS > 1 ? GROUP_ROWS : 1, PER_PART = FRAGMENTS / PARTS;  // of a stage, products of a group
constexpr float CODE_SCALE = IS_INT8 ? 1.0f / 16 : 512;
static_assert(M_TILE == 128 && W_BITS == 4 && !ZERO, "what is written here");

using Products = Product[M_TILE / 2];

// d [64 × 128] = a [64 × 32] · x [128 × 32]ᵀ, or added to it; asynchronously.
template <bool ADDS>
inline void multiply(Products& d, const u32 (&a)[4], u64 x) {
  asm volatile(
      "{ .reg .pred add; setp.ne.u32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32." TYPES " " NAMES ", add" SIGNS "; }"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "n"(static_cast<int>(ADDS)));
}

// A lane has columns 8 t … 8 t + 3 in `first` and the four behind them in `second`; it gets 4 t … 4 t + 3 of 32, and
// those 16 behind. A word trades places with one of the next lane, then with one of the lane after that.
inline void exchange(u32& first, u32& second, int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; ++bit) {
    const bool is_upper = lane & bit;
    const u32 got = __shfl_xor_sync(~0u, is_upper ? first : second, bit);
    first = is_upper ? got : first, second = is_upper ? second : got;
  }
}

// Of four codes u in bytes.
inline u32 e4m3_of(u32 u) {
  const u32 is_negative = ~(u >> 3) & 0x01010101;  // less 8
  return (u ^ (0x08080808 - is_negative)) + is_negative * 0x81;
}

// Rows g and g + 8 of four columns.
inline void codes_of(u32 word, u32& above, u32& below) {
  const u32 in_order = __byte_perm(word, 0, 0x3120);
  if constexpr (IS_INT8) {
    above = (in_order << 4 & 0xF0F0F0F0) ^ 0x80808080, below = (in_order & 0xF0F0F0F0) ^ 0x80808080;
  } else {
    above = e4m3_of(in_order & 0x0F0F0F0F), below = e4m3_of(in_order >> 4 & 0x0F0F0F0F);
  }
}

// What a warp has of a stage.
struct Weights {
  u32 a[FRAGMENTS][4];
  float scale[PARTS][2];  // of rows g and g + 8

  void load(u32 w, const u8* scales, int lane) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const Vec16 v = load_shared(w + b * 512 + lane * 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 first = v.w[2 * h], second = v.w[2 * h + 1];
        exchange(first, second, lane);
        codes_of(first, a[2 * b + h][0], a[2 * b + h][1]);
        codes_of(second, a[2 * b + h][2], a[2 * b + h][3]);
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int below = 0; below < 2; ++below)
        scale[part][below] = GROUP_ROWS ? value_at<SCALE_KIND>(scales, part * 16 + lane / 4 + 8 * below) : 1;
#pragma unroll
    for (int j = 0; j < FRAGMENTS; ++j)  // made now, while products are in flight, and not when they are needed
      asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]));
  }
};

inline void store_sums(const Params& p, const Sums& sums, int column, int row, u32 shared) {
  const int lane = threadIdx.x % 32;
  float scale[2], bias[2] = {0, 0}, row_sum[2] = {0, 0}, x_scale[M_TILE / 8][2], x_zero[M_TILE / 8][2];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int n = min(column + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * b, p.n - 1);
    scale[b] = GROUP_ROWS ? CODE_SCALE : CODE_SCALE * reinterpret_cast<const float*>(p.scale)[n];
    if (p.bias != nullptr) bias[b] = value_at<BIAS_KIND>(p.bias, n);
    if (p.x_zero != nullptr) row_sum[b] = p.row_sum[n];
  }
#pragma unroll
  for (int i = 0; i < M_TILE / 8; ++i)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int m = min(row + 8 * i + lane % 4 * 2 + c, p.m - 1) * p.x_scale_step;
      x_scale[i][c] = p.x_scale[m];
      x_zero[i][c] = p.x_zero != nullptr ? p.x_zero[m] : 0;
    }
  auto output = [&](int at, int b, int c) {
    return (sums[at + c] * scale[b] - x_zero[at / 4][c] * row_sum[b]) * x_scale[at / 4][c] + bias[b];
  };
  store(p, [&](int at, int b) { return narrow2<KIND>(output(at, b, 0), output(at, b, 1)); }, column, row, shared);
}

inline void consume(const Params& p, u8* memory, u32 shared) {
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  Sums sums;
  Products d = {};
  int slot = 0, parity = 0;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const Work work = work_of(p, round);
    if (!work.is_any) break;
    const int place = work.is_half ? warp % 4 : warp;  // of the warp's strip in a stage
    const int step = work.is_half ? 2 : 1, count = (p.num_stages + (work.is_half ? 1 - warpgroup : 0)) / step;
    if (work.is_half && warpgroup == 1 && ++slot == STAGES) slot = 0, parity ^= 1;
#pragma unroll
    for (int i = 0; i < M_TILE / 2; ++i) sums[i] = 0;
    Weights even, odd;
    auto load = [&](Weights& weights, int slot, int parity) {
      barrier_wait(barrier_at(shared, slot, 0), parity);
      const int at = slot * STRIPS + place;
      weights.load(shared + W_AT + at * W_STRIP, memory + S_AT + at * S_STRIP, lane);
    };
    auto multiply_stage = [&](const Weights& now, Weights& next, bool is_more) {
      const u64 x = descriptor(shared + X_AT + slot * X_BYTES);
      int next_slot = slot + step, next_parity = parity;
      if (next_slot >= STAGES) next_slot -= STAGES, next_parity ^= 1;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        registers_are_written();
#pragma unroll
        for (int j = part * PER_PART; j < (part + 1) * PER_PART; ++j) {
          if (j % PER_PART == 0)
            multiply<false>(d, now.a[j], x + 2 * j);
          else
            multiply<true>(d, now.a[j], x + 2 * j);
        }
        commit();
        if (part == 0) load(next, is_more ? next_slot : slot, is_more ? next_parity : parity);
        wait_but<0>();
#pragma unroll
        for (int i = 0; i < M_TILE / 2; ++i) asm volatile("" : SUM(d[i]));  // not read any earlier
        if (part == PARTS - 1) arrive_if(barrier_at(shared, slot, 1 + warpgroup), lane == 0);
#pragma unroll
        for (int i = 0; i < M_TILE / 2; ++i) sums[i] += static_cast<float>(d[i]) * now.scale[part][i / 2 % 2];
      }
      slot = next_slot, parity = next_parity;
    };
    if (count > 0) load(even, slot, parity);
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      multiply_stage(even, odd, i + 1 < count);
      if (i + 1 < count) multiply_stage(odd, even, i + 2 < count);
    }
    if (work.is_half) add_halves(sums, memory);
    if (!work.is_half || warpgroup == 0)
      store_sums(p, sums, (work.strip + place / 4 * 4) * 16, work.m_tile * M_TILE, shared);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide_codes(const __grid_constant__ Params p) {
  run(p, [&](u8* memory, u32 shared) { consume(p, memory, shared); });
}
