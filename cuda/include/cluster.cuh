// Blocks of a cluster (9.0 and later): each sends to the shared memory of the others, which has the same places in all of them.
// An address there is of a block's shared memory as the cluster's instructions take it. No block may send before all have
// initialized what is sent to, nor end before what is sent to it has come: both by way of synchronize_cluster.
#pragma once

#include "barrier.cuh"

namespace oxi {

// Where in the block of this rank the place is that `own` is here.
__device__ __forceinline__ unsigned address_in(int rank, const void *own) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

// To an address in a block, whose barrier, at `full`, counts the bytes as it does those of copies: who waits there sees them.
__device__ __forceinline__ void send(unsigned to, float value, unsigned full) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(value),
               "r"(full)
               : "memory");
}
__device__ __forceinline__ void send(unsigned to, float4 values, unsigned full) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(full)
               : "memory");
}

// After barriers' initialization by this thread, before synchronize_cluster.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// By all threads of all blocks of the cluster.
__device__ __forceinline__ void synchronize_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace oxi
