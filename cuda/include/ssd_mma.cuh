// What the chunk scan's kernels on a warp's products share.
#pragma once

#include "reduce.cuh"
#include "unknown.cuh"

namespace oxi {

__device__ __forceinline__ unsigned thread_now() { return unknown(threadIdx.x); }
__device__ __forceinline__ int lane_now() { return thread_now() % kWarp; }

// Of a block's kThreads threads, which are at different places in the code: compute-sanitizer takes `bar.sync` not to be made
// for that. On 8.x the other form takes more registers than there are with a dstate of 256.
template <int kThreads>
__device__ __forceinline__ void synchronize_all() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.sync 0, %0;" ::"n"(kThreads) : "memory");
#else
  asm volatile("bar.sync 0, %0;" ::"n"(kThreads) : "memory");
#endif
}

}  // namespace oxi
