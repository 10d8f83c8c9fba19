// Gradients of the convolution's parameters: the sum of what causal_conv1d_bwd's blocks left in partials.
//
//   dweight[c, k] = sum over b of partials[b, k, c]        dbias[c] = sum over b of partials[b, width, c]
//
// Grid: a block owns 32 of the (width + 1) dim columns. Warp r sums rows r, r + warps, ... of a column a lane; the barrier
// publishes those sums, which the first warp adds up.
//
// Shared memory: 32 x 32 floats. fp32: all sums.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

extern "C" __global__ void __launch_bounds__(kWarp *kWarp) KERNEL(const __grid_constant__ OxiConvParameters p) {
  const long long columns = static_cast<long long>(p.dim) * (p.width + 1);
  const long long first = static_cast<long long>(blockIdx.x) * kWarp;

  wait_for_earlier_work();
  const float total = column_sum(p.partials, p.blocks, columns, first);
  const long long column = first + threadIdx.x;
  if (threadIdx.x >= kWarp || column >= columns) return;
  const long long tap = column / p.dim, channel = column % p.dim;
  if (tap < p.width) {
    store_scalar(p.dweight.data, p.dweight_dtype, channel * p.dweight.stride[0] + tap * p.dweight.stride[1], total);
  } else if (p.dbias.data != nullptr) {
    store_scalar(p.dbias.data, p.dbias.dtype, channel * p.dbias.step, total);
  }
}
