// Programmatic dependent launch: on devices that have it (9.0 and later) a kernel may start before the one ahead of it in
// the stream has ended, so that launch latency and index arithmetic overlap with that one's end.
#pragma once

namespace oxi {

#if __CUDA_ARCH__ >= 900
constexpr bool kStartsEarly = true;
#else
constexpr bool kStartsEarly = false;
#endif

// Wait until all earlier work of the stream is done and its memory visible. Every kernel calls it, in every thread, before
// it reads or writes global memory, but for what it prefetches: all are launched so that they may start early.
__device__ inline void wait_for_earlier_work() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Ask, before the wait, for the line at this address to be brought to the L2 cache, where nothing goes stale: earlier work
// writes it there too.
__device__ inline void prefetch_early(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Let the next kernel start once every block has called this or ended; by default it starts when all have ended. It takes
// room on the multiprocessors while it waits, so this is for what ends soon. To be called after the wait: what the next
// kernel may read before its own is then done, whoever wrote that kernel.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace oxi
