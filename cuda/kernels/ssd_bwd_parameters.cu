// Gradients of the chunk scan's parameters: the sum of what the tiles of its backward left in partials (params.h).
//
//   dA[h], ddt_bias[h], dD[h, c] = sum over windows of partials[window, ·]
//
// Grid: a block owns 32 of the nheads (2 + dD_columns) columns. Warp r sums rows r, r + warps, ... of a column a lane; the
// barrier publishes those sums, which the first warp adds up.
//
// Shared memory: 32 x 32 floats. fp32: all sums.

#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

extern "C" __global__ void __launch_bounds__(kWarp *kWarp) KERNEL(const __grid_constant__ OxiSsdBackward p) {
  const long long nheads = p.ssd.nheads, columns = nheads * (2 + p.dD_columns);
  const long long first = static_cast<long long>(blockIdx.x) * kWarp;

  wait_for_earlier_work();
  const float total = column_sum(p.partials, p.batch * p.windows, columns, first);
  const long long column = first + threadIdx.x;
  if (threadIdx.x >= kWarp || column >= columns) return;
  if (column < nheads) {
    store_scalar(p.dA.data, p.dA.dtype, column * p.dA.step, total);
  } else if (column < 2 * nheads) {
    if (p.ddt_bias.data == nullptr) return;
    store_scalar(p.ddt_bias.data, p.ddt_bias.dtype, (column - nheads) * p.ddt_bias.step, total);
  } else {
    const long long head = (column - 2 * nheads) / p.dD_columns, of_head = (column - 2 * nheads) % p.dD_columns;
    store_scalar(p.dD.data, p.dD_dtype, head * p.dD.stride[0] + of_head * p.dD.stride[1], total);
  }
}
