// What the kernels of the chunk scan's backward share: where tiles are, which states go with them, who walks what.
//
// Tiles are of up to 64 tokens and begin anew where a run (ssd.cuh) or a segment of a long sequence does. The gradients within
// a tile need the state that enters it, H, and the gradient of the one that leaves it, G: kernels that walk along a sequence,
// one block in reverse for G and, unless the forward has kept H, another one forward for that, leave them in *slots*, from
// where the blocks that have tiles take them: at every boundary between tiles within a run, or at every other one, where
// slot_tokens is 128. A boundary before token t has slot t / slot_tokens: two of them are at least as far apart, or the later
// one is a segment's begin, a multiple of that. Behind those slots, where there are initial states, for H, or gradients of
// documents' last states, for G, document d has slot token_slots + d. G's last slot is for the gradient of a sequence's last
// state, where no document's has it.
#pragma once

#include "ssd.cuh"

namespace oxi {

// The tiles of a sequence, from marks. A thread reads what it needs, so that all threads of a block can ask the same.
//
// Where a sequence is one run, they begin at multiples of 64, and segments at some of 128: few instructions, which matters as
// those that a block comes to once a tile come late.
struct Cuts {
  const unsigned long long *marks;
  const int *run_starts;
  int windows;
  int seqlen;
  int segment_tokens;

  __device__ __forceinline__ Cuts(const OxiSsdBackward &p, long long b)
      : marks(p.marks == nullptr ? nullptr : p.marks + b * p.windows),
        run_starts(p.marks == nullptr ? nullptr : p.run_starts + b * p.windows),
        windows(p.windows),
        seqlen(p.ssd.seqlen),
        segment_tokens(p.ssd.segment_tokens) {}

  // The tile that begins with this token, as a tile or a segment does; a size of 0 at the sequence's end.
  __device__ __forceinline__ Span from(int begin) const {
    Span tile{begin, max(min(seqlen - begin, OXI_SSD_TILE), 0), begin == 0, false};
    if (marks != nullptr && tile.size > 0) {
      const int end_of_segment = min(begin / segment_tokens * segment_tokens, seqlen - segment_tokens) + segment_tokens;
      tile.size = min(end_of_segment - begin, tile.size);
      tile.starts = begins(begin);
      // Bit i: a run begins with token begin + 1 + i.
      const int word = (begin + 1) / OXI_SSD_TILE, shift = (begin + 1) % OXI_SSD_TILE;
      unsigned long long next = word < windows ? marks[word] >> shift : 0;
      if (shift > 0 && word + 1 < windows) next |= marks[word + 1] << (OXI_SSD_TILE - shift);
      const int run = __ffsll(static_cast<long long>(next));
      if (run > 0 && run <= tile.size) tile.size = run, tile.ends = true;
    }
    if (begin + tile.size == seqlen) tile.ends = true;
    return tile;
  }

  // The tile that ends before this token, from 1 on, where a tile does.
  __device__ __forceinline__ Span before(int end) const {
    if (marks == nullptr) return from((end - 1) / OXI_SSD_TILE * OXI_SSD_TILE);
    const int anchor = last_cut(end - 1);
    return from(anchor + (end - 1 - anchor) / OXI_SSD_TILE * OXI_SSD_TILE);
  }

  // Where the first tile begins that begins in a window, or after the window if none does.
  __device__ __forceinline__ int first_in(int window) const {
    const int begin = window * OXI_SSD_TILE;
    if (marks == nullptr) return begin;
    const int anchor = last_cut(begin);
    const int next = anchor + (begin - anchor + OXI_SSD_TILE - 1) / OXI_SSD_TILE * OXI_SSD_TILE;
    const int run = __ffsll(static_cast<long long>(marks[window]));
    return run > 0 ? min(next, begin + run - 1) : next;
  }

  // Whether a tile is an odd one, counted from where a run or a segment begins.
  __device__ __forceinline__ bool is_odd(const Span &tile) const {
    if (marks == nullptr) return tile.begin / OXI_SSD_TILE % 2 != 0;
    return (tile.begin - last_cut(tile.begin)) / OXI_SSD_TILE % 2 != 0;
  }

  // Whether an odd tile follows an even one.
  __device__ __forceinline__ bool has_odd_after(const Span &tile) const {
    if (tile.ends || is_odd(tile)) return false;
    return marks == nullptr || (tile.begin + tile.size) % segment_tokens != 0;
  }

 private:
  __device__ __forceinline__ bool begins(int t) const { return marks[t / OXI_SSD_TILE] >> t % OXI_SSD_TILE & 1; }

  // The last token up to this one with which a run or a segment begins, where there are marks.
  __device__ __forceinline__ int last_cut(int t) const {
    const int window = t / OXI_SSD_TILE;
    const unsigned long long up_to = marks[window] << (OXI_SSD_TILE - 1 - t % OXI_SSD_TILE);
    const int run = up_to != 0 ? t - __clzll(static_cast<long long>(up_to)) : run_starts[window];
    return max(run, t / segment_tokens * segment_tokens);
  }
};

// The document with tokens whose last one comes before this token, -1 if there is none.
__device__ __forceinline__ int document_to(const OxiSsd &p, int end) {
  for (int document = first_to_end(p, end); document < p.ndocs && document_bound(p, document + 1) == end; ++document) {
    if (document_bound(p, document) != end) return document;
  }
  return -1;
}

// As entry_slot, of the gradient of the state that leaves a tile.
__device__ __forceinline__ int exit_slot(const OxiSsdBackward &p, const Span &tile) {
  const int end = tile.begin + tile.size;
  if (!tile.ends) return end / p.ssd.slot_tokens;
  const int document = p.ssd.varlen_states.data == nullptr ? -1 : document_to(p.ssd, end);
  if (document >= 0) return p.ssd.token_slots + document;
  const bool has_final = end == p.ssd.seqlen && p.ssd.final_states.data != nullptr;
  return has_final ? p.ssd.token_slots + p.document_slots : -1;
}

// What a slot has of a head's slice, in so many bytes.
__device__ __forceinline__ unsigned char *in_slot(const OxiSsdBackward &p, bool of_gradients, long long b, int slot, int head,
                                                  int slice, int bytes) {
  if (!of_gradients) return in_entry_slot(p.ssd, b, slot, head, slice, bytes);
  return in_slot(p.exit_states, p.exit_slots, p.ssd, b, slot, head, slice, bytes);
}

// The part of the work along states that a block has: one direction, of one segment, one head, one slice, some columns.
struct StateWalkOf {
  long long b;
  // In reverse, for the states' gradients.
  bool reverse;
  // How many of the sequence's segments are walked before.
  int order;
  int head;
  int group;
  int slice;
  int first;
  int column_part;
  int first_column;
  int begin;
  int end;

  __device__ __forceinline__ StateWalkOf(const OxiSsdBackward &params, int columns) {
    const OxiSsd &p = params.ssd;
    int rest = blockIdx.x;
    column_part = rest % params.column_parts;
    first_column = column_part * columns;
    rest /= params.column_parts;
    slice = rest % p.slices;
    first = slice * p.slice_step;
    rest /= p.slices;
    head = rest % p.nheads;
    rest /= p.nheads;
    reverse = !params.finds_entry_states || rest % 2 != 0;
    if (params.finds_entry_states) rest /= 2;
    const int orders = p.states_only ? p.segments - 1 : p.segments;
    order = rest % orders;
    b = rest / orders;
    group = head / p.heads_per_group;
    const int segment = reverse ? p.segments - 1 - order : order;
    begin = segment * p.segment_tokens;
    end = segment + 1 < p.segments ? begin + p.segment_tokens : p.seqlen;
  }

  // Where the states of this head, slice and these columns begin, in a tensor of them.
  __device__ __forceinline__ long long state_offset(const OxiTensor4 &states, long long row) const {
    return row * states.stride[0] + head * states.stride[1] + first * states.stride[2] + first_column * states.stride[3];
  }

  // Among what segments add, those of this head at another place in the order.
  __device__ __forceinline__ long long added(const OxiSsdBackward &p, int order) const {
    return ((reverse * p.batch + b) * (p.ssd.segments - 1) + order) * p.ssd.nheads + head;
  }
};

}  // namespace oxi
