// Gradients of the gated norm's parameters: the sum of what rmsnorm_gated_bwd's blocks of rows left in partials.
//
//   dweight[c] = sum over b of partials[b, 0, c]        dbias[c] = sum over b of partials[b, 1, c]
//
// Grid: a block owns 32 columns of (weight, bias) one after the other. Warp r sums rows r, r + warps, ... of a column a
// lane; the barrier publishes those sums, which the first warp adds up.
//
// Shared memory: 32 x 32 floats. fp32: all sums.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

extern "C" __global__ void __launch_bounds__(kWarp *kWarp) KERNEL(const __grid_constant__ OxiNormParameters p) {
  const long long columns = static_cast<long long>(p.dim) * (p.dbias.data != nullptr ? 2 : 1);
  const long long first = static_cast<long long>(blockIdx.x) * kWarp;

  wait_for_earlier_work();
  const float total = column_sum(p.partials, p.blocks, columns, first);
  const long long column = first + threadIdx.x;
  if (threadIdx.x < kWarp && column < columns) {
    const OxiVector &gradient = column < p.dim ? p.dweight : p.dbias;
    const long long element = column < p.dim ? column : column - p.dim;
    store_scalar(gradient.data, gradient.dtype, element * gradient.step, total);
  }
}
