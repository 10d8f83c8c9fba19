// What the kernels of the chunk scan share: which tokens a block walks, in tiles that never cross from one document into the
// next, what dt and A make of a token, where states lie.
//
// A *run* is what shares a state: it begins at a sequence's first token, at each value of cu_seqlens, and wherever seq_idx
// differs from the token before. A block walks one segment of a sequence, for one head, or for a slice of its headdim.
#pragma once

#include "dependent_launch.cuh"
#include "documents.cuh"
#include "dtype.cuh"
#include "math.cuh"
#include "params.h"
#include "reduce.cuh"

namespace oxi {

using Element = ELEMENT;

// The part of the work that a block has: blocks of a head are neighbours, then those of the heads that share B and C.
struct Walk {
  long long b;
  // Of the sequence's segments, or with states_only of the parts of all but the last one.
  int segment;
  int head;
  int group;
  // Of headdim, and its first row of the state.
  int slice;
  int first;
  // Tokens.
  int begin;
  int end;

  __device__ __forceinline__ explicit Walk(const OxiSsd &p) {
    int rest = blockIdx.x;
    slice = rest % p.slices;
    first = slice * p.slice_step;
    rest /= p.slices;
    head = rest % p.nheads;
    rest /= p.nheads;
    const int segments = p.states_only ? parts_before(p.segments - 1) : p.segments;
    segment = rest % segments;
    b = rest / segments;
    group = head / p.heads_per_group;
    const int tokens = p.states_only ? p.segment_tokens / OXI_SSD_SEGMENT_PARTS : p.segment_tokens;
    begin = segment * tokens;
    end = p.states_only || segment + 1 < p.segments ? begin + tokens : p.seqlen;
  }

  // How many parts come before a segment.
  __device__ static __forceinline__ int parts_before(int segment) {
    return segment * OXI_SSD_SEGMENT_PARTS;
  }

  // Where what a part of a segment adds to this head's state is among all of them.
  __device__ __forceinline__ long long of_part(const OxiSsd &p, int part) const {
    return (b * parts_before(p.segments - 1) + part) * p.nheads + head;
  }

  // Where the states of this head and slice begin, in a tensor of them.
  __device__ __forceinline__ long long state_offset(const OxiTensor4 &states, long long row) const {
    return row * states.stride[0] + head * states.stride[1] + first * states.stride[2];
  }
};

// A tile: none if its size is 0. Whether a run begins with it; whether another run, or nothing, comes after it.
struct alignas(16) Span {
  int begin;
  int size;
  int starts;
  int ends;
};

// The tokens of a walk, tile after tile. Every lane of a warp has the same values; seq_idx and cu_seqlens are read by all 32.
struct Tiles : Span {
  // Whether it is an odd one, counted from where a run or a segment begins.
  bool odd = true;

  __device__ __forceinline__ Tiles(const OxiSsd &p, const Walk &walk)
      : p(p), ids(p.seq_idx == nullptr ? nullptr : p.seq_idx + walk.b * p.seq_idx_stride[0]), first(walk.begin), end(walk.end) {
    begin = walk.begin;
    size = 0;
    ends = begin == 0;
    if (p.cu_seqlens != nullptr) {
      document = first_to_end(p, begin);
      bound = document < p.ndocs ? bound_of(document + 1) : kNowhere;
    }
    if (ids != nullptr && begin > 0 && begin < p.seqlen && id(begin) != id(begin - 1)) ends = true;
    if (bound == begin) ends = true;
  }

  // Go on to the next tile; false, and a size of 0, if there is none.
  __device__ __forceinline__ bool next() {
    begin += size;
    size = clamp_to_tile(end - begin);
    if (size == 0) return false;
    starts = ends;
    odd = !starts && !odd;
    // The bit of token begin + 1 + i says whether a run begins there.
    unsigned long long marks = 0;
    if (ids != nullptr) {
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = begin + 1 + half * kWarp + lane;
        const bool differs = t < p.seqlen && id(t) != id(t - 1);
        marks |= static_cast<unsigned long long>(__ballot_sync(kAllLanes, differs)) << (half * kWarp);
      }
    }
    if (p.cu_seqlens != nullptr) {
      while (bound <= begin) advance();
      if (bound - begin <= OXI_SSD_TILE) marks |= 1ull << (bound - begin - 1);
    }
    if (begin + size == p.seqlen) marks |= 1ull << (size - 1);
    const int run = __ffsll(static_cast<long long>(marks));
    ends = run > 0 && run <= size;
    if (ends) size = run;
    return true;
  }

  // Whether no run begins within a sequence, so that one can go to any tile.
  __device__ __forceinline__ bool is_plain() const { return ids == nullptr && p.cu_seqlens == nullptr; }

  // Go to the i-th tile of a plain walk; how many there are too few for that, 0 if it exists, else with a size of 0.
  __device__ __forceinline__ int go_to(int i) {
    const int count = (end - first + OXI_SSD_TILE - 1) / OXI_SSD_TILE;
    begin = first + i * OXI_SSD_TILE;
    size = clamp_to_tile(end - begin);
    starts = begin == 0;
    ends = begin + size == p.seqlen;
    odd = i % 2 != 0;
    return max(i - count + 1, 0);
  }

 private:
  __device__ static __forceinline__ int clamp_to_tile(int tokens) { return max(min(tokens, OXI_SSD_TILE), 0); }

  static constexpr int kNowhere = 0x7fffffff;
  const OxiSsd &p;
  const int *ids;
  int first;
  int end;
  int document = 0;
  // Where the next document begins.
  int bound = kNowhere;

  __device__ __forceinline__ int id(int t) const { return ids[t * p.seq_idx_stride[1]]; }

  __device__ __forceinline__ int bound_of(int i) const {
    return static_cast<int>(min(document_bound(p, i), static_cast<long long>(kNowhere)));
  }

  // On to the first of the next 32 documents that ends after `begin`, or past them all.
  __device__ __forceinline__ void advance() {
    const int candidate = document + 1 + threadIdx.x % kWarp;
    const int own = candidate < p.ndocs ? bound_of(candidate + 1) : kNowhere;
    const unsigned found = __ballot_sync(kAllLanes, own > begin);
    document += found == 0 ? kWarp : __ffs(found);
    if (found != 0) bound = __shfl_sync(kAllLanes, own, __ffs(found) - 1);
  }
};

// The least log2 of a token's decay that the matrix kernels tell apart: below 2^-126 a power is 0 in fp32, and a sum of smaller
// numbers would have no digits left for other tokens' decays.
constexpr float kLeastDecay = -150.0f;

// What dt and A are to one head.
struct Discretize {
  // A, times log2(e): decays are powers of 2.
  float A;
  float bias;

  __device__ __forceinline__ Discretize(const OxiSsd &p, int head) {
    A = load_either<Element>(p.A.data, head * p.A.step, p.A.dtype == OXI_F32) * 1.4426950408889634f;
    bias = 0.0f;
    if (p.dt_bias.data != nullptr) {
      bias = load_either<Element>(p.dt_bias.data, head * p.dt_bias.step, p.dt_bias.dtype == OXI_F32);
    }
  }

  // dt with bias, softplus and clamp; NaN stays NaN.
  __device__ __forceinline__ float dt(const OxiSsd &p, float raw) const {
    float dt = raw + bias;
    if (p.dt_softplus) dt = softplus(dt);
    if (dt < p.dt_min) dt = p.dt_min;
    return dt > p.dt_max ? p.dt_max : dt;
  }

  // The same; slope: its derivative.
  __device__ __forceinline__ float dt(const OxiSsd &p, float raw, float &slope) const {
    const float biased = raw + bias;
    const float unclamped = p.dt_softplus ? softplus(biased) : biased;
    slope = p.dt_softplus && biased <= 20.0f ? sigmoid(biased) : 1.0f;
    if (unclamped < p.dt_min || unclamped > p.dt_max) slope = 0.0f;
    return dt(p, raw);
  }
};

// By one warp: the sum of log2 decays up to each of the two tokens that a lane has of a tile; past the tile, where dt is 0, up
// to its last token. Gives the sum up to the lane's second token as it was added up over lanes, which l rounds otherwise.
__device__ __forceinline__ float sum_decays(const Discretize &head, const float (&dt)[2], float (&l)[2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float decay = dt[i] * head.A;
    l[i] = decay < kLeastDecay ? kLeastDecay : decay;
  }
  l[1] += l[0];
  float sum = l[1];
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  // From the other lanes' sums alone: taking this lane's away again would round.
  float before = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane == 0) before = 0.0f;
  l[0] += before;
  l[1] += before;
  return sum;
}

// The same of a tile of `size`, with dt, where raw(i) is the i-th token's as it comes.
template <typename Raw>
__device__ __forceinline__ float sum_decays(const OxiSsd &p, const Discretize &head, int size, Raw raw, float (&dt)[2],
                                            float (&l)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) dt[i] = 2 * static_cast<int>(threadIdx.x % kWarp) + i < size ? head.dt(p, raw(i)) : 0.0f;
  return sum_decays(head, dt, l);
}

// The row of initial states that is a document's, -1 for none; the same of the run that begins at token t.
__device__ __forceinline__ long long document_row(const OxiSsd &p, long long b, int document) {
  return p.initial_states.data == nullptr ? -1 : initial_row(p, b, document);
}
__device__ __forceinline__ long long entry_row(const OxiSsd &p, long long b, int t) {
  return p.initial_states.data == nullptr ? -1 : initial_row(p, b, document_from(p, t));
}

__device__ __forceinline__ float load_initial(const OxiSsd &p, long long offset) {
  return load_either<Element>(p.initial_states.data, offset, p.wide_initial_states);
}

// The slot of entry_states of the state that enters a tile, -1 where it is zeros.
__device__ __forceinline__ int entry_slot(const OxiSsd &p, long long b, const Span &tile) {
  if (!tile.starts) return tile.begin / p.slot_tokens;
  if (p.initial_states.data == nullptr) return -1;
  const int document = document_from(p, tile.begin);
  return initial_row(p, b, document) < 0 ? -1 : p.token_slots + document;
}

// What a slot of a sequence's `slots` has of a head's slice, in so many bytes.
__device__ __forceinline__ unsigned char *in_slot(void *states, int slots, const OxiSsd &p, long long b, int slot, int head,
                                                  int slice, int bytes) {
  return static_cast<unsigned char *>(states) + (((b * slots + slot) * p.nheads + head) * p.slices + slice) * bytes;
}
__device__ __forceinline__ unsigned char *in_entry_slot(const OxiSsd &p, long long b, int slot, int head, int slice, int bytes) {
  return in_slot(p.entry_states, p.entry_slots, p, b, slot, head, slice, bytes);
}

// Call store(row, entry) for each document that ends at token `end`: its row of varlen states, and the row of initial states
// that is its state if it is empty, -1 for none, -2 if it is not empty.
template <typename Store>
__device__ __forceinline__ void for_documents_ending_at(const OxiSsd &p, long long b, int end, Store store) {
  for (int document = first_to_end(p, end); document < p.ndocs; ++document) {
    if (document_bound(p, document + 1) != end) break;
    const bool empty = document_bound(p, document) == end;
    store(final_row(p, b, document), empty ? document_row(p, b, document) : -2);
  }
}

}  // namespace oxi
