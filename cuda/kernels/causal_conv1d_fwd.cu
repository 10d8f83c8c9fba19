// Causal depthwise convolution, forward. Equals oxiscan.reference.causal_conv1d_fn.
//
//   pre[t] = bias + sum over k of weight[k] source[t - (width - 1) + k]        out[t] = silu(pre[t]), or pre[t]
//
// The sources before a run's first token are its initial state or zeros; a token with a negative id gives 0. The last
// width - 1 sources of a document are its final state.
//
// Grid: block i owns span i / channel_blocks (spans of a sequence are neighbours) and of its channels the
// i % channel_blocks-th part; causal_conv1d.cuh says what of it belongs to a thread. A thread that owns token t writes the
// final states of documents that end with it.
//
// Phases: unless PLAIN mark where runs begin, a barrier. Along channels then without one: the first tokens are asked for; the
// inputs before them; token by token, each asked for kAhead tokens ahead. Along tokens from the first step to the last, each
// asked for kAhead steps ahead, a warp's barrier in each.
//
// Shared memory: tokens under way, 8 KB (none of ANY along channels, 16 KB of ANY along tokens in fp32); of ANY along tokens
// results on their way, 2 or 4 KB; unless PLAIN two bits for each token of the span, 544 bytes. fp32: everything between
// loads and stores.

#include "causal_conv1d.cuh"

using namespace oxi;

namespace {

#if LAYOUT == LAST

// Tokens at once, and how many tokens ahead one is asked for.
constexpr int kBatch = 8;
constexpr int kAhead = kExact ? 16 : kBatch;

__device__ __forceinline__ void walk(const OxiConv &p, const Marks &marks, long long b, int channel, int begin,
                                     int end) {
  __shared__ Line places[Ahead<kAhead>::kPlaces];
  Ahead<kAhead> ahead(places);
  const Element *x_line = line(p.x, b, channel);
  Element *out_line = line_to_write(p.out, b, channel);
  const bool x_dense = is_dense(p, OXI_CONV_X), out_dense = is_dense(p, OXI_CONV_OUT);
  int asked = begin;
  const Element *asked_at = x_line + begin * p.x.stride[2];
  const auto ask = [&](int place) __attribute__((always_inline)) {
    ahead.ask(p, p.x, asked_at, x_dense, channel, place, asked < end);
    end_of_batch();
    asked_at += p.x.stride[2];
    ++asked;
  };
#pragma unroll
  for (int place = 0; place < kAhead; ++place) ask(place);
  const Filter filter(p, channel);

  Window window = window_before(p, marks, b, channel, begin, x_line, x_dense);
  if (begin == 0) {
    store_final_states(p, b, channel, 0, window);
    window.start_run(p, b, channel, 0);
  }

  // `plain`: the batch is whole, no run begins in it, no id is negative. `turn`: the place of its first token.
  const auto batch = [&](int first, int turn, unsigned starts, unsigned negatives, auto plain)
      __attribute__((always_inline)) {
    constexpr bool kPlain = decltype(plain)::value;
    Element *target = out_line + first * p.out.stride[2];
    // Rare ways are loops, as they would otherwise take most of the code; registers under way cannot be indexed in one.
    constexpr int kUnrolled = kPlain || !kExact ? kBatch : 1;
#pragma unroll kUnrolled
    for (int i = 0; i < kBatch; ++i) {
      const int t = first + i;
      if (!kPlain && t >= end) break;
      if (!kPlain && kPacked && starts >> i & 1 && t > 0) {
        if (t > begin) store_final_states(p, b, channel, t, window);
        window.start_run(p, b, channel, t);
      }
      wait_for_batches<kAhead - 1>();
      const Line own = ahead.take(turn + i);
      float x[kChannels], out[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        x[c] = own[c];
        const auto before = [&](int k) { return window.value[k][c]; };
        const float pre = filter.convolve(p, c, before, x[c]);
        out[c] = kPlain || p.silu ? silu(pre) : pre;
        if (!kPlain && kPacked && negatives >> i & 1) out[c] = 0.0f;
      }
      ask(turn + i);
      if constexpr (kPlain) {
        *reinterpret_cast<Line *>(target) = Line::of(out);
        target += p.out.stride[2];
      } else {
        store_channels(p, p.out, out_line, out_dense, channel, t, out);
      }
      window.push(x);
    }
  };
  int turn = 0;
  for (int first = begin; first < end; first += kBatch) {
    constexpr unsigned kMask = (1u << kBatch) - 1;
    const unsigned starts = kPacked ? Marks::from(marks.starts, begin, first) & kMask : 0;
    const unsigned negatives = kPacked ? Marks::from(marks.negatives, begin, first) & kMask : 0;
    if (kExact && p.silu && (starts | negatives) == 0 && first + kBatch <= end) {
      batch(first, turn, starts, negatives, Constant<true>());
    } else {
      batch(first, turn, starts, negatives, Constant<false>());
    }
    if (kAhead > kBatch) turn = (turn + kBatch) % kAhead;
  }
  if (end > 0) store_final_states(p, b, channel, end, window);
}

#else

__device__ __forceinline__ void walk(const OxiConv &p, const Marks &marks, long long b, int channel, int begin,
                                     int end) {
  __shared__ EachWarp<Ring> rings;
  __shared__ EachWarp<Results> results;
  Ring &ring = rings.own();
  const int lane = threadIdx.x % kWarp;
  const bool x_dense = is_dense(p, OXI_CONV_X), out_dense = is_dense(p, OXI_CONV_OUT);
  int first = begin + lane * kSpan;
  Element *out_at = line_to_write(p.out, b, channel) + first * token_step(p.out);

  // The next step to ask for; the first one for what is before the span.
  constexpr int kAhead = 2;
  int asked_first = first - kStep;
  const Element *asked_at = line(p.x, b, channel) + asked_first * token_step(p.x);
  Span asked;
  const auto ask = [&](int n) __attribute__((always_inline)) {
    asked = ring.ask(p.x, asked_at, x_dense, n, asked_first, max(begin - kSpan, 0), end);
    end_of_batch();
    asked_first += kStep;
    asked_at += kStep * token_step(p.x);
  };
#pragma unroll
  for (int n = -1; n < kAhead; ++n) {
    ask(n);
    ring.keep(n, asked, x_dense);
  }
  const Filter filter(p, channel);
  Window window;
  window.clear();
  if (kPacked && begin == 0 && lane == 0) store_final_states(p, b, channel, 0, window);

  // STRAIGHT: of documents none begins or ends among the tokens or their history, no id is negative.
  const auto step = [&](const Span &before, const Span &x, unsigned starts, unsigned negatives, auto way, auto is_silu)
      __attribute__((always_inline)) {
    constexpr Way kWay = decltype(way)::value;
    const auto start_run = [&](int t) __attribute__((always_inline)) {
      if constexpr (kWay == STATES) {
        window.start_run(p, b, channel, t);
      } else {
        window.clear();
      }
    };
    float inputs[kSpan], out[kSpan] = {};
    unpack(x, inputs);
    window.clear();
#pragma unroll
    for (int i = 0; i < kHistory; ++i) {
      if (kWay != STRAIGHT && starts >> i & 1) start_run(first - kHistory + i);
      const float value[1] = {before[kSpan - kHistory + i]};
      window.push(value);
    }
    if (!kPacked && first == 0 && p.initial_states.data != nullptr) window.start_run(p, b, channel, 0);
    constexpr int kUnrolled = kWay == STATES ? 1 : kSpan;
#pragma unroll kUnrolled
    for (int i = 0; i < kSpan; ++i) {
      if (kWay != STRAIGHT && starts >> (kHistory + i) & 1) {
        if (kWay == STATES && i > 0) store_final_states(p, b, channel, first + i, window);
        start_run(first + i);
      }
      const float own[1] = {inputs[0]};
      const auto before_it = [&](int k) { return window.value[k][0]; };
      const float pre = filter.convolve(p, 0, before_it, own[0]);
      const bool counts = kWay == STRAIGHT || !(negatives >> i & 1);
      push(out, !counts ? 0.0f : is_silu ? silu(pre) : pre);
      window.push(own);
      push(inputs, 0.0f);
    }
    results.own().store(p.out, out_at, out_dense, first, end, out);
    const bool ends = kPacked ? kWay == STATES && starts >> (kHistory + kSpan) & 1 : first + kSpan == p.seqlen;
    if (ends) store_final_states(p, b, channel, first + kSpan, window);
  };
  const int steps = (end - begin + kStep - 1) / kStep;
  for (int n = 0; n < steps; ++n) {
    // All lanes' tokens have arrived, and none still reads what is asked over.
    wait_for_batches<kAhead - 1>();
    __syncwarp();
    ask(n + kAhead);
    const Span before = ring.place(n, 1), x = ring.place(n, 0);
    unsigned starts = 0, negatives = 0;
    if (kPacked && first < end) {
      // From kHistory tokens before the lane's first one to the one after its last.
      constexpr unsigned kMask = (1u << (kHistory + kSpan + 1)) - 1;
      starts = Marks::from(marks.starts, begin, first - kHistory) & kMask;
      negatives = Marks::from(marks.negatives, begin, first) & kMask;
    }
    if (!kPacked || !__any_sync(kAllLanes, starts | negatives)) {
      if (p.silu) {
        step(before, x, starts, negatives, Constant<STRAIGHT>(), Constant<true>());
      } else {
        step(before, x, starts, negatives, Constant<STRAIGHT>(), Constant<false>());
      }
    } else if (kPacked && p.initial_states.data == nullptr && p.final_states.data == nullptr) {
      step(before, x, starts, negatives, Constant<BROKEN>(), p.silu != 0);
    } else if constexpr (kPacked) {
      step(before, x, starts, negatives, Constant<STATES>(), p.silu != 0);
    }
    ring.keep(n + kAhead, asked, x_dense);
    out_at += kStep * token_step(p.out);
    first += kStep;
  }
}

#endif

}  // namespace

// Enough for no spills.
constexpr int kRegisters = kPacked ? 168 : 128;

extern "C" __global__ void __maxnreg__(kRegisters) KERNEL(const __grid_constant__ OxiConv p) {
  __shared__ Marks marks;

  const unsigned span = blockIdx.x / p.channel_blocks;
  const long long b = span / p.spans_of_sequence;
  const int begin = static_cast<int>(span % p.spans_of_sequence) * p.tokens;
  const int end = min(p.tokens, p.seqlen - begin) + begin;
  const int in_block = kAlongTokens ? threadIdx.x / kWarp : threadIdx.x * kChannels;
  const int block_channels = kAlongTokens ? blockDim.x / kWarp : blockDim.x * kChannels;
  const long long channel = static_cast<long long>(blockIdx.x % p.channel_blocks) * block_channels + in_block;

  wait_for_earlier_work();
  if constexpr (kPacked) {
    marks.fill(p, b, begin, end);
    __syncthreads();
  }
  if (channel < p.dim) {
    walk(p, marks, b, channel, begin, end);
  }
}
