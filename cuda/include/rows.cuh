// Tensors (..., dim) as rows along their last dimension.
#pragma once

#include "params.h"

namespace oxi {

__device__ inline long long divide(long long a, long long b) {
  // 64-bit division takes about a hundred instructions more.
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  return a / b;
}

// Element offsets of row `row` in each of N tensors.
template <int N>
__device__ inline void row_offsets(const OxiRows &rows, const OxiRowTensor *const (&tensors)[N], long long row,
                                   long long (&offsets)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) offsets[i] = 0;
  for (int axis = rows.ndim - 1; axis > 0; --axis) {
    const long long quotient = divide(row, rows.size[axis]);
    const long long index = row - quotient * rows.size[axis];
#pragma unroll
    for (int i = 0; i < N; ++i) offsets[i] += index * tensors[i]->stride[axis];
    row = quotient;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) offsets[i] += row * tensors[i]->stride[0];
}

}  // namespace oxi
