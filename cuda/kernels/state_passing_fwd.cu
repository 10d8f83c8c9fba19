// The recurrence over chunk states, forward. Equals oxiscan.reference.state_passing.
//
//   state[0] = initial_states, or 0        state[c + 1] = exp(decay[c]) state[c] + states[c]
//
// states_before[c] is state[c], final_states the last one.
//
// Grid: blocks_of_head blocks for each head of each sequence, one after the other. A thread owns a pack of neighbours along
// dstate (state_passing.cuh) in every chunk, and keeps its state in registers.
//
// Phases, without barriers: the initial state; then kAtOnce chunks at a time, all asked for before the first is used, each
// giving the state before it and moving it on; the final state. Where fewer chunks are left, the last one is read again.
//
// Shared memory: none. fp32: everything between loads and stores; the state that moves on is never rounded.

#include "dependent_launch.cuh"
#include "state_passing.cuh"

using namespace oxi;

using Element = oxi::ELEMENT;

namespace {

template <bool kDense>
__device__ __forceinline__ void pass(const OxiStatePassing &p) {
  // Chunks under way.
  constexpr int kAtOnce = kDense ? 8 : 2;
  constexpr int kWidth = kVector<Element>;
  const Share<Element, kDense> share(p.sizes);
  const unsigned nchunks = p.sizes.nchunks;
  const float *decays = share.decays(p.decay);

  wait_for_earlier_work();
  float state[kWidth] = {};
  if (p.wide_initial_states) {
    share.template load_one<float>(state, p.initial_states);
  } else {
    share.template load_one<Element>(state, p.initial_states);
  }
  for (unsigned begin = 0; begin < nchunks; begin += kAtOnce) {
    Pack<Element, kWidth> added[kAtOnce];
    float decay[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned c = min(begin + i, nchunks - 1);
      added[i] = share.load(p.states, c);
      decay[i] = decays[c * p.decay.stride[1]];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i >= nchunks) break;
      share.store(p.states_before, begin + i, state);
      const float factor = expf(decay[i]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) state[j] = fmaf(factor, state[j], added[i][j]);
    }
  }
  share.template store_one<float>(p.final_states, state);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kPassingWarps *kWarp, kPassingBlocks)
    KERNEL(const __grid_constant__ OxiStatePassing p) {
  if (p.sizes.dense) {
    pass<true>(p);
  } else {
    pass<false>(p);
  }
}
