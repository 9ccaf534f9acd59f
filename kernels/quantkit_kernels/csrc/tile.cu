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
// GROUP_STAGES (stages of a group), ZERO (zero points), X_KIND (BF16, F16), SCALE_KIND (of groups).

#include "common.cuh"

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
constexpr bool IS_BF16 = X_KIND == BF16;
constexpr int SCALE_SIZE = SCALE_KIND == F32 ? 4 : 2;
constexpr int W_STRIP = 256 * W_BITS, X_BYTES = M_TILE * 256, W_BYTES = STRIPS * W_STRIP;
constexpr int S_STRIP = GROUP_ROWS * 16 * SCALE_SIZE, Z_STRIP = ZERO ? GROUP_ROWS * 16 : 0;
constexpr int X_AT = 0, W_AT = X_AT + X_STAGES * X_BYTES, S_AT = W_AT + W_STAGES * W_BYTES;
constexpr int Z_AT = S_AT + W_STAGES * STRIPS * S_STRIP, RING_END = Z_AT + W_STAGES * STRIPS * Z_STRIP;
constexpr int PITCH = ROWS + 4;  // floats of a row of sums: banks
constexpr int SUMS_END = M_TILE * PITCH * 4;
constexpr int BARRIERS_AT = (RING_END > SUMS_END ? RING_END : SUMS_END) / 8 * 8 + 8;
constexpr u32 BASE = IS_BF16 ? 0x43004300 : 0x64006400;  // 128 or 1024, twice: a code in the lowest bits is added
static_assert(!ZERO || GROUP_ROWS, "zero points come in groups");
// Scales of groups that need not be numbers of x's dtype: weights are multiplied in float32.
constexpr bool IS_WIDE = GROUP_ROWS && SCALE_KIND != X_KIND;
constexpr bool IS_FUSED = W_BITS == 4 && IS_BF16 && GROUP_ROWS && !ZERO && !IS_WIDE;
constexpr int FRAGMENTS = 8 * HALVES, PER_GROUP = 2, SETS = 2;  // of a stage; issued together; such groups in flight

// ---- tensor cores ----

#define DECADE(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
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
#if X_KIND == BF16
#define SIXTEEN "bf16"
#else
#define SIXTEEN "f16"
#endif
#define TEXT_OF(n) #n
#define TEXT(n) TEXT_OF(n)

// d [64 × M_TILE] += a [64 × 16] · x [M_TILE × 16]ᵀ, asynchronously.
inline void multiply(float (&d)[M_TILE / 2], const u32 (&a)[4], u64 x) {
  asm volatile(
      "{ .reg .pred add; setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n" TEXT(M_TILE) "k16.f32." SIXTEEN "." SIXTEEN " " NAMES ", add, 1, 1, 0; }"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
}

inline void registers_are_written() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT>
inline void wait_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// [rows][64] in shared memory, rows of 128 bytes, the eight 16-byte chunks of row r in the order c ^ (r % 8).
inline u64 descriptor(u32 address) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 64ull << 32, UNUSED = 1ull << 16;
  return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address & 0x3FFFF) >> 4;
}

// ---- weights ----

inline u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." SIXTEEN "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// What a lane needs to make weights of its rows g and g + 8. scale: twice in the dtype of x; IS_WIDE: float32.
struct Grid {
  u32 offset[2], scale[2];
};

inline u32 scale_at(const u8* scale, int i) {
  if constexpr (IS_WIDE)
    return __float_as_uint(value_at<SCALE_KIND>(scale, i));
  else
    return __byte_perm(reinterpret_cast<const u16*>(scale)[i], 0, 0x1010);
}

constexpr u32 TWO_120 = 0x7B807B80, MINUS_TWO_MINUS_10 = 0xBA80BA80;  // bf16
constexpr u32 E4M3_POWER = IS_BF16 ? TWO_120 : 0x5C005C00;             // 2^120, or 2^8 in fp16

inline Grid grid_of(const u8* scale, const u8* zero, int g) {
  Grid grid;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    grid.offset[below] = BASE + 0x00080008;
    if constexpr (ZERO) {
      const int z = reinterpret_cast<const signed char*>(zero)[g + 8 * below];
      grid.offset[below] = W_BITS == 4 ? grid.offset[below] + z * 0x00010001 : narrow2<X_KIND>(z, z);
    }
    if constexpr (GROUP_ROWS > 0) grid.scale[below] = scale_at(scale, g + 8 * below);
    if constexpr (IS_FUSED) {
      grid.offset[below] = mul2<BF16>(grid.scale[below], MINUS_TWO_MINUS_10);
      grid.scale[below] = mul2<BF16>(grid.scale[below], TWO_120);
    }
    // below 256, or it would be IS_WIDE: the product is finite
    if constexpr (IS_E4M3 && GROUP_ROWS && !IS_WIDE) grid.scale[below] = mul2<X_KIND>(grid.scale[below], E4M3_POWER);
  }
  return grid;
}

// Two exact codes times their scale, rounded once.
inline u32 in_scale(u32 a, u32 scale) {
  if constexpr (IS_WIDE) {
    const float s = __uint_as_float(scale);
    const float2 codes = widen2<X_KIND>(a);
    return narrow2<X_KIND>(codes.x * s, codes.y * s);
  }
  return GROUP_ROWS ? mul2<X_KIND>(a, scale) : a;
}

// Eight codes to the 16 × 16 fragment's four registers, rounded once after the scale. IS_FUSED: a code u in the lowest
// bits of a bf16 is u · 2^-133, so that one fma makes (u − 8) · scale · 2^-13. Else (128 + u) − (136 + zero) is exact.
inline void fragment(u32 (&a)[4], u32 word, const Grid& grid) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (IS_FUSED) {
      a[r] = fma2(word >> 4 * r & 0x000F000F, grid.scale[r & 1], grid.offset[r & 1]);
    } else {
      u32 code;
      asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(code) : "r"(word >> 4 * r), "n"(BASE));
      a[r] = in_scale(sub2<X_KIND>(code, grid.offset[r & 1]), grid.scale[r & 1]);
    }
  }
}

// Two of four 8-bit codes. An integer is (128 + its lowest seven bits) − (128, or 256 if it is negative); e4m3 has the
// bits of a 16-bit float whose exponent is too small by a constant.
inline u32 two_of(u32 codes, int second, u32 offset, u32 scale) {
  if constexpr (IS_E4M3) {
    const u32 high = __byte_perm(codes, 0, second ? 0x3424 : 0x1404);
    constexpr u32 SHIFT = IS_BF16 ? 4 : 1, REST = IS_BF16 ? 0x07F007F0 : 0x3F803F80;
    const u32 code = (high >> SHIFT & REST) | (high & 0x80008000);
    if constexpr (IS_WIDE || !GROUP_ROWS) return in_scale(mul2<X_KIND>(code, E4M3_POWER), scale);
    return mul2<X_KIND>(code, scale);
  } else {
    const u32 low = __byte_perm(codes, 0, second ? 0x4342 : 0x4140);
    u32 a = sub2<X_KIND>((low & 0x007F007F) | BASE, (low & 0x00800080) | BASE);
    if constexpr (ZERO) a = sub2<X_KIND>(a, offset);
    return in_scale(a, scale);
  }
}

// Four codes each of rows g and g + 8.
inline void fragment(u32 (&a)[4], u32 above, u32 below, const Grid& grid) {
  a[0] = two_of(above, 0, grid.offset[0], grid.scale[0]);
  a[1] = two_of(below, 0, grid.offset[1], grid.scale[1]);
  a[2] = two_of(above, 1, grid.offset[0], grid.scale[0]);
  a[3] = two_of(below, 1, grid.offset[1], grid.scale[1]);
}

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

inline void cluster_sync() {
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
    __syncwarp();
    barrier_wait(shared + BARRIERS_AT + slot * 16, parity);
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
  asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");  // nobody reads the ring any more
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
  constexpr float SUM_SCALE = IS_FUSED ? 8192 : 1;
  float scale[4] = {SUM_SCALE, SUM_SCALE, SUM_SCALE, SUM_SCALE}, bias[4] = {0, 0, 0, 0};
  for (int c = 0; c < here; ++c) {
    if (GROUP_ROWS == 0) scale[c] = reinterpret_cast<const float*>(p.scale)[n + c];
    if (p.bias != nullptr) bias[c] = widen<X_KIND>(p.bias[n + c]);
  }
  for (int row = rank + threadIdx.x / PER_ROW * split; row < num_rows; row += STEP * split) {
    float4 sum = {0, 0, 0, 0};
    for (int from = 0; from < split; ++from) {
      const float4 part = load_of(shared + (row * PITCH + column) * 4, from);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    u32 pair[2] = {narrow2<X_KIND>(sum.x * scale[0] + bias[0], sum.y * scale[1] + bias[1]),
                   narrow2<X_KIND>(sum.z * scale[2] + bias[2], sum.w * scale[3] + bias[3])};
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
    cluster_sync();
    cluster_sync();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    consume(p, work, memory, shared);
    cluster_sync();
    store(p, work, shared, split, rank);
    cluster_sync();  // the others may still read these sums
  }
}
