// Shared memory as instructions address it, and 8 x 8 blocks of 16-bit elements from there.
#pragma once

namespace oxi {

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 blocks, lanes 8 i to 8 i + 7 giving the addresses of block i's rows: word i of a lane is columns
// 2 (lane % 4) + {0, 1} of row lane / 4 of block i.
__device__ __forceinline__ void load_blocks(unsigned (&words)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// The same, each block transposed: rows 2 (lane % 4) + {0, 1} of column lane / 4.
__device__ __forceinline__ void load_transposed(unsigned (&words)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

}  // namespace oxi
