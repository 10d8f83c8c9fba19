// What the gated norm's forward and backward share: which thread owns what, and how it is read.
//
// A group of a row belongs to `threads` threads. Thread t owns its vectors t, t + threads, ... of 16 bytes and keeps them
// on the chip; with VECTORS = 0, for groups too long for that and for any strides, it reads them once more in every phase,
// then from L2. Which element belongs to which thread does not depend on strides or alignment, so neither do the bits of
// the result.
#pragma once

#include "dtype.cuh"
#include "params.h"

namespace oxi {

using Element = ELEMENT;

// GATE: whether there is a gate z, and where it is applied.
enum Gate { NONE, AFTER, BEFORE };
constexpr Gate kGate = GATE;
constexpr bool kGated = kGate != NONE;

// Elements of a vector, and vectors held at once: HELD is the kernel's to define.
constexpr int kWidth = kVector<Element>;
constexpr bool kOnChip = VECTORS > 0;
constexpr int kHeld = kOnChip ? HELD : 1;

using Vector = Pack<Element, kWidth>;

// Call body(i, first) for each of the thread's vectors: its place among those held, and its first element in the group.
template <typename Body>
__device__ inline void each_vector(int thread, int threads, int group_size, Body body) {
  if constexpr (kOnChip) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) body(i, (thread + i * threads) * kWidth);
  } else {
    // 64 bits, as the last step may go past the largest dim.
    for (long long first = thread * kWidth; first < group_size; first += threads * kWidth) {
      body(0, static_cast<int>(first));
    }
  }
}

// A group of a row of a tensor.
struct Line {
  Element *data;
  long long step;

  __device__ Line(const OxiRowTensor &tensor, long long offset, int begin)
      : data(static_cast<Element *>(tensor.data) + offset + begin * tensor.step), step(tensor.step) {}

  __device__ Vector load(int first, int group_size, bool dense) const {
    return load_pack<kWidth>(data, step, first, group_size, kOnChip || dense);
  }
  __device__ void store(int first, int group_size, bool dense, const Vector &vector) const {
    store_pack(data, step, first, group_size, kOnChip || dense, vector);
  }
};

// A vector's worth of weight or bias for the group whose first element in a row is `begin`, in fp32.
__device__ inline void load_parameter(const OxiVector &parameter, int begin, int first, int group_size, bool dense,
                                      float (&values)[kWidth]) {
  const auto load = [&](auto *data) {
    const auto pack = load_pack<kWidth>(data + begin * parameter.step, parameter.step, first, group_size,
                                        kOnChip || dense);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = pack[j];
  };
  // Parameters have the activations' dtype or fp32.
  if (parameter.dtype == OXI_F32) {
    load(static_cast<const float *>(parameter.data));
  } else {
    load(static_cast<const Element *>(parameter.data));
  }
}

}  // namespace oxi
