// Where documents begin in packed sequences, and which rows of states are theirs: what the convolution and the scans share.
//
// P, an op's params, has seqlen, ndocs, state_a_document, cu_seqlens, cu_seqlens_step and cu_seqlens_are_64_bit. Nothing is
// trusted of cu_seqlens but the number of its elements: values are only compared with positions.
#pragma once

#include "dtype.cuh"

namespace oxi {

// Where document i begins, i up to ndocs.
template <typename P>
__device__ __forceinline__ long long document_bound(const P &p, int i) {
  if (p.cu_seqlens == nullptr) return i == 0 ? 0 : p.seqlen;
  return load_integer(p.cu_seqlens, i * p.cu_seqlens_step, p.cu_seqlens_are_64_bit);
}

// The first document that ends at or after a position; ndocs if none does.
template <typename P>
__device__ __forceinline__ int first_to_end(const P &p, long long position) {
  int low = 0, high = p.ndocs;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (document_bound(p, middle + 1) >= position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The document whose first token this is; -1 if there is none.
template <typename P>
__device__ __forceinline__ int document_from(const P &p, int t) {
  const int document = first_to_end(p, t + 1ll);
  return document < p.ndocs && document_bound(p, document) == t ? document : -1;
}

// Rows of states that go with a document of sequence b: in final states, and in initial ones, -1 for none.
template <typename P>
__device__ __forceinline__ long long final_row(const P &p, long long b, int document) {
  return p.cu_seqlens == nullptr ? b : document;
}
template <typename P>
__device__ __forceinline__ long long initial_row(const P &p, long long b, int document) {
  if (document < 0) return -1;
  if (p.cu_seqlens == nullptr) return b;
  return p.state_a_document || document == 0 ? document : -1;
}

}  // namespace oxi
