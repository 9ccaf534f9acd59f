// x [M, K] as tile.cu's tensor cores read it, 16 bits an element:
//
//   out [M tiles][blocks][M_TILE][64]   blocks of 64 columns, an even number of them; zero beyond x
//
// In a row of 128 bytes chunk c = 2 j + h is half h of MMA j: columns 32 (j / 2) + 8 t + 4 (j % 2) + 2 h, + 1 for t = 0 … 3
// (fragment order). Row r of a tile has its eight chunks in the order c ^ (r % 8): the 128-byte swizzle.
//
// Definitions: M_TILE, PAIRS (rows of x start at multiples of 4 bytes and K is even).

#include "common.cuh"

struct Params {
  u32* out;
  const u16* x;
  int m, k, x_stride;
};

constexpr int ROWS = 32;  // of a block of 256 threads, 8 chunks each

extern "C" __global__ void __launch_bounds__(256) tile_x(const __grid_constant__ Params p) {
  const int chunk = threadIdx.x % 8, row = blockIdx.x * ROWS + threadIdx.x / 8, block = blockIdx.y;
  const int column = 64 * block + 32 * (chunk / 4) + 4 * (chunk / 2 % 2) + 2 * (chunk % 2);
  const u16* x = p.x + static_cast<u64>(row) * p.x_stride + column;
  u32 pair[4] = {};
  launch_dependents();
  wait_for_previous();
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int left = row < p.m ? p.k - column - 8 * t : 0;
    if (PAIRS) {
      if (left > 0) pair[t] = *reinterpret_cast<const u32*>(x + 8 * t);
    } else {
      if (left > 0) pair[t] = x[8 * t];
      if (left > 1) pair[t] |= static_cast<u32>(x[8 * t + 1]) << 16;
    }
  }
  const u64 tile = row / M_TILE, r = row % M_TILE;
  const u64 at = ((tile * gridDim.y + block) * M_TILE + r) * 8 + (chunk ^ r % 8);
  reinterpret_cast<uint4*>(p.out)[at] = {pair[0], pair[1], pair[2], pair[3]};
}
