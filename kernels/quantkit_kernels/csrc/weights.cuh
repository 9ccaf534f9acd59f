// Codes of 4 and 8 bits to 16 bits, two at a time, for kernels that are specialised by W_BITS (4, 8), IS_E4M3 (else
// integers), ZERO (zero points), IS_BF16 (else fp16) and SCALE_KIND (of groups, common.cuh).
#pragma once

#include "common.cuh"

#if IS_BF16
#define SIXTEEN "bf16"
#else
#define SIXTEEN "f16"
#endif

constexpr int KIND = IS_BF16 ? BF16 : F16;                // of what is made
constexpr u32 BASE = IS_BF16 ? 0x43004300 : 0x64006400;  // 128 or 1024, twice: a code in the lowest bits is added
constexpr int SCALE_SIZE = SCALE_KIND == F32 ? 4 : 2;

inline u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." SIXTEEN "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// A group's scale: twice in the dtype of what is made, if it is in that; else float32.
constexpr bool IS_DIRECT = SCALE_KIND == KIND;
inline u32 scale_bits(const u8* scale, u64 i) {
  if constexpr (IS_DIRECT)
    return __byte_perm(reinterpret_cast<const u16*>(scale)[i], 0, 0x1010);
  else
    return __float_as_uint(value_at<SCALE_KIND>(scale, i));
}

// Two exact codes times a scale in float32, rounded once.
inline u32 scaled_wide(u32 pair, float scale) {
  const float2 codes = widen2<KIND>(pair);
  return narrow2<KIND>(codes.x * scale, codes.y * scale);
}

// What is subtracted from codes, twice: the middle of INT4's, and the zero point.
inline u32 offset_of(int zero) {
  if constexpr (W_BITS == 4) return BASE + 0x00080008 + zero * 0x00010001;
  return narrow2<KIND>(static_cast<float>(zero), static_cast<float>(zero));
}

// Register r of a fragment from its word: two codes of row g, r even, or g + 8. Exact.
inline u32 two_of_word(u32 word, int r, u32 offset) {
  u32 code;
  asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(code) : "r"(word >> 4 * r), "n"(BASE));
  return sub2<KIND>(code, offset);
}

// Two of four 8-bit codes, exact. power: what e4m3's bits are multiplied by.
inline u32 two_of_bytes(u32 codes, int second, u32 offset, u32 power) {
  const u32 two = spread(codes, second ? SECOND_TWO : FIRST_TWO);
  if constexpr (IS_E4M3) return mul2<KIND>(bits_of_e4m3<KIND>(two), power);
  const u32 a = pair_of_int8<KIND>(two);
  return ZERO ? sub2<KIND>(a, offset) : a;
}
