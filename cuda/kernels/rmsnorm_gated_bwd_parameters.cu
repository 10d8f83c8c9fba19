// Gradients of the gated norm's parameters: the sum of what rmsnorm_gated_bwd's blocks of rows left in partials.
//
//   dweight[c] = sum over b of partials[b, 0, c]        dbias[c] = sum over b of partials[b, 1, c]
//
// Grid: a block of 32 x 32 threads owns 32 columns of (weight, bias) one after the other. Thread (c, r) sums rows r,
// r + 32, ... of its column; the barrier publishes those sums, then warp r adds up column r by shuffles.
//
// Shared memory: 32 x 33 floats, a row of 33 so that a column lies in 32 banks. fp32: all sums.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

extern "C" __global__ void __launch_bounds__(kWarp *kWarp) KERNEL(const __grid_constant__ OxiNormParameters p) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const long long columns = static_cast<long long>(p.dim) * (p.dbias.data != nullptr ? 2 : 1);
  const long long first = static_cast<long long>(blockIdx.x) * kWarp;

  wait_for_earlier_work();
  const float total = column_sum(p.partials, p.blocks, columns, first);
  const long long column = first + warp;
  if (lane == 0 && column < columns) {
    const OxiVector &gradient = column < p.dim ? p.dweight : p.dbias;
    const long long element = column < p.dim ? column : column - p.dim;
    store_scalar(gradient.data, gradient.dtype, element * gradient.step, total);
  }
}
