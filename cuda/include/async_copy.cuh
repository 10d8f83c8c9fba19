// Copies from global to shared memory that a thread asks for and does not wait for (8.0 and later).
#pragma once

#include "shared_memory.cuh"

namespace oxi {

// kBytes (4, 8 or 16) to `to`, zeros unless `inside`; `from` is then not read. 16 pass L1 by.
template <int kBytes>
__device__ inline void copy_async(void *to, const void *from, bool inside) {
  const unsigned address = shared_address(to);
  const int size = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(size), "n"(kBytes)
                 : "memory");
  }
}

// The copies that this thread has asked for since the last call are a batch, if only an empty one.
__device__ inline void end_of_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all of this thread's batches have arrived but the latest N. Other threads see them after a barrier.
template <int N>
__device__ inline void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace oxi
