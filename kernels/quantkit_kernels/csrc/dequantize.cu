// Rows of a weight of 4 or 8 bits in 16 bits, row-major, rounded once: what a dense product reads from L2.
//
//   a thread: eight columns of one row, 16 bytes of output
//   grid:     x eights of columns, y rows
//
// Columns are padded to 64 as the fragments are; what stands there is no part of the weight.
//
// Definitions: W_BITS (4: fragments, docs/kernels.md; 8: rows), IS_E4M3 (8 bits: else integers), GROUP (columns of a
// scale; 0: one per row, f32), ZERO (zero points), OUT_KIND and SCALE_KIND (common.cuh).

#include "common.cuh"

struct Params {
  uint4* out;       // [rows][columns / 8]
  const u8* w;      // W_BITS 4: [strips][blocks][32][4] u32; 8: codes, w_stride apart
  const u8* scale;  // [strips][groups][16]; GROUP 0: f32 [N]
  const u8* zero;   // i8 [strips][groups][16]
  int first_row, num_blocks, num_groups, w_stride, w_columns;
};

// The sign, and seven bits as a fp16 whose exponent is too small by 8. NaN is 480: no checkpoint has it.
inline float e4m3_to_float(u32 code) {
  return widen<F16>(static_cast<u16>((code & 0x80) << 8 | (code & 0x7F) << 7)) * 256;
}

inline float code_at(uint2 codes, int i, int below) {
  const u32 word = i < 4 ? codes.x : codes.y;
  if constexpr (W_BITS == 4) return static_cast<int>(word >> 4 * (i % 2 * 4 + i / 2 % 2 * 2 + below) & 15) - 8;
  const u32 code = word >> 8 * (i % 4) & 255;
  return IS_E4M3 ? e4m3_to_float(code) : static_cast<signed char>(code);
}

extern "C" __global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Params p) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8, row = p.first_row + blockIdx.y;
  if (column >= p.num_blocks * 64) return;
  const int strip = row / 16, below = row % 16 / 8;
  u64 at = static_cast<u64>(row) * p.w_stride + min(column, p.w_columns - 8);
  if (W_BITS == 4) {
    const int half = column / 32 % 2, lane = row % 8 * 4 + column / 8 % 4;
    at = ((static_cast<u64>(strip) * p.num_blocks + column / 64) * 32 + lane) * 16 + half * 8;
  }
  const uint2 codes = *reinterpret_cast<const uint2*>(p.w + at);
  const int group = GROUP ? min(column / max(GROUP, 1), p.num_groups - 1) : 0;
  const u64 of_group = (static_cast<u64>(strip) * p.num_groups + group) * 16 + row % 16;
  const float scale = value_at<SCALE_KIND>(p.scale, GROUP ? of_group : row);
  const float zero = ZERO ? reinterpret_cast<const signed char*>(p.zero)[of_group] : 0;
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    pairs[i / 2] = narrow2<OUT_KIND>((code_at(codes, i, below) - zero) * scale, (code_at(codes, i + 1, below) - zero) * scale);
  p.out[static_cast<u64>(blockIdx.y) * p.num_blocks * 8 + column / 8] = {pairs[0], pairs[1], pairs[2], pairs[3]};
}
