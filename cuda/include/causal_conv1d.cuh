// What the convolution's forward and backward share: which thread owns what, where documents begin, parameters, states.
//
// A block owns a span of tokens of one sequence (of each of several, one after the other) and some channels:
//
//   LAYOUT = LAST, channels are neighbours in memory: a thread has kChannels neighbouring channels and walks the span token
//   by token, with the inputs before the present one in registers and later ones under way. Every input is loaded once, but
//   for a halo.
//   LAYOUT = FIRST, tokens are neighbours, or nothing is: a warp has a channel and walks the span in steps of kStep tokens,
//   of which a lane has kSpan neighbours. Those of later steps are under way to shared memory.
//
// FORM = PLAIN: width 4, all tensors' lines dense and aligned, so that they move in accesses of up to 16 bytes, no documents,
// and along tokens only whole packs; PACKED: the same with documents; ANY: anything, a tensor's lines element by element but
// where they are dense (a bit of `dense`). Where nothing is near that is special, the end of a document or, along channels,
// of a span, tokens take a shorter way. A token's sums are taken in the same order in every case, so results have the same
// bits.
//
// Unless PLAIN, a block first finds where runs begin among its tokens, a bit for each in shared memory, and which ids are
// negative.
#pragma once

// LAYOUT, macros, so that each instance compiles its own walk alone; FORM.
#define LAST 0
#define FIRST 1
#define PLAIN 0
#define PACKED 1
#define ANY 2

#include "async_copy.cuh"
#include "constant.cuh"
#include "dependent_launch.cuh"
#include "documents.cuh"
#include "dtype.cuh"
#include "math.cuh"
#include "params.h"
#include "reduce.cuh"

namespace oxi {

using Element = ELEMENT;

constexpr bool kAlongTokens = LAYOUT == FIRST;
constexpr bool kPacked = FORM != PLAIN;

// Dense lines and OXI_EXACT_CONV_WIDTH taps; or up to OXI_MAX_CONV_WIDTH of them, of which the first ones may be none.
constexpr bool kExact = FORM != ANY;
constexpr int kTaps = kExact ? OXI_EXACT_CONV_WIDTH : OXI_MAX_CONV_WIDTH;
constexpr int kHistory = kTaps - 1;
__device__ __forceinline__ int missing_taps(const OxiConv &p) { return kExact ? 0 : kTaps - p.width; }

// Along channels a thread's channels: as many as leave room for enough warps.
constexpr int kChannels = kAlongTokens ? 1 : kExact ? 8 / sizeof(Element) : 2;
// Along tokens a lane's tokens, and a warp's. A lane needs to know of no more than the lanes next to it.
constexpr int kSpan = kExact ? kVector<Element> : 8;
constexpr int kStep = kWarp * kSpan;
static_assert(kHistory <= kSpan);

// Whether lines of the tensor with this bit move in packs.
__device__ __forceinline__ bool is_dense(const OxiConv &p, int bit) { return kExact || (p.dense & bit) != 0; }

__device__ __forceinline__ const Element *line(const OxiTensor3 &tensor, long long b, int channel) {
  return static_cast<const Element *>(tensor.data) + b * tensor.stride[0] + channel * tensor.stride[1];
}
__device__ __forceinline__ Element *line_to_write(const OxiTensor3 &tensor, long long b, int channel) {
  return const_cast<Element *>(line(tensor, b, channel));
}

// Parameters of a thread's channels, 0 for taps and channels that there are not.
struct Filter {
  float weight[kTaps][kChannels];
  float bias[kChannels];

  __device__ __forceinline__ Filter(const OxiConv &p, int channel) {
    if (p.wide_weight) {
      load_weight(p, static_cast<const float *>(p.weight.data), channel);
    } else {
      load_weight(p, static_cast<const Element *>(p.weight.data), channel);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const bool has = p.bias.data != nullptr && channel + c < p.dim;
      bias[c] = has ? load_either<Element>(p.bias.data, (channel + c) * p.bias.step, p.bias.dtype == OXI_F32) : 0.0f;
    }
  }

  template <typename T>
  __device__ __forceinline__ void load_weight(const OxiConv &p, const T *data, int channel) {
    const int missing = missing_taps(p);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const T *row = data + (channel + c) * p.weight.stride[0];
      if (kExact && p.dense & OXI_CONV_WEIGHT && channel + c < p.dim) {
        if constexpr (kExact) {
          const auto pack = *reinterpret_cast<const Pack<T, kTaps> *>(row);
#pragma unroll
          for (int k = 0; k < kTaps; ++k) weight[k][c] = pack[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          const bool has = k >= missing && channel + c < p.dim;
          weight[k][c] = has ? to_float(row[(k - missing) * p.weight.stride[1]]) : 0.0f;
        }
      }
    }
  }

  // The sum over taps before a token (`before`, oldest first) and its own.
  template <typename Before>
  __device__ __forceinline__ float convolve(const OxiConv &p, int c, Before before, float own) const {
    float sum = bias[c];
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      // A tap that there is not adds nothing, whatever lies there.
      if (kExact || k >= missing_taps(p)) sum = fmaf(weight[k][c], before(k), sum);
    }
    return fmaf(weight[kHistory][c], own, sum);
  }
};

__device__ __forceinline__ long long state_offset(const OxiTensor3 &states, long long row, int channel, int column) {
  return row * states.stride[0] + channel * states.stride[1] + column * states.stride[2];
}

// An element of this row of the initial states; 0 if there is none.
__device__ __forceinline__ float initial_value(const OxiConv &p, long long row, int channel, int column) {
  if (p.initial_states.data == nullptr || row < 0 || column < 0 || channel >= p.dim) return 0.0f;
  const long long offset = state_offset(p.initial_states, row, channel, column);
  return load_either<Element>(p.initial_states.data, offset, p.wide_initial_states);
}

// The inputs before a token, oldest first.
struct Window {
  float value[kHistory][kChannels];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) value[k][c] = 0.0f;
    }
  }

  // As it is before token t, with which a run begins. Returns the run's row of initial states.
  __device__ __forceinline__ long long start_run(const OxiConv &p, long long b, int channel, int t) {
    const long long row = p.initial_states.data == nullptr ? -1 : initial_row(p, b, document_from(p, t));
    clear();
    if (row >= 0) {
#pragma unroll
      for (int k = 0; k < kHistory; ++k) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) value[k][c] = initial_value(p, row, channel + c, k - missing_taps(p));
      }
    }
    return row;
  }

  __device__ __forceinline__ void push(const float (&x)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) value[k][c] = value[k + 1][c];
      value[kHistory - 1][c] = x[c];
    }
  }
};

// A bit for each token of a block's span and its neighbourhood: whether a run begins there (one past the last token does
// too), and whether its id is negative.
struct Marks {
  static constexpr int kBefore = 16;
  static constexpr int kWords = (OXI_MAX_MARKED_TOKENS + 2 * kBefore) / 32 + 2;
  unsigned starts[kWords];
  unsigned negatives[kWords];

  // By all threads of a block; a barrier has to follow, and to come before it where marks were in use.
  __device__ __forceinline__ void fill(const OxiConv &p, long long b, int begin, int end) {
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    const int *ids = p.seq_idx == nullptr ? nullptr : p.seq_idx + b * p.seq_idx_stride[0];
    const int words = (end - begin + 2 * kBefore + 32 + 31) / 32;
    // Several words at a time, for their loads to be under way together.
    constexpr int kAtOnce = 4;
    for (int first = threadIdx.x / kWarp; first < words; first += kAtOnce * warps) {
      int own[kAtOnce], before[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int t = begin - kBefore + (first + i * warps) * 32 + lane;
        const bool has = ids != nullptr && t >= 0 && t < p.seqlen;
        own[i] = has ? ids[t * p.seq_idx_stride[1]] : 0;
        before[i] = has && t > 0 ? ids[(t - 1) * p.seq_idx_stride[1]] : own[i];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int word = first + i * warps, t = begin - kBefore + word * 32 + lane;
        const unsigned start_bits = __ballot_sync(kAllLanes, t == 0 || t == p.seqlen || own[i] != before[i]);
        const unsigned negative_bits = __ballot_sync(kAllLanes, own[i] < 0);
        if (lane == 0 && word < words) starts[word] = start_bits, negatives[word] = negative_bits;
      }
    }
    if (p.cu_seqlens == nullptr) return;
    for (int word = threadIdx.x / kWarp; word < words; word += warps) {
      const int t = begin - kBefore + word * 32 + lane;
      bool start = false;
      if (t >= 0 && t < p.seqlen) {
        const int document = first_to_end(p, t);
        start = document < p.ndocs && document_bound(p, document + 1) == t;
      }
      const unsigned start_bits = __ballot_sync(kAllLanes, start);
      if (lane == 0) starts[word] |= start_bits;
    }
  }

  // Those of 32 tokens from `first` on, no earlier than kBefore before the span.
  __device__ static unsigned from(const unsigned (&bits)[kWords], int begin, int first) {
    const int i = first - begin + kBefore;
    return __funnelshift_r(bits[i / 32], bits[i / 32 + 1], i % 32);
  }
};

// Write the final states of the documents that end at `end`: what a window holds there, and of those without a token
// their initial states.
__device__ __forceinline__ void store_final_states(const OxiConv &p, long long b, int channel, int end,
                                                   const Window &window) {
  if (p.final_states.data == nullptr) return;
  for (int document = first_to_end(p, end); document < p.ndocs; ++document) {
    if (document_bound(p, document + 1) != end) break;
    const bool empty = document_bound(p, document) == end;
    const long long row = final_row(p, b, document);
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      const int column = k - missing_taps(p);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (column < 0 || channel + c >= p.dim) continue;
        const float value =
            empty ? initial_value(p, initial_row(p, b, document), channel + c, column) : window.value[k][c];
        static_cast<Element *>(p.final_states.data)[state_offset(p.final_states, row, channel + c, column)] =
            from_float<Element>(value);
      }
    }
  }
}

#if LAYOUT == LAST
// A thread's channels of a token.
using Line = Pack<Element, kChannels>;

// Of token t, which lies at `at`; 0 where there is none.
__device__ __forceinline__ Line load_token(const OxiConv &p, const OxiTensor3 &tensor, const Element *at, bool dense,
                                           int channel, bool inside) {
  const int size = dense ? kChannels : p.dim - channel;
  return load_pack<kChannels>(at, tensor.stride[1], 0, inside ? size : 0, dense);
}

// A thread's next kTokens tokens of a tensor, each in a place. Where lines are dense they are under way to shared memory, so
// that they take no registers; a thread reads there only what it asked for.
template <int kTokens>
struct Ahead {
  static constexpr int kPlaces = kExact ? kTokens * OXI_CONV_LINE_THREADS : 1;
  Line *shared;
  Line lines[kTokens];

  __device__ __forceinline__ explicit Ahead(Line (&places)[kPlaces]) : shared(places + threadIdx.x) {}

  // Ask for a token, which lies at `at`; 0 where there is none.
  __device__ __forceinline__ void ask(const OxiConv &p, const OxiTensor3 &tensor, const Element *at, bool dense,
                                      int channel, int place, bool inside) {
    if constexpr (kExact) {
      copy_async<sizeof(Line)>(shared + place * OXI_CONV_LINE_THREADS, at, inside);
    } else {
      lines[place] = load_token(p, tensor, at, dense, channel, inside);
    }
  }
  __device__ __forceinline__ Line take(int place) const {
    return kExact ? shared[place * OXI_CONV_LINE_THREADS] : lines[place];
  }
};

// Store a token's channels.
__device__ __forceinline__ void store_channels(const OxiConv &p, const OxiTensor3 &tensor, Element *line, bool dense,
                                               int channel, int t, const float (&values)[kChannels]) {
  store_pack(line + t * tensor.stride[2], tensor.stride[1], 0, dense ? kChannels : p.dim - channel, dense,
             Line::of(values));
}

// The inputs before a span's first token; where a sequence begins with it, zeros.
__device__ __forceinline__ Window window_before(const OxiConv &p, const Marks &marks, long long b, int channel,
                                                int begin, const Element *x_line, bool x_dense) {
  Line before[kHistory];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    const int t = begin - kHistory + i;
    before[i] = load_token(p, p.x, x_line + t * p.x.stride[2], x_dense, channel, t >= 0);
  }
  const unsigned starts = kPacked ? Marks::from(marks.starts, begin, begin - kHistory) : 0;
  Window window;
  window.clear();
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    if (kPacked && starts >> i & 1) window.start_run(p, b, channel, begin - kHistory + i);
    float x[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[c] = before[i][c];
    window.push(x);
  }
  return window;
}

#else
// A lane's tokens of a channel.
using Span = Pack<Element, kSpan>;

// Drop the first value and append one. A loop over tokens that goes along arrays by this need not be unrolled for them to stay
// in registers, and costs nothing where it is: rare ways are loops, as they would otherwise take most of the code.
template <int N>
__device__ __forceinline__ void push(float (&values)[N], float last) {
#pragma unroll
  for (int i = 0; i + 1 < N; ++i) values[i] = values[i + 1];
  values[N - 1] = last;
}

__device__ __forceinline__ void unpack(const Span &span, float (&values)[kSpan]) {
#pragma unroll
  for (int i = 0; i < kSpan; ++i) values[i] = span[i];
}

// Between tokens of a line.
__device__ __forceinline__ long long token_step(const OxiTensor3 &tensor) { return kExact ? 1 : tensor.stride[2]; }

// From token t on, which lies at `at`; 0 for tokens outside [0, end).
__device__ __forceinline__ Span load_span(const OxiTensor3 &tensor, const Element *at, bool dense, int t, int end) {
  // Where the line ends within a pack it is read element by element.
  const bool whole = kExact || (dense && t >= 0 && t + kSpan <= end);
  return load_pack<kSpan>(at, token_step(tensor), 0, t < 0 ? 0 : end - t, whole);
}

// Where lines are not dense a step's elements pass through shared memory, so that a warp's accesses are of neighbours: the
// lane's ith element there is the step's (i kWarp + lane)th. How many tokens that is from the lane's first one.
__device__ __forceinline__ int to_neighbour(int i) {
  const int lane = threadIdx.x % kWarp;
  return i * kWarp + lane - lane * kSpan;
}

// A warp's tokens of a tensor, of steps under way and at work, in shared memory: so that loads take no registers, and a lane
// finds what is before its own. Step n is of the tokens from the span's begin + n kStep on.
struct Ring {
  static constexpr int kSteps = 4;
  alignas(16) Element elements[kSteps * kStep];

  __device__ __forceinline__ Element &element(int i) { return elements[i & (kSteps * kStep - 1)]; }
  // Of this lane, `spans` spans earlier.
  __device__ __forceinline__ Span &place(int n, int spans) {
    return reinterpret_cast<Span &>(element(n * kStep + (static_cast<int>(threadIdx.x % kWarp) - spans) * kSpan));
  }

  // Ask for the tokens of step n, the lane's from t on, which lies at `at`; 0 for tokens outside [lowest, end). What is
  // returned is to be handed to `keep` later, as only dense lines are copied asynchronously.
  __device__ __forceinline__ Span ask(const OxiTensor3 &tensor, const Element *at, bool dense, int n, int t, int lowest,
                                      int end) {
    if (dense) {
      const bool inside = t >= lowest && t < end;
      if constexpr (kExact) {
        copy_async<sizeof(Span)>(&place(n, 0), at, inside);
        return Span{};
      } else {
        return load_span(tensor, at, dense, t, inside ? end : t);
      }
    }
    float values[kSpan];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const int further = to_neighbour(i);
      const bool inside = t + further >= lowest && t + further < end;
      values[i] = inside ? to_float(at[further * token_step(tensor)]) : 0.0f;
    }
    return Span::of(values);
  }
  __device__ __forceinline__ void keep(int n, const Span &asked, bool dense) {
    if constexpr (kExact) return;
    if (dense) {
      place(n, 0) = asked;
      return;
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      element(n * kStep + i * kWarp + threadIdx.x % kWarp) = from_float<Element>(asked[i]);
    }
  }
};

// A warp's results of a step, on their way to lines that are not dense.
struct Results {
  alignas(16) Element elements[kExact ? kSpan : kStep];

  // By all lanes: the lane's values from token t on, which lies at `at`, but for tokens from `end` on.
  __device__ __forceinline__ void store(const OxiTensor3 &tensor, Element *at, bool dense, int t, int end,
                                        const float (&values)[kSpan]) {
    if (dense) {
      store_pack(at, token_step(tensor), 0, end - t, kExact || t + kSpan <= end, Span::of(values));
      return;
    }
    const int lane = threadIdx.x % kWarp;
    if constexpr (!kExact) reinterpret_cast<Span &>(elements[lane * kSpan]) = Span::of(values);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const int further = to_neighbour(i);
      if (t + further < end) at[further * token_step(tensor)] = elements[kExact ? 0 : i * kWarp + lane];
    }
    __syncwarp();
  }
};

// One of them for each of a block's warps.
template <typename T>
struct EachWarp {
  T of[OXI_CONV_CHANNEL_WARPS];
  __device__ __forceinline__ T &own() { return of[threadIdx.x / kWarp]; }
};

// How much there is to look for in a step: nothing; where runs begin, and negative ids; states too.
enum Way { STRAIGHT, BROKEN, STATES };
#endif

}  // namespace oxi
