// Products on tensor cores (wgmma, compute capability 9.0) whose left operand, the weight, is made in registers.
//
// Definitions: those of weights.cuh, X_SIZE (bytes of an input), M_TILE (rows of x: 32, 64, 96, 128, 192, 256),
// GROUP_ROWS (0: scales are per row of the weight, and wait for the sums).
#pragma once

#include "weights.cuh"
#include "wgmma_order.cuh"

static_assert(!ZERO || GROUP_ROWS, "zero points come in groups");
// Scales of groups that need not be numbers of x's dtype: weights are multiplied in float32.
constexpr bool IS_WIDE = GROUP_ROWS && !IS_DIRECT;
constexpr bool IS_FUSED = W_BITS == 4 && IS_BF16 && GROUP_ROWS && !ZERO && !IS_WIDE;
constexpr bool IS_SHIFTED = W_BITS == 8 && !IS_E4M3 && IS_BF16;
constexpr float SUM_SCALE = IS_FUSED || IS_SHIFTED ? 8192 : 1;  // that the sums still need

// ---- tensor cores ----

#ifndef SUM
#define SUM(d) "+f"(d)
#endif
#define DECADE(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define SUM4(i) SUM(d[i]), SUM(d[i + 1]), SUM(d[i + 2]), SUM(d[i + 3])
#define SUM16(i) SUM4(i), SUM4(i + 4), SUM4(i + 8), SUM4(i + 12)
#define FIFTY DECADE() ", " DECADE(1) ", " DECADE(2) ", " DECADE(3) ", " DECADE(4)
#if M_TILE == 32
#define SUMS SUM16(0)
#define NAMES "{" DECADE() ", %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20"
#elif M_TILE == 64
#define SUMS SUM16(0), SUM16(16)
#define NAMES "{" DECADE() ", " DECADE(1) ", " DECADE(2) ", %30, %31}, {%32, %33, %34, %35}, %36"
#elif M_TILE == 96
#define SUMS SUM16(0), SUM16(16), SUM16(32)
#define NAMES \
  "{" DECADE() ", " DECADE(1) ", " DECADE(2) ", " DECADE(3) \
  ", %40, %41, %42, %43, %44, %45, %46, %47}, {%48, %49, %50, %51}, %52"
#elif M_TILE == 128
#define SUMS SUM16(0), SUM16(16), SUM16(32), SUM16(48)
#define NAMES "{" FIFTY ", " DECADE(5) ", %60, %61, %62, %63}, {%64, %65, %66, %67}, %68"
#elif M_TILE == 192
#define SUMS SUM16(0), SUM16(16), SUM16(32), SUM16(48), SUM16(64), SUM16(80)
#define NAMES \
  "{" FIFTY ", " DECADE(5) ", " DECADE(6) ", " DECADE(7) ", " DECADE(8) \
  ", %90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100"
#elif M_TILE == 256
#define SUMS SUM16(0), SUM16(16), SUM16(32), SUM16(48), SUM16(64), SUM16(80), SUM16(96), SUM16(112)
#define NAMES \
  "{" FIFTY ", " DECADE(5) ", " DECADE(6) ", " DECADE(7) ", " DECADE(8) ", " DECADE(9) ", " DECADE(10) ", " DECADE(11) \
  ", %120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132"
#endif
#define TEXT_OF(n) #n
#define TEXT(n) TEXT_OF(n)

#if X_SIZE == 2
// d [64 × M_TILE] += a [64 × 16] · x [M_TILE × 16]ᵀ, asynchronously.
inline void multiply(float (&d)[M_TILE / 2], const u32 (&a)[4], u64 x) {
  asm volatile(
      "{ .reg .pred add; setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n" TEXT(M_TILE) "k16.f32." SIXTEEN "." SIXTEEN " " NAMES ", add, 1, 1, 0; }"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
}
#endif

// ---- weights ----

// What a lane needs to make weights of its rows g and g + 8. scale: of `scale_bits`.
struct Grid {
  u32 offset[2], scale[2];
};

constexpr u32 TWO_116 = 0x79807980, TWO_120 = 0x7B807B80, MINUS_TWO_MINUS_10 = 0xBA80BA80;  // bf16

inline Grid grid_of(const u8* scale, const u8* zero, int g) {
  Grid grid;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int zero_here = ZERO ? reinterpret_cast<const signed char*>(zero)[g + 8 * below] : 0;
    const float shifted = (128 + zero_here) * -0x1p-13f;
    grid.offset[below] = IS_SHIFTED ? narrow2<KIND>(shifted, shifted) : offset_of(zero_here);
    if constexpr (GROUP_ROWS > 0) grid.scale[below] = scale_bits(scale, g + 8 * below);
    if constexpr (IS_FUSED) {
      grid.offset[below] = mul2<KIND>(grid.scale[below], MINUS_TWO_MINUS_10);
      grid.scale[below] = mul2<KIND>(grid.scale[below], below ? TWO_116 : TWO_120);
    }
    // below 256, or it would be IS_WIDE: the product is finite
    if constexpr (IS_E4M3 && GROUP_ROWS && !IS_WIDE) grid.scale[below] = mul2<KIND>(grid.scale[below], E4M3_POWER<KIND>);
  }
  return grid;
}

inline u32 in_scale(u32 a, u32 scale) {
  if constexpr (IS_WIDE) return scaled_wide(a, __uint_as_float(scale));
  return GROUP_ROWS ? mul2<KIND>(a, scale) : a;
}

// Eight codes to the 16 × 16 fragment's four registers, rounded once after the scale. IS_FUSED: a code u in the lowest
// bits of a bf16 is u · 2^-133, and four bits above u · 2^-129, so that one fma makes (u − 8) · scale · 2^-13. Else
// (128 + u) − (136 + zero) is exact.
inline void fragment(u32 (&a)[4], u32 word, const Grid& grid) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (IS_FUSED) {
      a[r] = fma2(word >> r / 2 * 8 & (r & 1 ? 0x00F000F0 : 0x000F000F), grid.scale[r & 1], grid.offset[r & 1]);
    } else {
      a[r] = in_scale(two_of_word(word, r, grid.offset[r & 1]), grid.scale[r & 1]);
    }
  }
}

// e4m3: the power is in a scale of 16 bits already. IS_SHIFTED: u = code + 128 in the lowest bits of a bf16 is u · 2^-133,
// also where it reaches into the exponent: one fma makes (code − zero) · 2^-13, exactly.
inline u32 of_bytes(u32 codes, int second, u32 offset, u32 scale) {
  if constexpr (IS_SHIFTED) {
    const u32 u = (spread(codes, second ? SECOND_TWO : FIRST_TWO) & 0x00FF00FF) ^ 0x00800080;
    return in_scale(fma2(u, TWO_120, offset), scale);
  }
  if constexpr (IS_E4M3 && GROUP_ROWS && !IS_WIDE) return two_of_bytes(codes, second, offset, scale);
  return in_scale(two_of_bytes(codes, second, offset, E4M3_POWER<KIND>), scale);
}

// Four codes each of rows g and g + 8.
inline void fragment(u32 (&a)[4], u32 above, u32 below, const Grid& grid) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
    a[r] = of_bytes(r & 1 ? below : above, r / 2, grid.offset[r & 1], grid.scale[r & 1]);
}
