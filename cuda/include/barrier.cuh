// Barriers in shared memory (9.0 and later), on which some threads wait for what others, or copies, have done.
#pragma once

#include "params.h"
#include "shared_memory.cuh"

namespace oxi {

// One phase ends when `count` arrivals have come, and the next begins.
struct Barrier {
  unsigned long long word;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(count) : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }

  // At the barrier that another block of the cluster has in the same place.
  __device__ __forceinline__ void arrive_in(int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 other;\n"
        "mapa.shared::cluster.u32 other, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [other];\n"
        "}" ::"r"(shared_address(&word)),
        "r"(rank)
        : "memory");
  }

  // The present phase ends no sooner than so many bytes of bulk copies are there.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }

  // How long a thread sleeps at most before it looks again: often, and it takes time from others.
  static constexpr int kNanoseconds = 1000000;

// By the scope of what is waited for, which has to stand in the instruction's text.
#define OXI_MBARRIER_WAIT(scope)                                                              \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred done;\n"                                                                    \
      "again:\n"                                                                              \
      "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 done, [%0], %1, %2;\n"      \
      "@!done bra again;\n"                                                                   \
      "}" ::"r"(shared_address(&word)),                                                       \
      "r"(parity), "n"(kNanoseconds)                                                          \
      : "memory")

  // Wait for the end of the phase of this parity: 0 for the first one, 1 for the second, and so on.
  __device__ __forceinline__ void wait(unsigned parity) { OXI_MBARRIER_WAIT("cta"); }

  // The same where what other blocks of the cluster did or sent is waited for.
  __device__ __forceinline__ void wait_for_cluster(unsigned parity) { OXI_MBARRIER_WAIT("cluster"); }

#undef OXI_MBARRIER_WAIT
};

// Whether this thread is the one of its warp to ask for copies: of one that is chosen like this the compiler knows that it is
// alone, and issues them without a loop over whoever else might be there.
__device__ __forceinline__ bool elected() {
  unsigned is_elected;
  asm volatile(
      "{\n"
      ".reg .pred is_elected;\n"
      "elect.sync _|is_elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, is_elected;\n"
      "}"
      : "=r"(is_elected));
  return is_elected != 0;
}

__device__ __forceinline__ void prefetch_map(const OxiTensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copy a box of a tensor to shared memory, whatever lies outside of the tensor as zeros; of its dimensions the innermost one
// first. To be asked for by one thread, after `barrier` expects the bytes.
__device__ __forceinline__ void copy_box(void *to, const OxiTensorMap &map, int i0, int i1, int i2, int i3,
                                         Barrier &barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
      ::"r"(shared_address(to)), "l"(&map), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "r"(shared_address(&barrier.word))
      : "memory");
}

// The counterpart of copy_box: what lies outside of the tensor is left out. The shared memory may be written again after
// wait_for_bulk_reads by the same thread.
__device__ __forceinline__ void store_box(const OxiTensorMap &map, int i0, int i1, int i2, int i3, const void *from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(i0), "r"(i1), "r"(i2), "r"(i3), "r"(shared_address(from))
      : "memory");
}

// Copies of so many bytes, a multiple of 16, between 16-byte aligned addresses: as copy_box and as store_box.
__device__ __forceinline__ void copy_bytes(void *to, const void *from, int bytes, Barrier &barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier.word))
               : "memory");
}
__device__ __forceinline__ void store_bytes(void *to, const void *from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}

// Until the shared memory of all of this thread's stores but the latest N is read.
template <int N>
__device__ __forceinline__ void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// The stage of a ring of kStages, and the parity of its barriers' phases.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;

  // By up to kStages.
  __device__ __forceinline__ void advance(int steps = 1) {
    stage += steps;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
};

}  // namespace oxi
