// What the kernels share: PTX that CUDA C++ has no word for. No headers: NVRTC has none without a toolkit.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec16 {
  u32 w[4];
};

// What a value is, as definitions say it (`KINDS` of strip_weight.py).
#define INT 0
#define E4M3 1
#define BF16 2
#define F16 3
#define F32 4

// ---- numbers of 16 bits: KIND is BF16 or F16 ----

template <int KIND>
inline float widen(u16 bits) {
  float f;
  if constexpr (KIND == BF16)
    f = __uint_as_float(static_cast<u32>(bits) << 16);
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// The two of a register; the first is in the lower bits.
template <int KIND>
inline float2 widen2(u32 pair) {
  return {widen<KIND>(static_cast<u16>(pair)), widen<KIND>(static_cast<u16>(pair >> 16))};
}

// Value i of an array in KIND, or in F32.
template <int KIND>
inline float value_at(const void* values, u64 i) {
  if constexpr (KIND == F32)
    return static_cast<const float*>(values)[i];
  else
    return widen<KIND>(static_cast<const u16*>(values)[i]);
}

template <int KIND>
inline u16 narrow(float value) {
  u16 bits;
  if constexpr (KIND == BF16)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

template <int KIND>
inline u32 narrow2(float low, float high) {
  u32 pair;
  if constexpr (KIND == BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Below compute capability 9.0 bf16 has nothing but fma.
template <int KIND>
inline u32 sub2(u32 a, u32 b) {
  u32 d;
  if constexpr (KIND == BF16 && __CUDA_ARCH__ < 900)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80), "r"(a));
  else if constexpr (KIND == BF16)
    asm("sub.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <int KIND>
inline u32 mul2(u32 a, u32 b) {
  u32 d;
  if constexpr (KIND == BF16 && __CUDA_ARCH__ < 900)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000));
  else if constexpr (KIND == BF16)
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// (a & mask) | bits, one instruction where the compiler would make two.
inline u32 select_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

// ---- codes of 8 bits to pairs of 16 bits, exact ----

// For `spread`: a word's first or second two codes, each with its sign eight times above it.
constexpr u32 FIRST_TWO = 0x9180, SECOND_TWO = 0xB3A2;

inline u32 spread(u32 codes, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(codes), "r"(selector));
  return d;
}

// Of two codes that are spread. bf16: (128 + the lowest seven bits) − (128, or 256 if it is negative); fp16: (1024 + code +
// 128) − 1152.
template <int KIND>
inline u32 pair_of_int8(u32 two) {
  if constexpr (KIND == F16) return sub2<F16>((two & 0x00FF00FF) ^ 0x64806480, 0x64806480);
  return sub2<BF16>(select_or(two, 0x007F007F, 0x43004300), select_or(two, 0x00800080, 0x43004300));
}

// Of two codes that are spread: the bits of 16-bit floats that are still to be multiplied by E4M3_POWER: their exponents are
// too small.
template <int KIND>
inline u32 bits_of_e4m3(u32 two) {
  return KIND == BF16 ? two << 4 & 0x87F087F0 : two << 7 & 0xBF80BF80;
}
template <int KIND>
constexpr u32 E4M3_POWER = KIND == BF16 ? 0x7B807B80 : 0x5C005C00;  // 2^120 or 2^8, twice

inline u32 e4m3_to_f16(u32 w, int first) {
  u32 d;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
      : "=r"(d)
      : "r"(w >> (8 * first)));
  return d;
}

// Two codes of CODE, bytes `first` (0 or 2) and `first + 1` of w.
template <int CODE, int KIND>
inline u32 pair_of_8(u32 w, int first) {
  if constexpr (CODE == E4M3 && KIND == F16) return e4m3_to_f16(w, first);
  const u32 two = spread(w, first ? SECOND_TWO : FIRST_TWO);
  if constexpr (CODE == E4M3) return mul2<KIND>(bits_of_e4m3<KIND>(two), E4M3_POWER<KIND>);
  return pair_of_int8<KIND>(two);
}

// ---- memory ----

inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes that are read once: past L1.
inline Vec16 load_streaming(const void* p) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}

inline Vec16 load_shared(u32 address) {
  Vec16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address));
  return v;
}

// ---- barriers in shared memory, and bulk copies that complete on them (sm_90) ----

inline void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Bytes that the present phase waits for, on top of arrivals.
inline void barrier_add_expected(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The same, and one arrival.
inline void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

inline void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

inline void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Bytes: a multiple of 16, both addresses too.
inline void bulk_copy(u32 to_shared, const void* from_global, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to_shared), "l"(from_global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

inline u64 evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- dependent launch (sm_90) ----

// Let the next kernel start; its reads of what this one writes wait for this one's end all the same.
inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Until the kernels in front have ended and their writes are seen.
inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
