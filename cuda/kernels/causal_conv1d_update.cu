// Decode steps of the causal convolution. Equals oxiscan.reference.causal_conv1d_update; each token has the bits that
// causal_conv1d_fwd gives it.
//
//   out[t] = act(bias + sum over k of weight[k] source[t - (width - 1) + k])
//
// The sources are the state's inputs, then the call's. A shifted state holds the last state_len inputs, newest last; a
// circular one (cache_seqlens) the input at position p at index p mod state_len.
//
// Grid: block i owns sequence i / channel_blocks and of its channels the i % channel_blocks-th part, a thread a channel
// with all its tokens and its line of the state: no barrier, no shared memory. Phases: the state's inputs before the first
// token; tokens; states after each token, where asked for, while the state is still as it was; the state.
//
// SEQUENCES > 0: one token, width and state_len 4, lines of state and weight dense: each moves at once, and a block owns so
// many sequences, whose loads are under way together. Before it waits for earlier work a thread asks for its lines of the
// state to be brought to L2.
//
// Nothing is read on the host: a sequence of index -1 gets zeros, one of any other index outside the slots NaN, and neither
// touches a state.
// fp32: everything between loads and stores of out; states are copied.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "math.cuh"
#include "params.h"

using namespace oxi;

using Element = oxi::ELEMENT;

constexpr int kMaxHistory = OXI_MAX_CONV_WIDTH - 1;
// Inputs of a line of the state, and taps, where they move at once.
constexpr int kWhole = 4;
constexpr int kSequences = SEQUENCES > 0 ? SEQUENCES : 1;

namespace {

template <typename T>
__device__ inline void load_whole(const void *data, long long offset, float (&values)[kWhole]) {
  const auto pack = *reinterpret_cast<const Pack<T, kWhole> *>(static_cast<const T *>(data) + offset);
#pragma unroll
  for (int k = 0; k < kWhole; ++k) values[k] = pack[k];
}

}  // namespace

extern "C" __global__ void KERNEL(const __grid_constant__ OxiConvUpdate p) {
  const long long first_sequence = static_cast<long long>(blockIdx.x / p.channel_blocks) * kSequences;
  const long long channel = static_cast<long long>(blockIdx.x % p.channel_blocks) * blockDim.x + threadIdx.x;
  if (channel >= p.dim) return;
  const auto x_of = [&](long long b) {
    return static_cast<const Element *>(p.x.data) + b * p.x.stride[0] + channel * p.x.stride[1];
  };
  const auto out_of = [&](long long b) {
    return static_cast<Element *>(p.out.data) + b * p.out.stride[0] + channel * p.out.stride[1];
  };
  const auto state_of = [&](long long slot) {
    return static_cast<Element *>(p.state.data) + slot * p.state.stride[0] + channel * p.state.stride[1];
  };
  // What a sequence without a slot gets.
  const auto result_without = [](long long slot) {
    return from_float<Element>(slot == -1 ? 0.0f : __int_as_float(0x7fc00000));
  };
  const auto load_bias = [&] {
    if (p.bias.data == nullptr) return 0.0f;
    return load_either<Element>(p.bias.data, channel * p.bias.step, p.bias.dtype == OXI_F32);
  };

  const auto slot_of = [&](long long b) {
    if (b >= p.batch) return -1ll;
    if (p.indices == nullptr) return b;
    return load_integer_anew(p.indices, b * p.indices_step, p.indices_are_64_bit);
  };
  const auto is_slot = [&](long long slot) { return slot >= 0 && slot < p.slots; };

  if constexpr (SEQUENCES > 0 && kStartsEarly) {
    // An index that earlier work is yet to write costs no more than the wrong lines.
#pragma unroll
    for (int i = 0; i < kSequences; ++i) {
      const long long slot = slot_of(first_sequence + i);
      if (is_slot(slot)) prefetch_early(state_of(slot));
    }
  }
  wait_for_earlier_work();
  let_next_kernel_start();
  if constexpr (SEQUENCES > 0) {
    using Line = Pack<Element, kWhole>;
    long long slots[kSequences];
#pragma unroll
    for (int i = 0; i < kSequences; ++i) slots[i] = slot_of(first_sequence + i);
    Line lines[kSequences];
    Element own[kSequences];
#pragma unroll
    for (int i = 0; i < kSequences; ++i) {
      lines[i] = Line{};
      own[i] = from_float<Element>(0.0f);
      if (!is_slot(slots[i])) continue;
      lines[i] = *reinterpret_cast<const Line *>(state_of(slots[i]));
      own[i] = *x_of(first_sequence + i);
    }
    float weight[kWhole];
    const long long offset = channel * p.weight.stride[0];
    if (p.wide_weight) {
      load_whole<float>(p.weight.data, offset, weight);
    } else {
      load_whole<Element>(p.weight.data, offset, weight);
    }
    const float bias = load_bias();
#pragma unroll
    for (int i = 0; i < kSequences; ++i) {
      const long long b = first_sequence + i;
      if (b >= p.batch) continue;
      if (!is_slot(slots[i])) {
        *out_of(b) = result_without(slots[i]);
        continue;
      }
      float sum = bias;
      float sources[kWhole];
#pragma unroll
      for (int k = 0; k < kWhole; ++k) {
        sources[k] = k + 1 < kWhole ? lines[i][k + 1] : to_float(own[i]);
        sum = fmaf(weight[k], sources[k], sum);
      }
      *reinterpret_cast<Line *>(state_of(slots[i])) = Line::of(sources);
      *out_of(b) = from_float<Element>(p.silu ? silu(sum) : sum);
    }
    return;
  }

  const long long b = first_sequence;
  const Element *x = x_of(b);
  Element *out = out_of(b);
  const long long slot = slot_of(b);
  if (!is_slot(slot)) {
    for (int t = 0; t < p.seqlen; ++t) out[t * p.out.stride[2]] = result_without(slot);
    return;
  }
  Element *state = state_of(slot);
  const int history = p.width - 1, state_len = p.state_len;
  const long long step = p.state.stride[2];
  const bool circular = p.cache_seqlens != nullptr;
  // Of a circular state, where the call's first input goes.
  int position = 0;
  if (circular) {
    const long long all = load_integer(p.cache_seqlens, b * p.cache_seqlens_step, p.cache_seqlens_are_64_bit);
    const long long seen = all % state_len;
    position = static_cast<int>(seen < 0 ? seen + state_len : seen);
  }
  // The state's input `ago` tokens before the call's first one, and where it lies.
  const auto index_of = [&](int ago) {
    const int index = circular ? position - ago : state_len - ago;
    return index < 0 ? index + state_len : index;
  };

  // The last taps are the filter's; those before it are none.
  const int missing = kMaxHistory - history;
  float window[kMaxHistory], weight[kMaxHistory + 1];
#pragma unroll
  for (int k = 0; k <= kMaxHistory; ++k) {
    const long long offset = channel * p.weight.stride[0] + (k - missing) * p.weight.stride[1];
    weight[k] = k >= missing ? load_either<Element>(p.weight.data, offset, p.wide_weight) : 0.0f;
    if (k < kMaxHistory) window[k] = k >= missing ? to_float(state[index_of(kMaxHistory - k) * step]) : 0.0f;
  }
  const float bias = load_bias();
  for (int t = 0; t < p.seqlen; ++t) {
    const float own = to_float(x[t * p.x.stride[2]]);
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kMaxHistory; ++k) {
      if (k >= missing) sum = fmaf(weight[k], window[k], sum);
    }
    sum = fmaf(weight[kMaxHistory], own, sum);
    out[t * p.out.stride[2]] = from_float<Element>(p.silu ? silu(sum) : sum);
#pragma unroll
    for (int k = 0; k + 1 < kMaxHistory; ++k) window[k] = window[k + 1];
    window[kMaxHistory - 1] = own;
  }

  // What a state holds at an index after `tokens` of the call, which read the state as it was.
  const auto after = [&](int tokens, int index) {
    int token;  // of the call; below 0 where the state's input stays
    if (circular) {
      int ago = (position + tokens - 1) % state_len - index;
      if (ago < 0) ago += state_len;
      token = tokens - 1 - ago;
      return token >= 0 ? x[token * p.x.stride[2]] : state[index * step];
    }
    token = index + tokens - state_len;
    return token >= 0 ? x[token * p.x.stride[2]] : state[(index + tokens) * step];
  };
  if (p.intermediate.data != nullptr) {
    const OxiTensor4 &all = p.intermediate;
    Element *line = static_cast<Element *>(all.data) + slot * all.stride[0] + channel * all.stride[2];
    for (int t = 0; t < p.seqlen; ++t) {
      for (int i = 0; i < state_len; ++i) line[t * all.stride[1] + i * all.stride[3]] = after(t + 1, i);
    }
  }
  // Upwards: an input moves to a lower index or stays.
  if (p.seqlen > 0) {
    for (int i = 0; i < state_len; ++i) state[i * step] = after(p.seqlen, i);
  }
}
