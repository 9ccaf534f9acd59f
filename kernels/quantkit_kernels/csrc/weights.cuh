// Codes of 4 and 8 bits to 16 bits, two at a time, for kernels that are specialised by W_BITS (4, 8), IS_E4M3 (else
// integers), ZERO (zero points), IS_BF16 (else fp16) and SCALE_KIND (of groups; 0: bf16, 1: fp16, 2: fp32).
#pragma once

#include "common.cuh"

#if IS_BF16
#define SIXTEEN "bf16"
#else
#define SIXTEEN "f16"
#endif

constexpr u32 BASE = IS_BF16 ? 0x43004300 : 0x64006400;  // 128 or 1024, twice: a code in the lowest bits is added
constexpr u32 TWO_120 = 0x7B807B80;                      // bf16
constexpr u32 E4M3_POWER = IS_BF16 ? TWO_120 : 0x5C005C00;  // 2^120, or 2^8 in fp16
constexpr int SCALE_SIZE = SCALE_KIND == 2 ? 4 : 2;

inline u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." SIXTEEN "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

inline u32 sub2(u32 a, u32 b) {
#if IS_BF16 && __CUDA_ARCH__ < 900  // which has nothing else for bf16
  return fma2(b, 0xBF80BF80, a);
#else
  u32 d;
  asm("sub." SIXTEEN "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

inline u32 mul2(u32 a, u32 b) {
#if IS_BF16 && __CUDA_ARCH__ < 900
  return fma2(a, b, 0x80008000);
#else
  u32 d;
  asm("mul." SIXTEEN "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

// {hi, lo} in 16 bits.
inline u32 pack2(float lo, float hi) {
  u32 d;
  asm("cvt.rn." SIXTEEN "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}

inline float half_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

inline float bf16_to_float(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

inline float widen(u16 bits) { return IS_BF16 ? bf16_to_float(bits) : half_to_float(bits); }

// A group's.
inline float scale_at(const u8* scale, u64 i) {
  if constexpr (SCALE_KIND == 2) return reinterpret_cast<const float*>(scale)[i];
  const u16 bits = reinterpret_cast<const u16*>(scale)[i];
  return SCALE_KIND == 0 ? bf16_to_float(bits) : half_to_float(bits);
}

// Twice, in the dtype of x.
inline u32 twice(const u8* scale, int i) {
  if constexpr (SCALE_KIND == (IS_BF16 ? 0 : 1)) {
    const u32 bits = reinterpret_cast<const u16*>(scale)[i];
    return __byte_perm(bits, 0, 0x1010);
  }
  const float s = scale_at(scale, i);
  return pack2(s, s);
}

// What is subtracted from codes, twice: the middle of INT4's, and the zero point.
inline u32 offset_of(int zero) {
  if constexpr (W_BITS == 4) return BASE + 0x00080008 + zero * 0x00010001;
  return pack2(static_cast<float>(zero), static_cast<float>(zero));
}

// Register r of a fragment from its word: two codes of row g, r even, or g + 8. Exact.
inline u32 two_of_word(u32 word, int r, u32 offset) {
  u32 code;
  asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(code) : "r"(word >> 4 * r), "n"(BASE));
  return sub2(code, offset);
}

// Two of four 8-bit codes, exact. An integer is (128 + its lowest seven bits) − (128, or 256 if it is negative); e4m3
// has the bits of a 16-bit float whose exponent is too small by a constant, which `power` makes up for.
inline u32 two_of_bytes(u32 codes, int second, u32 offset, u32 power) {
  if constexpr (IS_E4M3) {
    const u32 high = __byte_perm(codes, 0, second ? 0x3424 : 0x1404);
    constexpr u32 SHIFT = IS_BF16 ? 4 : 1, REST = IS_BF16 ? 0x07F007F0 : 0x3F803F80;
    return mul2((high >> SHIFT & REST) | (high & 0x80008000), power);
  } else {
    const u32 low = __byte_perm(codes, 0, second ? 0x4342 : 0x4140);
    const u32 a = sub2((low & 0x007F007F) | BASE, (low & 0x00800080) | BASE);
    return ZERO ? sub2(a, offset) : a;
  }
}
