// The recurrence over chunk states, backward, but for the sum over warps (state_passing_bwd_decay). Equals the gradients of
// oxiscan.reference.state_passing.
//
// With G the gradient of the state after a chunk, at first dfinal_states, from the last chunk to the first:
//
//   dstates[c] = G    ddecay[c] = exp(decay[c]) sum over elements of G state[c]    G = exp(decay[c]) G + dstates_before[c]
//
// dinitial_states is what is left. state[c] is states_before[c] as the forward stored it, but before the first chunk the
// initial state where that is wider.
//
// Grid and owners: as in the forward. A warp's part of ddecay is its row of partials (warps of a head, batch, nheads,
// nchunks), so that warps do not wait for each other, and no order depends on the batch.
//
// Phases, without barriers: dfinal_states; then kAtOnce chunks at a time, from the last on, all asked for before the first is
// used, each giving dstates and products of G and the state, which are summed over the warp by shuffles; dinitial_states.
// Where fewer chunks are left, the first one is read again.
//
// Shared memory: none. fp32: everything between loads and stores, and partials.

#include "dependent_launch.cuh"
#include "state_passing.cuh"

using namespace oxi;

using Element = oxi::ELEMENT;

namespace {

template <bool kDense>
__device__ __forceinline__ void pass_back(const OxiStatePassingBackward &p) {
  // Chunks under way.
  constexpr int kAtOnce = kDense ? 4 : 2;
  constexpr int kWidth = kVector<Element>;
  const Share<Element, kDense> share(p.sizes);
  const unsigned nchunks = p.sizes.nchunks;
  const float *decays = share.decays(p.decay);
  const long long column = (static_cast<long long>(share.b) * p.sizes.nheads + share.head) * nchunks;
  float *partials = p.partials + share.warp * p.columns + column;

  wait_for_earlier_work();
  // One that fills the last block, without a row of partials.
  if (share.warp >= p.sizes.warps_of_head) return;
  float G[kWidth] = {};
  share.template load_one<float>(G, p.dfinal_states);
  float initial[kWidth] = {};
  const bool has_initial = sizeof(Element) < sizeof(float) && p.wide_initial_states.data != nullptr;
  if (has_initial) share.template load_one<float>(initial, p.wide_initial_states);

  // Chunks from `left` on are done.
  for (unsigned left = nchunks; left > 0; left -= min(left, kAtOnce)) {
    Pack<Element, kWidth> state[kAtOnce], added[kAtOnce];
    float decay[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned c = max(left, i + 1) - (i + 1);
      state[i] = share.load(p.states_before, c);
      added[i] = p.dstates_before.data != nullptr ? share.load(p.dstates_before, c) : Pack<Element, kWidth>{};
      decay[i] = decays[c * p.decay.stride[1]];
    }
    float sums[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i >= left) break;
      const unsigned c = left - (i + 1);
      share.store(p.dstates, c, G);
      const bool from_initial = has_initial && c == 0;
      const float factor = expf(decay[i]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sums[i] = fmaf(G[j], from_initial ? initial[j] : state[i][j], sums[i]);
        G[j] = fmaf(factor, G[j], added[i][j]);
      }
      sums[i] *= factor;
    }
    warp_sum(sums);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < left) partials[left - (i + 1)] = sums[i];
      }
    }
  }
  if (p.wide_dinitial_states) {
    share.template store_one<float>(p.dinitial_states, G);
  } else {
    share.template store_one<Element>(p.dinitial_states, G);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kPassingWarps *kWarp, kPassingBlocks)
    KERNEL(const __grid_constant__ OxiStatePassingBackward p) {
  if (p.sizes.dense) {
    pass_back<true>(p);
  } else {
    pass_back<false>(p);
  }
}
