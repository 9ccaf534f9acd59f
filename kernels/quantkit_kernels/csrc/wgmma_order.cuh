// What every use of wgmma (compute capability 9.0) needs around its products: their order, and where operands lie.
#pragma once

#include "common.cuh"

inline void registers_are_written() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT>
inline void wait_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// [rows][128 bytes] in shared memory, the eight 16-byte chunks of row r in the order c ^ (r % 8).
inline u64 descriptor(u32 address) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 64ull << 32, UNUSED = 1ull << 16;
  return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address & 0x3FFFF) >> 4;
}
