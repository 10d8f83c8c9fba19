// Causal depthwise convolution, backward, but for the sum over blocks (causal_conv1d_bwd_parameters). Equals the gradients
// of oxiscan.reference.causal_conv1d_fn.
//
//   dpre[t] = dout[t] silu'(pre[t])                     dsource[s] = sum over k of weight[k] dpre[s + (width - 1) - k]
//   dweight[k] = sum over t of dpre[t] source[t - (width - 1) + k]                   dbias = sum over t of dpre[t]
//
// over tokens of the source's run; pre as in the forward, computed again; dpre is 0 for negative ids. To the last
// width - 1 sources of a document the gradient of its final state is added. dsource is dx for tokens, dinitial_states for
// what lies before a document's first one.
//
// Grid: block i owns of the channels the i % channel_blocks-th part, and every span_blocks-th span from
// i / channel_blocks on; causal_conv1d.cuh says what of them belongs to a thread. The owner of a token owns its dx, its
// part of dweight and dbias, and the initial state of a run that begins with it. Sums for the parameters stay in registers
// until the last span, and are then the block's row of partials.
//
// Phases, for each span: unless PLAIN mark where runs begin, between barriers. Along channels then without one: the first
// tokens are asked for; the inputs before them; token by token, to width - 1 past the last one, each asked for kAhead tokens
// ahead; the gradients of the last width - 1 sources stay in registers until they are whole. Along tokens from the last step
// to the first, each asked for kAhead steps ahead, a warp's barrier in each: dpre of a lane's tokens, then dx from those and
// the next lane's first ones, by shuffles; at the end the lanes' sums for the parameters.
//
// Shared memory: tokens under way, along channels 8 KB (none of ANY), along tokens 16 KB, 32 KB of ANY in fp32, where also
// results on their way take 2 or 4 KB; unless PLAIN two bits for each token of the span, 544 bytes. fp32: everything between
// loads and stores, and partials.

#include "causal_conv1d.cuh"

using namespace oxi;

namespace {

struct Sums {
  float dweight[kTaps][kChannels];
  float dbias[kChannels];

  // A token's part of the sums of channel c, its sources as in Filter::convolve.
  template <typename Before>
  __device__ __forceinline__ void add(const OxiConv &p, int c, float dpre, Before before, float own) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      if (kExact || k >= missing_taps(p)) dweight[k][c] = fmaf(dpre, before(k), dweight[k][c]);
    }
    dweight[kHistory][c] = fmaf(dpre, own, dweight[kHistory][c]);
    dbias[c] += dpre;
  }
};

__device__ __forceinline__ float gradient_of_pre(bool is_silu, float pre, float dout) {
  return is_silu ? dout * silu_grad(pre) : dout;
}

// An element of a document's gradient of the final state.
__device__ __forceinline__ float dfinal_value(const OxiConvBackward &p, long long b, int document, int channel,
                                              int column) {
  const OxiTensor3 &states = p.dfinal_states;
  if (states.data == nullptr || column < 0 || channel >= p.conv.dim) return 0.0f;
  return to_float(static_cast<const Element *>(
      states.data)[state_offset(states, final_row(p.conv, b, document), channel, column)]);
}

__device__ __forceinline__ void store_dinitial(const OxiConvBackward &p, long long row, int channel, int column,
                                               float value) {
  const OxiTensor3 &states = p.dinitial_states;
  if (states.data == nullptr || row < 0 || column < 0 || channel >= p.conv.dim) return;
  const long long offset = state_offset(states, row, channel, column);
  if (p.conv.wide_initial_states) {
    static_cast<float *>(states.data)[offset] = value;
  } else {
    static_cast<Element *>(states.data)[offset] = from_float<Element>(value);
  }
}

// Of documents without a token that lie at `end`: their initial state is their final one.
__device__ __forceinline__ void pass_empty_documents(const OxiConvBackward &p, long long b, int channel, int end) {
  if (p.dinitial_states.data == nullptr) return;
  for (int document = first_to_end(p.conv, end); document < p.conv.ndocs; ++document) {
    if (document_bound(p.conv, document + 1) != end) break;
    if (document_bound(p.conv, document) != end) continue;
    for (int column = 0; column < p.conv.width - 1; ++column) {
      for (int c = 0; c < kChannels; ++c) {
        store_dinitial(p, initial_row(p.conv, b, document), channel + c, column,
                       dfinal_value(p, b, document, channel + c, column));
      }
    }
  }
}

// The document with tokens that ends at `end`, -1 if none does.
__device__ __forceinline__ int document_to(const OxiConv &p, int end) {
  const int document = first_to_end(p, end);
  const bool ends = document < p.ndocs && document_bound(p, document + 1) == end && document_bound(p, document) != end;
  return ends ? document : -1;
}

#if LAYOUT == LAST

// Tokens at once, and how many tokens ahead one is asked for.
constexpr int kBatch = 4;
constexpr int kAhead = kExact ? 8 : kBatch;

// Batches in the span and past it where nothing is near that is special, and any others.
enum Where { INSIDE, PAST, ELSE };

__device__ __forceinline__ void walk(const OxiConvBackward &p, const Marks &marks, long long b, int channel, int begin,
                                     int end, Sums &sums) {
  __shared__ Line x_places[Ahead<kAhead>::kPlaces], dout_places[Ahead<kAhead>::kPlaces];
  Ahead<kAhead> x_ahead(x_places), dout_ahead(dout_places);
  const OxiConv &conv = p.conv;
  const Element *x_line = line(conv.x, b, channel), *dout_line = line(p.dout, b, channel);
  Element *dx_line = line_to_write(p.dx, b, channel);
  const bool x_dense = is_dense(conv, OXI_CONV_X), dout_dense = is_dense(conv, OXI_CONV_DOUT);
  const bool dx_dense = is_dense(conv, OXI_CONV_DX);
  // Tokens whose gradients reach the span.
  const int reach = static_cast<int>(min(static_cast<long long>(end) + kHistory, static_cast<long long>(conv.seqlen)));
  const int dout_reach = p.dout.data == nullptr ? 0 : reach;
  int asked = begin;
  const Element *x_at = x_line + begin * conv.x.stride[2], *dout_at = dout_line + begin * p.dout.stride[2];
  const auto ask = [&](int place) __attribute__((always_inline)) {
    x_ahead.ask(conv, conv.x, x_at, x_dense, channel, place, asked < reach);
    dout_ahead.ask(conv, p.dout, dout_at, dout_dense, channel, place, asked < dout_reach);
    end_of_batch();
    x_at += conv.x.stride[2];
    dout_at += p.dout.stride[2];
    ++asked;
  };
  wait_for_batches<0>();  // of the span before
#pragma unroll
  for (int place = 0; place < kAhead; ++place) ask(place);
  const Filter filter(conv, channel);

  Window window = window_before(conv, marks, b, channel, begin, x_line, x_dense);
  // Of the sources before the present token, oldest first: their gradients so far.
  float pending[kHistory][kChannels] = {};
  // The run at work: its first token where the span owns that, and its row of initial states.
  int run = -1;
  long long row = -1;
  if (begin == 0) {
    pass_empty_documents(p, b, channel, 0);
    row = window.start_run(conv, b, channel, 0);
    run = 0;
  }

  const auto emit = [&](int source, const float (&value)[kChannels]) __attribute__((always_inline)) {
    if (source >= begin && source >= run) {
      if (source < end) store_channels(conv, p.dx, dx_line, dx_dense, channel, source, value);
    } else if (source < run && row >= 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        store_dinitial(p, row, channel + c, source - run + conv.width - 1, value[c]);
      }
    }
  };
  // A run ends before token t.
  const auto finish_run = [&](int t) __attribute__((always_inline)) {
    const int document = p.dfinal_states.data == nullptr ? -1 : document_to(conv, t);
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (document >= 0) pending[k][c] += dfinal_value(p, b, document, channel + c, k - missing_taps(conv));
      }
      emit(t - kHistory + k, pending[k]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) pending[k][c] = 0.0f;
    }
    if (t > begin && t <= end) pass_empty_documents(p, b, channel, t);
  };

  // INSIDE and PAST: no run begins in the batch or among the sources that it makes whole, no id is negative; the batch is in
  // the span, or all kHistory tokens past it. `turn`: the place of its first token.
  const auto batch = [&](int first, int turn, unsigned starts, unsigned negatives, auto where)
      __attribute__((always_inline)) {
    constexpr Where kWhere = decltype(where)::value;
    constexpr bool kPlain = kWhere != ELSE;
    Element *target = dx_line + (first - kHistory) * p.dx.stride[2];
    // Rare ways are loops, as they would otherwise take most of the code; registers under way cannot be indexed in one.
    constexpr int kUnrolled = kPlain || !kExact ? kBatch : 1;
#pragma unroll kUnrolled
    for (int i = 0; i < (kWhere == PAST ? kHistory : kBatch); ++i) {
      const int t = first + i;
      if (!kPlain && t >= reach) break;
      if (!kPlain && kPacked && starts >> (kHistory + i) & 1 && t > 0) {
        finish_run(t);
        row = window.start_run(conv, b, channel, t);
        run = t;
        if (t >= end) row = -1;
      }
      wait_for_batches<kAhead - 1>();
      const Line own = x_ahead.take(turn + i), gradient = dout_ahead.take(turn + i);
      float x[kChannels], ready[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        x[c] = own[c];
        const auto source = [&](int k) { return window.value[k][c]; };
        const float pre = filter.convolve(conv, c, source, x[c]), dout = gradient[c];
        float dpre = gradient_of_pre(kPlain || conv.silu, pre, dout);
        const bool counts = kPlain || !(kPacked && negatives >> i & 1);
        if (!counts) dpre = 0.0f;
        ready[c] = fmaf(filter.weight[0][c], dpre, pending[0][c]);
#pragma unroll
        for (int k = 1; k < kHistory; ++k) pending[k - 1][c] = fmaf(filter.weight[k][c], dpre, pending[k][c]);
        pending[kHistory - 1][c] = filter.weight[kHistory][c] * dpre;
        if (kWhere == INSIDE || (!kPlain && t < end && counts)) sums.add(conv, c, dpre, source, x[c]);
      }
      ask(turn + i);
      if constexpr (kPlain) {
        if (t - kHistory >= begin) *reinterpret_cast<Line *>(target) = Line::of(ready);
        target += p.dx.stride[2];
      } else {
        emit(t - kHistory, ready);
      }
      window.push(x);
    }
  };
  int turn = 0;
  for (int first = begin; first < reach; first += kBatch) {
    constexpr unsigned kMask = (1u << (kHistory + kBatch)) - 1;
    const unsigned starts = kPacked ? Marks::from(marks.starts, begin, first - kHistory) & kMask : 0;
    const unsigned negatives = kPacked ? Marks::from(marks.negatives, begin, first) & kMask : 0;
    // Not a sequence's first tokens: what they give to sources before it may be an initial state's gradient.
    const bool plain = kExact && conv.silu && (starts | negatives) == 0 && (begin > 0 || first >= kHistory);
    if (plain && first + kBatch <= end) {
      batch(first, turn, starts, negatives, Constant<INSIDE>());
    } else if (plain && first == end && reach - end == kHistory) {
      batch(first, turn, starts, negatives, Constant<PAST>());
    } else {
      batch(first, turn, starts, negatives, Constant<ELSE>());
    }
    if (kAhead > kBatch) turn = (turn + kBatch) % kAhead;
  }
  if (reach == conv.seqlen && reach > 0) finish_run(reach);
}

#else

// dpre of kTokens tokens of a channel from token t on, and their sources, one token after the other to visit(dpre, before,
// own, counts). `before`: the span before them. Bits of `starts` are from kHistory tokens before t on.
template <int kTokens, Way kWay, typename IsSilu, typename Visit>
__device__ __forceinline__ void visit_tokens(const OxiConvBackward &p, const Filter &filter, long long b, int channel,
                                             int t, const Span &before, const Span &x, const Span &dout,
                                             unsigned starts, unsigned negatives, IsSilu is_silu, Visit visit) {
  const OxiConv &conv = p.conv;
  float inputs[kSpan], gradients[kSpan];
  unpack(x, inputs);
  unpack(dout, gradients);
  Window window;
  window.clear();
  const auto start_run = [&](int t) __attribute__((always_inline)) {
    if constexpr (kWay == STATES) {
      window.start_run(conv, b, channel, t);
    } else {
      window.clear();
    }
  };
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    if (kWay != STRAIGHT && starts >> i & 1) start_run(t - kHistory + i);
    const float value[1] = {before[kSpan - kHistory + i]};
    window.push(value);
  }
  if (!kPacked && t == 0 && conv.initial_states.data != nullptr) window.start_run(conv, b, channel, 0);
  constexpr int kUnrolled = kWay == STATES ? 1 : kTokens;
#pragma unroll kUnrolled
  for (int i = 0; i < kTokens; ++i) {
    if (kWay != STRAIGHT && starts >> (kHistory + i) & 1) start_run(t + i);
    const float own[1] = {inputs[0]};
    const auto source = [&](int k) __attribute__((always_inline)) { return window.value[k][0]; };
    const float pre = filter.convolve(conv, 0, source, own[0]);
    const bool counts = kWay == STRAIGHT || !(negatives >> i & 1);
    const float dpre = gradient_of_pre(is_silu, pre, gradients[0]);
    visit(counts ? dpre : 0.0f, source, own[0], counts);
    window.push(own);
    push(inputs, 0.0f);
    push(gradients, 0.0f);
  }
}

__device__ __forceinline__ void walk(const OxiConvBackward &p, const Marks &marks, long long b, int channel, int begin,
                                     int end, Sums &sums) {
  __shared__ EachWarp<Ring> x_rings, dout_rings;
  __shared__ EachWarp<Results> results;
  Ring &x_ring = x_rings.own(), &dout_ring = dout_rings.own();
  const OxiConv &conv = p.conv;
  const int lane = threadIdx.x % kWarp;
  const bool x_dense = is_dense(conv, OXI_CONV_X), dout_dense = is_dense(conv, OXI_CONV_DOUT);
  const bool dx_dense = is_dense(conv, OXI_CONV_DX);
  const int dout_end = p.dout.data == nullptr ? 0 : conv.seqlen;
  const bool has_states = conv.initial_states.data != nullptr || p.dfinal_states.data != nullptr;
  if (kPacked && begin == 0 && lane == 0) pass_empty_documents(p, b, channel, 0);

  // From the last step to the first, as a token's gradient takes dpre of later ones.
  const int steps = (end - begin + kStep - 1) / kStep;
  int first = begin + (steps - 1) * kStep + lane * kSpan;
  Element *dx_at = line_to_write(p.dx, b, channel) + first * token_step(p.dx);

  // The next step to ask for; the last one for what is before the span.
  constexpr int kAhead = 3;
  int asked_first = first;
  const Element *x_at = line(conv.x, b, channel) + first * token_step(conv.x);
  const Element *dout_at = line(p.dout, b, channel) + first * token_step(p.dout);
  Span x_asked, dout_asked;
  const auto ask = [&](int n) __attribute__((always_inline)) {
    x_asked = x_ring.ask(conv.x, x_at, x_dense, n, asked_first, max(begin - kSpan, 0), conv.seqlen);
    dout_asked = dout_ring.ask(p.dout, dout_at, dout_dense, n, asked_first, begin, dout_end);
    end_of_batch();
    asked_first -= kStep;
    x_at -= kStep * token_step(conv.x);
    dout_at -= kStep * token_step(p.dout);
  };
  const auto keep = [&](int n) __attribute__((always_inline)) {
    x_ring.keep(n, x_asked, x_dense);
    dout_ring.keep(n, dout_asked, dout_dense);
  };
  __syncwarp();  // no lane still reads of the span before
#pragma unroll
  for (int i = 1; i <= kAhead; ++i) {
    ask(steps - i);
    keep(steps - i);
  }
  const Filter filter(conv, channel);

  // Of the step after, dpre of its first tokens; for the last step they are computed here.
  float later[kHistory] = {};
  if (end < conv.seqlen) {
    const Element *end_x = line(conv.x, b, channel) + end * token_step(conv.x);
    const Element *end_dout = line(p.dout, b, channel) + end * token_step(p.dout);
    const Span before = load_span(conv.x, end_x - kSpan * token_step(conv.x), x_dense, end - kSpan, conv.seqlen);
    unsigned starts = 0, negatives = 0;
    if constexpr (kPacked) {
      starts = Marks::from(marks.starts, begin, end - kHistory);
      negatives = Marks::from(marks.negatives, begin, end);
    }
    const Span x = load_span(conv.x, end_x, x_dense, end, conv.seqlen);
    const Span dout = load_span(p.dout, end_dout, dout_dense, end, dout_end);
    visit_tokens<kHistory, kPacked ? STATES : STRAIGHT>(
        p, filter, b, channel, end, before, x, dout, starts, negatives, conv.silu != 0,
        [&](float dpre, auto, float, bool) __attribute__((always_inline)) { push(later, dpre); });
  }

  // STRAIGHT: of documents none begins or ends among the tokens, their history or as many later ones, no id is negative.
  const auto step = [&](const Span &before, const Span &x, const Span &dout, unsigned starts, unsigned negatives,
                        auto way, auto is_silu) __attribute__((always_inline)) {
    constexpr Way kWay = decltype(way)::value;
    float own[kSpan] = {};
    visit_tokens<kSpan, kWay>(
        p, filter, b, channel, first, before, x, dout, starts, negatives, is_silu,
        [&](float value, auto source, float input, bool counts) __attribute__((always_inline)) {
          push(own, value);
          if (counts) sums.add(conv, 0, value, source, input);
        });
    float dpre[kSpan + kHistory];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) dpre[i] = own[i];
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      dpre[kSpan + k] = __shfl_sync(kAllLanes, lane == 0 ? later[k] : dpre[k], (lane + 1) % kWarp);
      later[k] = dpre[k];
    }

    // From the token on whose dpre is the first: whether a run begins there, and what those of the run that begins with or
    // holds it give to the source `lag` tokens before it.
    const auto starts_at = [&](int i) __attribute__((always_inline)) { return (starts >> (kHistory + i) & 1) != 0; };
    const auto gradient = [&](int lag) __attribute__((always_inline)) {
      float sum = 0.0f;
      bool same_run = true;
#pragma unroll
      for (int i = lag; i < kTaps; ++i) {
        if (kWay != STRAIGHT && i > lag && starts_at(i - lag)) same_run = false;
        if (same_run) sum = fmaf(filter.weight[kHistory - i][0], dpre[i - lag], sum);
      }
      return sum;
    };
    if (!kPacked && first == 0 && p.dinitial_states.data != nullptr) {
#pragma unroll
      for (int lag = 1; lag <= kHistory; ++lag) store_dinitial(p, b, channel, kHistory - lag, gradient(lag));
    }
    // Where documents begin or end: the token's gradient, and those of initial states that end before it.
    const auto finish_runs = [&](int t, float value) __attribute__((always_inline)) {
      const unsigned later_starts = starts >> (kHistory + 1);
      const int run_end = t + __ffs(later_starts);
      const int document = later_starts == 0 || p.dfinal_states.data == nullptr ? -1 : document_to(conv, run_end);
      // What a final state's gradient gives to the source `lag` tokens before.
      const auto dfinal = [&](int lag) __attribute__((always_inline)) {
        const int column = t - lag - run_end + conv.width - 1;
        return document < 0 || column < 0 ? 0.0f : dfinal_value(p, b, document, channel, column);
      };
      if (later_starts & ((1u << kHistory) - 1)) value += dfinal(0);
      if (starts_at(0) && p.dinitial_states.data != nullptr) {
        const long long row = initial_row(conv, b, document_from(conv, t));
#pragma unroll
        for (int lag = 1; lag <= kHistory; ++lag) {
          store_dinitial(p, row, channel, conv.width - 1 - lag, gradient(lag) + dfinal(lag));
        }
      }
      if (starts_at(1)) pass_empty_documents(p, b, channel, t + 1);
      return value;
    };
    float dx[kSpan] = {};
    constexpr int kUnrolled = kWay == STATES ? 1 : kSpan;
#pragma unroll kUnrolled
    for (int i = 0; i < kSpan; ++i) {
      const float value = gradient(0);
      push(dx, kWay != STATES || first + i >= conv.seqlen ? value : finish_runs(first + i, value));
      push(dpre, 0.0f);
      starts >>= 1;
    }
    // A sequence is no shorter than kSpan.
    if (!kPacked && first + kSpan == conv.seqlen) {
#pragma unroll
      for (int k = 0; k < kHistory; ++k) dx[kSpan - kHistory + k] += dfinal_value(p, b, 0, channel, k);
    }
    results.own().store(p.dx, dx_at, dx_dense, first, end, dx);
  };

  for (int n = steps - 1; n >= 0; --n) {
    // All lanes' tokens of this step and of the one before have arrived, and none still reads what is asked over.
    wait_for_batches<kAhead - 2>();
    __syncwarp();
    ask(n - kAhead);
    const Span before = x_ring.place(n, 1), x = x_ring.place(n, 0), dout = dout_ring.place(n, 0);
    unsigned starts = 0, negatives = 0;
    // Past the span a mark keeps what comes before out of the sums, which may not be finite.
    if (kPacked && first <= end) {
      // From kHistory tokens before the lane's first one to kHistory after its last.
      constexpr unsigned kMask = (1u << (kSpan + 2 * kHistory + 1)) - 1;
      starts = Marks::from(marks.starts, begin, first - kHistory) & kMask;
      negatives = Marks::from(marks.negatives, begin, first) & kMask;
    }
    if (!kPacked || !__any_sync(kAllLanes, starts | negatives)) {
      if (conv.silu) {
        step(before, x, dout, starts, negatives, Constant<STRAIGHT>(), Constant<true>());
      } else {
        step(before, x, dout, starts, negatives, Constant<STRAIGHT>(), Constant<false>());
      }
    } else if (kPacked && !has_states) {
      step(before, x, dout, starts, negatives, Constant<BROKEN>(), conv.silu != 0);
    } else if constexpr (kPacked) {
      step(before, x, dout, starts, negatives, Constant<STATES>(), conv.silu != 0);
    }
    keep(n - kAhead);
    dx_at -= kStep * token_step(p.dx);
    first -= kStep;
  }
}

#endif

}  // namespace

// Enough for no spills; along channels of ANY in half precision no more than one block more takes.
constexpr int kRegisters = kExact ? 160 : kAlongTokens || sizeof(Element) == 4 ? 224 : 128;

extern "C" __global__ void __maxnreg__(kRegisters) KERNEL(const __grid_constant__ OxiConvBackward p) {
  __shared__ Marks marks;

  const OxiConv &conv = p.conv;
  const int in_block = kAlongTokens ? threadIdx.x / kWarp : threadIdx.x * kChannels;
  const int block_channels = kAlongTokens ? blockDim.x / kWarp : blockDim.x * kChannels;
  const long long channel = static_cast<long long>(blockIdx.x % conv.channel_blocks) * block_channels + in_block;
  const bool owns = channel < conv.dim;

  wait_for_earlier_work();
  Sums sums{};
  const unsigned block = blockIdx.x / conv.channel_blocks;
  for (unsigned span = block; span < conv.spans; span += p.span_blocks) {
    const long long b = span / conv.spans_of_sequence;
    const int begin = static_cast<int>(span % conv.spans_of_sequence) * conv.tokens;
    const int end = min(conv.tokens, conv.seqlen - begin) + begin;
    if constexpr (kPacked) {
      __syncthreads();
      marks.fill(conv, b, begin, end);
      __syncthreads();
    }
    if (!owns) continue;
    walk(p, marks, b, channel, begin, end, sums);
  }
  if (!owns) return;

  const int missing = missing_taps(conv);
  float *row = p.partials + static_cast<long long>(block) * (conv.width + 1) * conv.dim + channel;
  if constexpr (kAlongTokens) {
    float totals[kTaps + 1];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) totals[k] = sums.dweight[k][0];
    totals[kTaps] = sums.dbias[0];
    warp_sum(totals);
#pragma unroll
    for (int k = 0; k <= kTaps; ++k) {
      if (threadIdx.x % kWarp == 0 && k >= missing) row[static_cast<long long>(k - missing) * conv.dim] = totals[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k <= kTaps; ++k) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (k < missing || channel + c >= conv.dim) continue;
        row[static_cast<long long>(k - missing) * conv.dim + c] = k < kTaps ? sums.dweight[k][c] : sums.dbias[c];
      }
    }
  }
}
