// y [M, N] = x [M, K] · wᵀ [N, K], w in codes of 8 bits, M ≤ 64, bound by the bytes of w: tensor cores (wgmma) read codes of
// w and of x from shared memory as they lie on disk. Where x has 16 bits, w becomes 16 bits in registers.
//
//   a block      tile after tile: TILE_ROWS rows of w, all columns, all of x
//   two threads  stream w and x through rings of their own (tensor maps); w starts before x is there (dependent launch)
//   warpgroups   64 rows each (those past the tile's are multiplied and forgotten), every K_GROUPS-th box of 128 columns
//   a cluster    of SPLIT blocks (16 bits) has a tile's columns in as many runs: of x, too, each reads its columns alone
//
//   w ring  W_STAGES × BOXES × [TILE_ROWS][128]     x ring  X_STAGES × X_BOXES × (16 bits: 2 ×) [M_TILE][128 bytes]
//
// All with the 128-byte swizzle. A tensor core's own sum of FP8 products keeps 14 bits: every 128 columns it goes to float32.
// Sums of warpgroups are added in their order, then those of a cluster's blocks.
//
// Where x has 16 bits and a tile has two or three strips of 16 rows, no warp makes weights of rows past it. The warps of a
// team share out strips and half boxes of 64 columns; a warpgroup with two halves multiplies by both of x, and each warp keeps
// the sums of its own.
//
//   48 rows: strip  0 1 2 0 | 1 2 0 1 | 2 0 1 2   half  0 0 0 1 | 1 1 2 2 | 2 3 3 3      32: strip  0 1 0 1   half  0 0 1 1
//
// Definitions: IS_INT8 (else e4m3), X_KIND (common.cuh; INT and E4M3: codes like w's), IN_BLOCKS (scales of 128 × 128 of w and
// of 128 columns of x), Y_KIND (BF16, F16, F32), M_TILE (8, 16, 32, 64), TILE_ROWS (a multiple of 16, at most 256), K_GROUPS,
// X_BOXES (a multiple of it: of a slot of x), BOXES (a multiple of that: of a slot of w), W_STAGES, X_STAGES, SPLIT.

#include "common.cuh"
#include "wgmma_order.cuh"

#define HAS_CODES (X_KIND != BF16 && X_KIND != F16)
#if IS_INT8 && HAS_CODES
using Sum = int;
using Sum4 = int4;
#else
using Sum = float;
using Sum4 = float4;
#endif

struct alignas(64) TensorMap {
  u64 words[16];
};

struct Params {
  TensorMap w, x;             // bytes, boxes of [TILE_ROWS][128] and [M_TILE][128]
  void* y;                    // [M][N]
  const float* w_scale;       // [N]; IN_BLOCKS: [ceil(N / 128)][num_blocks]
  const float* x_scale;       // [M], x_scale_step apart; IN_BLOCKS: [M][num_blocks]; read with codes
  const signed char* x_zero;  // like x_scale, or null
  const int* w_sum;           // [N]: of the codes of a row; read with x_zero
  const void* bias;           // [N] like y, or null
  int m, n, num_blocks, x_scale_step;  // num_blocks: of 128 columns
};

constexpr bool SUMS_INTEGERS = IS_INT8 && HAS_CODES, SPLITS = !HAS_CODES && TILE_ROWS <= 48;
constexpr int ROW_WARPS = TILE_ROWS / 16, ROW_GROUPS = (TILE_ROWS + 63) / 64;
constexpr int STRIPS = ROW_WARPS == 3 ? 3 : 2;  // SPLITS: of a team
constexpr int TEAM = !SPLITS ? ROW_GROUPS : STRIPS == 3 ? 3 : 1;  // warpgroups
constexpr int TEAM_HALVES = !SPLITS ? 1 : STRIPS == 3 ? 4 : 2;  // half boxes that a team has at a time
constexpr int TEAM_BOXES = TEAM_HALVES == 4 ? 2 : 1, PARTS = K_GROUPS * TEAM_HALVES;
constexpr int SUMS = M_TILE / 2, PIECES = SUMS / 4, PRODUCTS = SPLITS ? 2 * SUMS : SUMS;  // of a thread
constexpr int CONSUMERS = 128 * TEAM * K_GROUPS, THREADS = CONSUMERS + 64;
constexpr int HALVES = HAS_CODES ? 1 : 2, X_HALF = M_TILE * 128, X_BOX = HALVES * X_HALF, W_BOX = TILE_ROWS * 128;
constexpr int W_BYTES = BOXES * W_BOX, X_BYTES = X_BOXES * X_BOX;
constexpr int X_AT = W_STAGES * W_BYTES, PARTS_AT = X_AT + X_STAGES * X_BYTES;
// What other blocks of a cluster have of a block's share of the sums, for a tile and the next: [2][SPLIT - 1][SHARE][lanes].
constexpr int SHARE = PIECES / SPLIT, INBOX_BYTES = (SPLIT - 1) * SHARE * ROW_WARPS * 512;
constexpr int INBOX_AT = PARTS_AT + (PARTS - 1) * TILE_ROWS * M_TILE * 4, W_BARRIERS_AT = INBOX_AT + 2 * INBOX_BYTES;
constexpr int X_BARRIERS_AT = W_BARRIERS_AT + 16 * W_STAGES, INBOX_BARRIER_AT = X_BARRIERS_AT + 16 * X_STAGES;
constexpr int FACTS_AT = INBOX_BARRIER_AT + 16;
static_assert(X_BOXES % (K_GROUPS * TEAM_BOXES) == 0 && BOXES % X_BOXES == 0, "every group has its boxes");
static_assert(SPLIT == 1 || (!HAS_CODES && PIECES % SPLIT == 0), "every block has a share");

// ---- tensor maps ----

inline void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

inline u64 evict_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- tensor cores: d [64 × 2 PRODUCTS] (+)= w [64 × 32 bytes of x] · xᵀ, asynchronously ----

#if X_KIND == BF16
#define SUM "+f"
#define KINDS "k16.f32.bf16.bf16 "
#define TAIL ", add, 1, 1, 0;"
#elif X_KIND == F16
#define SUM "+f"
#define KINDS "k16.f32.f16.f16 "
#define TAIL ", add, 1, 1, 0;"
#elif IS_INT8
#define SUM "+r"
#define KINDS "k32.s32.s8.s8 "
#define TAIL ", add;"
#else
#define SUM "+f"
#define KINDS "k32.f32.e4m3.e4m3 "
#define TAIL ", add, 1, 1;"
#endif
#define D4(i) SUM(d[i]), SUM(d[i + 1]), SUM(d[i + 2]), SUM(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#if HAS_CODES || TILE_ROWS > 48
#define WIDTH M_TILE
#else
#define WIDTH (2 * M_TILE)
#endif
#if WIDTH == 8
#define SUMS_OF D4(0)
#define D "n8" KINDS "{%0, %1, %2, %3}, "
#define REST 4, 5, 6, 7, 8, 9
#elif WIDTH == 16
#define SUMS_OF D4(0), D4(4)
#define D "n16" KINDS "{%0, %1, %2, %3, %4, %5, %6, %7}, "
#define REST 8, 9, 10, 11, 12, 13
#elif WIDTH == 32
#define SUMS_OF D16(0)
#define D "n32" KINDS "{" TEN() ", %10, %11, %12, %13, %14, %15}, "
#define REST 16, 17, 18, 19, 20, 21
#elif WIDTH == 64
#define SUMS_OF D16(0), D16(16)
#define D "n64" KINDS "{" TEN() ", " TEN(1) ", " TEN(2) ", %30, %31}, "
#define REST 32, 33, 34, 35, 36, 37
#elif WIDTH == 128
#define SUMS_OF D16(0), D16(16), D16(32), D16(48)
#define D "n128" KINDS "{" TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", %60, %61, %62, %63}, "
#define REST 64, 65, 66, 67, 68, 69
#endif
#define OF(macro, ...) macro(__VA_ARGS__)

// w: a descriptor, or a fragment. adds: 0: d is not read.
#if HAS_CODES
#define OPERANDS(w, x, adds, ...) "%" #w ", %" #x
#define FLAG(w, x, adds, ...) "%" #adds
inline void multiply(Sum (&d)[PRODUCTS], u64 w, u64 x, int adds) {
  asm volatile("{ .reg .pred add; setp.ne.s32 add, " OF(FLAG, REST) ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64" D OF(OPERANDS, REST) TAIL " }"
               : SUMS_OF
               : "l"(w), "l"(x), "r"(adds));
}
#else
#define OPERANDS(a, b, c, d, x, ...) "{%" #a ", %" #b ", %" #c ", %" #d "}, %" #x
inline void multiply(Sum (&d)[PRODUCTS], const u32 (&w)[4], u64 x) {
  asm volatile("{ .reg .pred add; setp.eq.s32 add, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64" D OF(OPERANDS, REST) TAIL " }"
               : SUMS_OF
               : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}
#endif

// ---- what a block goes over ----

struct Ring {
  u32 barriers;  // of each slot: full, empty
  int stages, slot = 0;
  u32 parity = 0;

  u32 full() const { return barriers + slot * 16; }
  u32 empty() const { return full() + 8; }
  void next() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// Tiles first, first + stride, …, each in steps of BOXES boxes from first_box on. rank: in the cluster.
struct Run {
  int rank, first, stride, end, first_box, steps;

  inline Run(const Params& p)
      : rank(blockIdx.x % SPLIT), first(blockIdx.x / SPLIT), stride(gridDim.x / SPLIT),
        end((p.n + TILE_ROWS - 1) / TILE_ROWS) {
    const int all = (p.num_blocks + BOXES - 1) / BOXES, from = all * rank / SPLIT;
    first_box = from * BOXES, steps = all * (rank + 1) / SPLIT - from;
  }
};

inline void produce_w(const Params& p, const Run& run, u32 shared) {
  const u64 once = evict_first();
  Ring ring{shared + W_BARRIERS_AT, W_STAGES};
  for (int tile = run.first; tile < run.end; tile += run.stride)
    for (int i = 0; i < run.steps; ++i, ring.next()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), W_BYTES);
      const u32 to = shared + ring.slot * W_BYTES;
      for (int box = 0; box < BOXES; ++box)
        copy_box(to + box * W_BOX, p.w, (run.first_box + i * BOXES + box) * 128, tile * TILE_ROWS, ring.full(), once);
    }
}

// IN_BLOCKS: what x is multiplied by in the boxes of a slot, [X_STAGES][X_BOXES][M_TILE]; lanes load it a slot ahead.
struct SlotScales {
  static constexpr int PER_LANE = (X_BOXES * M_TILE + 31) / 32;
  float value[PER_LANE];

  inline void load(const Params& p, int first) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int at = i * 32 + threadIdx.x % 32, m = min(at % M_TILE, p.m - 1);
      const int block = min(first + at / M_TILE, p.num_blocks - 1);
      value[i] = p.x_scale[static_cast<long long>(m) * p.num_blocks + block];
    }
  }

  inline void store(float* to) const {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + threadIdx.x % 32 < X_BOXES * M_TILE) to[i * 32 + threadIdx.x % 32] = value[i];
    __syncwarp();
  }
};

inline void produce_x(const Params& p, const Run& run, u32 shared, float* scales) {
  const u64 often = evict_last();
  Ring ring{shared + X_BARRIERS_AT, X_STAGES};
  SlotScales next;
  asm volatile("prefetch.tensormap [%0];" ::"l"(&p.x) : "memory");
  wait_for_previous();
  if constexpr (IN_BLOCKS) next.load(p, 0);
  for (int tile = run.first; tile < run.end; tile += run.stride)
    for (int i = 0; i < run.steps; ++i)
      for (int part = 0; part < BOXES; part += X_BOXES, ring.next()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        if constexpr (IN_BLOCKS) {
          next.store(scales + ring.slot * X_BOXES * M_TILE);
          next.load(p, (i * BOXES + part + X_BOXES) % (run.steps * BOXES));
        }
        if (threadIdx.x % 32 != 0) continue;
        barrier_expect(ring.full(), X_BYTES);
        const u32 to = shared + X_AT + ring.slot * X_BYTES;
        const int first = (run.first_box + i * BOXES + part) * HALVES;
        for (int half = 0; half < X_BOXES * HALVES; ++half)
          copy_box(to + half * X_HALF, p.x, (first + half) * 128, 0, ring.full(), often);
      }
}

// ---- the end of a tile ----

// What there is of each row of x: thread m asks for it before anything is multiplied.
struct Fact {
  float scale;
  int zero;

  inline Fact(const Params& p) {
    const int at = min(static_cast<int>(threadIdx.x), p.m - 1) * p.x_scale_step;
    scale = IN_BLOCKS || !HAS_CODES ? 1.0f : p.x_scale[at];
    zero = p.x_zero ? p.x_zero[at] : 0;
  }
};

inline void store(const Params& p, long long at, float value) {
  if constexpr (Y_KIND == F32)
    static_cast<float*>(p.y)[at] = value;
  else
    static_cast<u16*>(p.y)[at] = narrow<Y_KIND>(value);
}

// What there is of two rows of w: asked for before they are multiplied.
struct Rows {
  int n[2], sum[2];
  float scale[2], bias[2];

  inline Rows(const Params& p, int first) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      n[below] = first + 8 * below;
      const int at = min(n[below], p.n - 1);
      scale[below] = IN_BLOCKS ? 1.0f : p.w_scale[at];
      bias[below] = p.bias ? value_at<Y_KIND>(p.bias, at) : 0;
      sum[below] = p.x_zero ? p.w_sum[at] : 0;
    }
  }
};

// total[4 i + 2 b + c] is row n[b] of w, row 8 i + 2 t + c of x. rank: whose share of them.
inline void write(const Params& p, const Fact* facts, const Rows& rows, const Sum (&total)[SUMS], int t, int rank) {
#pragma unroll
  for (int j = 0; j < SUMS; ++j) {
    if (j / 4 / SHARE != rank) continue;
    const int m = j / 4 * 8 + 2 * t + j % 2, below = j / 2 % 2, n = rows.n[below];
    if (m >= p.m || n >= p.n) continue;
    const Sum sum = SUMS_INTEGERS ? total[j] - facts[m].zero * rows.sum[below] : total[j];
    const float value = static_cast<float>(sum) * rows.scale[below] * facts[m].scale + rows.bias[below];
    store(p, static_cast<long long>(m) * p.n + n, value);
  }
}

// Sums of the same rows in [PARTS - 1][PIECES][ROW_WARPS][32], added up in order by who has part 0.
inline void add_up(Sum4* parts, Sum (&total)[SUMS], int part, bool is_real) {
  constexpr int STEP = ROW_WARPS * 32;
  if (part > 0 && is_real)
#pragma unroll
    for (int j = 0; j < PIECES; ++j)
      parts[((part - 1) * PIECES + j) * STEP] = {total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]};
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  if (part > 0 || !is_real) return;
  for (int other = 0; other < PARTS - 1; ++other)
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      const Sum4 sum = parts[(other * PIECES + j) * STEP];
      total[4 * j] += sum.x, total[4 * j + 1] += sum.y, total[4 * j + 2] += sum.z, total[4 * j + 3] += sum.w;
    }
}

inline void wait_for_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Every block of a cluster sends the others their shares, and adds up its own in the order of the blocks. Room and barriers
// for two tiles, in turn: who sends a share of the tile after the next has got all of the next, which a block sends when it
// has read those of this one.
struct Inbox {
  u8* memory;
  u32 barriers, tile = 0;

  u32 full() const { return barriers + tile % 2 * 8; }
  // By one thread: what is to come for a tile.
  void expect() const {
    if (SPLIT > 1) barrier_expect(full(), INBOX_BYTES);
  }

  void exchange(Sum (&total)[SUMS], int rank, int row_warp, int lane) {
    if constexpr (SPLIT == 1) return;
    Sum4* from = reinterpret_cast<Sum4*>(memory + tile % 2 * INBOX_BYTES) + row_warp * 32 + lane;
    auto place = [&](int sender, int receiver, int j) {
      return from + ((sender - (sender > receiver)) * SHARE + j % SHARE) * ROW_WARPS * 32;
    };
#pragma unroll
    for (int j = 0; j < PIECES; ++j)
      if (j / SHARE != rank) send(shared_address(place(rank, j / SHARE, j)), j / SHARE, &total[4 * j]);
    wait_for_cluster(full(), tile / 2 % 2);
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      if (j / SHARE != rank) continue;
      Sum4 sum = {};
#pragma unroll
      for (int sender = 0; sender < SPLIT; ++sender) {
        Sum4 part = {total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]};
        if (sender != rank) part = *place(sender, rank, j);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      total[4 * j] = sum.x, total[4 * j + 1] = sum.y, total[4 * j + 2] = sum.z, total[4 * j + 3] = sum.w;
    }
    if (row_warp == 0 && lane == 0) expect();  // of the tile after the next
    ++tile;
  }

  // To the same place of another block.
  void send(u32 to, int receiver, const Sum* sums) const {
    const u32* bits = reinterpret_cast<const u32*>(sums);
    asm volatile(
        "{ .reg .b32 there, full; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 full, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [full]; }" ::"r"(to),
        "r"(full()), "r"(receiver), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
        : "memory");
  }
};

// ---- multiplying ----

// Adds a slot of x to the sums of 64 rows: sums of FP8 by way of `d`, others in `d`.
#if HAS_CODES
// w_scale: of this warp's rows, for each box; x_scale: of the slot.
inline void multiply_slot(u32 w, u32 x, Sum (&d)[PRODUCTS], Sum (&total)[SUMS], const float* x_scale,
                          const float* w_scale) {
#pragma unroll
  for (int box = 0; box < X_BOXES; box += K_GROUPS) {
    const u64 w_at = descriptor(w + box * W_BOX), x_at = descriptor(x + box * X_BOX);
    registers_are_written();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply(d, w_at + 2 * k, x_at + 2 * k, IS_INT8 || k > 0);
    commit();
    if (IS_INT8 && box < X_BOXES - K_GROUPS) continue;
    float scale[M_TILE / 4];
    if constexpr (IN_BLOCKS)
#pragma unroll
      for (int i = 0; i < M_TILE / 8; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(x_scale + box * M_TILE + 8 * i);
        scale[2 * i] = pair.x * w_scale[box], scale[2 * i + 1] = pair.y * w_scale[box];
      }
    wait_but<0>();
    if constexpr (!IS_INT8)
#pragma unroll
      for (int j = 0; j < SUMS; ++j) total[j] += IN_BLOCKS ? d[j] * scale[j / 4 * 2 + j % 2] : d[j];
  }
}
#else
// Products of 16 columns of w and a slot of x, in its order. A lane's codes are 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of rows g
// and g + 8; a word has those of two lanes.
struct Slot {
  static constexpr int OF_BOX = SPLITS ? 4 : 8, STEP = K_GROUPS * TEAM_BOXES, COUNT = OF_BOX * X_BOXES / STEP;
  u32 w, x, chunk;  // chunk: of 16 bytes, by the swizzle

  inline Slot(u32 w_at, u32 x_at, int half, int g, int t)
      : w(w_at + g * 128 + t / 2 * 4), x(x_at), chunk((half * 4 ^ g) * 16) {}
  inline void load(u32 (&words)[4], int i) const {
    const u32 at = w + i / OF_BOX * STEP * W_BOX + (chunk ^ i % OF_BOX * 16);
#pragma unroll
    for (int r = 0; r < 4; ++r)
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[r]) : "r"(at + r % 2 * 1024 + r / 2 * 8));
  }
  inline u64 x_of(int i) const {
    return descriptor(x + i / OF_BOX * STEP * X_BOX + i % OF_BOX / 4 * X_HALF) + 2 * (i % 4);
  }
};

// Adds them to the sums. While some are multiplied the next are made; their words have been asked for before.
inline void multiply_slot(const Slot& slot, Sum (&d)[PRODUCTS], bool is_second) {
  constexpr int TOGETHER = PRODUCTS < 32 ? 4 : 2;
  u32 words[TOGETHER][4], a[2][TOGETHER][4];
  auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) slot.load(words[j], first + j);
  };
  load(0);
#pragma unroll
  for (int first = 0; first < Slot::COUNT; first += TOGETHER) {
    u32(&now)[TOGETHER][4] = a[first / TOGETHER % 2];
    if (first >= 2 * TOGETHER) wait_but<1>();
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) now[j][r] = pair_of_8<IS_INT8 ? INT : E4M3, X_KIND>(words[j][r], is_second * 2);
    if (first + TOGETHER < Slot::COUNT) load(first + TOGETHER);
    registers_are_written();
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) multiply(d, now[j], slot.x_of(first + j));
    commit();
  }
  wait_but<0>();
}
#endif

inline void consume(const Params& p, const Run& run, u8* memory, u32 shared) {
  const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32 % 4;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler learns that a warp has one
  const int of_team = warpgroup % TEAM, k_group = warpgroup / TEAM, unit = of_team * 4 + warp;
  const int row_warp = SPLITS ? unit % STRIPS : unit, half = SPLITS ? unit / STRIPS : 0;
  const int part = k_group * TEAM_HALVES + half;
  const bool is_real = row_warp < ROW_WARPS;
  Sum4* parts = reinterpret_cast<Sum4*>(memory + PARTS_AT) + row_warp * 32 + lane;
  Fact* facts = reinterpret_cast<Fact*>(memory + FACTS_AT);
  const float* x_scales = reinterpret_cast<const float*>(facts + M_TILE) + k_group * M_TILE + 2 * t;
  Ring w{shared + W_BARRIERS_AT, W_STAGES}, x{shared + X_BARRIERS_AT, X_STAGES};
  Inbox inbox{memory + INBOX_AT, shared + INBOX_BARRIER_AT};
  wait_for_previous();
  const Fact fact(p);
  for (int tile = run.first; tile < run.end; tile += run.stride) {
    const Rows rows(p, tile * TILE_ROWS + row_warp * 16 + lane / 4);
    const int row_block = min(tile * TILE_ROWS + row_warp * 16, p.n - 1) / 128;
    const float* w_scales = p.w_scale + static_cast<long long>(row_block) * p.num_blocks;
    float w_scale[BOXES], next[BOXES];
    auto load_scales = [&](int i) {
#pragma unroll
      for (int box = 0; box < BOXES; box += K_GROUPS)
        next[box] = w_scales[min(i * BOXES + box + k_group, p.num_blocks - 1)];
    };
    Sum d[PRODUCTS] = {}, total[SUMS] = {};
    if constexpr (IN_BLOCKS) load_scales(0);
    for (int i = 0; i < run.steps; ++i, w.next()) {
      if constexpr (IN_BLOCKS) {
#pragma unroll
        for (int box = 0; box < BOXES; box += K_GROUPS) w_scale[box] = next[box];
        load_scales(i + 1 < run.steps ? i + 1 : 0);
      }
      barrier_wait(w.full(), w.parity);
      const u32 w_at = shared + w.slot * W_BYTES + k_group * TEAM_BOXES * W_BOX;
#pragma unroll
      for (int box = 0; box < BOXES; box += X_BOXES, x.next()) {
        barrier_wait(x.full(), x.parity);
        const u32 x_at = shared + X_AT + x.slot * X_BYTES + k_group * TEAM_BOXES * X_BOX;
#if HAS_CODES
        multiply_slot(w_at + box * W_BOX + of_team * 8192, x_at, d, total, x_scales + x.slot * X_BOXES * M_TILE,
                      w_scale + box);
#else
        const u32 of_warp = w_at + (box + half / 2) * W_BOX + row_warp * 2048;
        const Slot slot(of_warp, x_at + (SPLITS ? of_team * X_HALF : 0), half % 2, lane / 4, t);
        multiply_slot(slot, d, t % 2);
#endif
        if (lane == 0) barrier_arrive(x.empty());
      }
      if (lane == 0) barrier_arrive(w.empty());
    }
    if constexpr (IS_INT8 || !HAS_CODES)
#pragma unroll
      for (int j = 0; j < SUMS; ++j) total[j] = half > of_team ? d[PRODUCTS - SUMS + j] : d[j];
    if (tile == run.first && threadIdx.x < M_TILE) facts[threadIdx.x] = fact;  // a store waits for what it stores
    add_up(parts, total, part, is_real);
    if (part == 0 && is_real) {
      inbox.exchange(total, run.rank, row_warp, lane);
      write(p, facts, rows, total, t, run.rank);
    }
    if ((PARTS > 1 || SPLIT > 1) && tile + run.stride < run.end)  // the next may be left, and sent
      asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) byte_stream(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  if (threadIdx.x == CONSUMERS) {
    for (int slot = 0; slot < W_STAGES + X_STAGES; ++slot) {
      barrier_init(shared + W_BARRIERS_AT + slot * 16, 1);                   // full
      barrier_init(shared + W_BARRIERS_AT + slot * 16 + 8, CONSUMERS / 32);  // empty
    }
    barrier_init(shared + INBOX_BARRIER_AT, 1), barrier_init(shared + INBOX_BARRIER_AT + 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (u32 tile = 0; tile < 2; ++tile) Inbox{memory, shared + INBOX_BARRIER_AT, tile}.expect();
    launch_dependents();
  }
  if constexpr (SPLIT > 1)
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  else
    __syncthreads();
  const Run run(p);
  if (threadIdx.x == CONSUMERS) produce_w(p, run, shared);
  __syncwarp();
  if (threadIdx.x < CONSUMERS)
    consume(p, run, memory, shared);
  else if (threadIdx.x >= CONSUMERS + 32)
    produce_x(p, run, shared, reinterpret_cast<float*>(memory + FACTS_AT + 8 * M_TILE));
  __syncwarp();  // no branch ends the kernel: the compiler keeps descriptors where a warp has one
}
