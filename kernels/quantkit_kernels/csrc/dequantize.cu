// Rows of a weight of 4 or 8 bits in 16 bits, row-major, rounded once: what a dense product reads from L2.
//
//   a block:  strips of 16 rows, one after the other
//   a warp:   64 columns of a strip at a time; each lane two rows, g and g + 8, 16 columns of each: 64 bytes of output
//
// Columns are padded to 64 as the fragments are; what stands there is no part of the weight.
//
// Definitions: those of weights.cuh, and GROUP (columns of a scale; 0: one per row, f32).

#include "weights.cuh"

struct Params {
  uint4* out;       // [rows][columns / 8]
  const u8* w;      // W_BITS 4: [strips][blocks][32][4] u32; 8: codes, w_stride apart
  const u8* scale;  // [strips][groups][16]; GROUP 0: f32 [N]
  const u8* zero;   // i8 [strips][groups][16]
  int first_strip, num_rows, num_blocks, num_groups, w_stride, w_columns;
};

constexpr bool IN_16_BITS = GROUP > 0 && IS_DIRECT;  // scales are exact in the output's dtype

struct Grid {
  u32 offset, scale;  // of `scale_bits`, or a row's in float32
};

inline Grid grid_of(const Params& p, int strip, int row, int column) {
  const u64 group = GROUP ? min(column / max(GROUP, 1), p.num_groups - 1) : 0;
  const u64 at = (static_cast<u64>(strip) * p.num_groups + group) * 16 + row;
  const u32 offset = offset_of(ZERO ? reinterpret_cast<const signed char*>(p.zero)[at] : 0);
  if constexpr (GROUP) return {offset, scale_bits(p.scale, at)};
  return {offset, reinterpret_cast<const u32*>(p.scale)[strip * 16 + row]};
}

inline u32 scaled(u32 pair, const Grid& grid) {
  return IN_16_BITS ? mul2<KIND>(pair, grid.scale) : scaled_wide(pair, __uint_as_float(grid.scale));
}

// A lane's two rows of 64 columns from `block` on: INT4: columns 32 h + 8 t + 0 … 7 for h = 0, 1; else 16 t + 0 … 15.
inline void dequantize_block(const Params& p, int strip, int block, int lane) {
  const int g = lane / 4, t = lane % 4, row = (strip - p.first_strip) * 16 + g;
  const int first = 64 * block + (W_BITS == 4 ? 8 : 16) * t, step = W_BITS == 4 ? 32 : 8;
  Vec16 codes[2];
  if constexpr (W_BITS == 4) {
    codes[0] = load_streaming(p.w + ((static_cast<u64>(strip) * p.num_blocks + block) * 32 + lane) * 16);
  } else {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int from = min(row + 8 * below, p.num_rows - 1) + 16 * p.first_strip;
      codes[below] = load_streaming(p.w + static_cast<u64>(from) * p.w_stride + min(first, p.w_columns - 16));
    }
  }
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    if (row + 8 * below >= p.num_rows) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = first + step * h;
      const Grid grid = grid_of(p, strip, g + 8 * below, column);
      u32 pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] = scaled(W_BITS == 4 ? two_of_word(codes[0].w[2 * h + i / 2], i % 2 * 2 + below, grid.offset)
                                     : two_of_bytes(codes[below].w[2 * h + i / 2], i % 2, grid.offset, E4M3_POWER<KIND>),
                         grid);
      p.out[static_cast<u64>(row + 8 * below) * p.num_blocks * 8 + column / 8] = {pair[0], pair[1], pair[2], pair[3]};
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024) dequantize(const __grid_constant__ Params p) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, strips = (p.num_rows + 15) / 16;
  for (int strip = blockIdx.x; strip < strips; strip += gridDim.x)
#pragma unroll 2
    for (int block = warp; block < p.num_blocks; block += warps)
      dequantize_block(p, p.first_strip + strip, block, threadIdx.x % 32);
}
