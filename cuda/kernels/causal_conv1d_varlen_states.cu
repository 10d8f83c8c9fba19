// The conv states that packed documents leave. Equals oxiscan.reference.causal_conv1d_varlen_states.
//
//   states[d, c, i] = x[end - state_len + i, c], or 0 where that is before the document's first token
//
// Grid: block i owns document i / channel_blocks and of its channels the i % channel_blocks-th part, a thread a channel.
// No barrier, no shared memory; nothing is computed. Bounds outside x are taken for its ends.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "params.h"

using namespace oxi;

using Element = oxi::ELEMENT;

extern "C" __global__ void KERNEL(const __grid_constant__ OxiVarlenStates p) {
  const long long document = blockIdx.x / p.channel_blocks;
  const long long channel = static_cast<long long>(blockIdx.x % p.channel_blocks) * blockDim.x + threadIdx.x;
  if (channel >= p.dim) return;
  const auto bound = [&](long long i) {
    const long long value = load_integer(p.cu_seqlens, i * p.cu_seqlens_step, p.cu_seqlens_are_64_bit);
    return min(max(value, 0ll), p.total_tokens);
  };
  const Element *x = static_cast<const Element *>(p.x.data) + channel * p.x.stride[1];
  Element *state = static_cast<Element *>(p.states.data) + document * p.states.stride[0] + channel * p.states.stride[1];

  wait_for_earlier_work();
  const long long begin = bound(document), end = bound(document + 1);
  for (int i = 0; i < p.state_len; ++i) {
    const long long t = end - p.state_len + i;
    state[i * p.states.stride[2]] = t >= begin ? x[t * p.x.stride[0]] : from_float<Element>(0.0f);
  }
}
