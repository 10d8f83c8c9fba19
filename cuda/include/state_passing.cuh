// What both directions of state passing share: who owns which elements of a state, and how they are moved.
#pragma once

#include "dtype.cuh"
#include "params.h"
#include "reduce.cuh"

namespace oxi {

// Warps of a block at most. They share nothing: few, for multiprocessors to end together.
constexpr int kPassingWarps = 2;
// Blocks of a multiprocessor at once, at least: enough loads under way, and registers for all without spills.
constexpr int kPassingBlocks = 8;

// What a thread owns of every state of one head: as many neighbours of a row as 16 bytes of T hold. A row takes whole packs,
// the rows of a head whole warps; lanes past the last row own nothing, which is a pack behind a row's end. With kDense or
// without it, a thread owns the same.
template <typename T, bool kDense>
struct Share {
  static constexpr int kWidth = kVector<T>;
  int size;
  unsigned b;
  unsigned head;
  int warp;  // among those of the head
  int row;
  int first;

  __device__ explicit Share(const OxiChunkStates &p) : size(p.dstate) {
    const unsigned of_all = blockIdx.x / p.blocks_of_head;
    b = of_all / p.nheads;
    head = of_all % p.nheads;
    warp = blockIdx.x % p.blocks_of_head * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    const long long pack = static_cast<long long>(warp) * kWarp + threadIdx.x % kWarp;
    const int packs_of_row = (p.dstate - 1) / kWidth + 1;
    const bool owns = pack / packs_of_row < p.headdim;
    row = owns ? pack / packs_of_row : 0;
    first = owns ? pack % packs_of_row * kWidth : size;
  }

  // The decays of the head, from chunk 0 on.
  __device__ const float *decays(const OxiTensor3 &t) const {
    return static_cast<const float *>(t.data) + b * t.stride[0] + head * t.stride[2];
  }

  // The row in chunk 0, in the one state of a sequence.
  __device__ long long row_of(const OxiTensor5 &t) const {
    return b * t.stride[0] + head * t.stride[2] + row * t.stride[3];
  }
  __device__ long long row_of(const OxiTensor4 &t) const {
    return b * t.stride[0] + head * t.stride[1] + row * t.stride[2];
  }

  __device__ Pack<T, kWidth> load(const OxiTensor5 &t, unsigned chunk) const {
    const T *line = static_cast<const T *>(t.data) + row_of(t) + chunk * t.stride[1];
    return load_pack<kWidth>(line, t.stride[4], first, size, kDense);
  }
  __device__ void store(const OxiTensor5 &t, unsigned chunk, const float (&values)[kWidth]) const {
    T *line = static_cast<T *>(t.data) + row_of(t) + chunk * t.stride[1];
    store_pack(line, t.stride[4], first, size, kDense, Pack<T, kWidth>::of(values));
  }

  // The same of a sequence's one state, of elements of U; nothing happens where there is no such tensor.
  template <typename U>
  __device__ void load_one(float (&values)[kWidth], const OxiTensor4 &t) const {
    if (t.data == nullptr) return;
    const auto pack = load_pack<kWidth>(static_cast<const U *>(t.data) + row_of(t), t.stride[3], first, size, kDense);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = pack[i];
  }
  template <typename U>
  __device__ void store_one(const OxiTensor4 &t, const float (&values)[kWidth]) const {
    if (t.data == nullptr) return;
    U *line = static_cast<U *>(t.data) + row_of(t);
    store_pack(line, t.stride[3], first, size, kDense, Pack<U, kWidth>::of(values));
  }
};

}  // namespace oxi
