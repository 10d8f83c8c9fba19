// The gradient of state passing's decay: the sum of what state_passing_bwd's warps left in partials.
//
//   ddecay[b, c, h] = sum over w of partials[w, b, h, c]
//
// Grid: a block owns 32 of the batch nheads nchunks columns. Warp r sums rows r, r + warps, ... of a column a lane; the
// barrier publishes those sums, which the first warp adds up. The number of warps depends on that of rows alone, and so does
// the order of a sum.
//
// Shared memory: 32 x 32 floats. fp32: all sums.

#include "dependent_launch.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

extern "C" __global__ void __launch_bounds__(kWarp *kWarp) KERNEL(const __grid_constant__ OxiStatePassingDecay p) {
  const long long first = static_cast<long long>(blockIdx.x) * kWarp;

  wait_for_earlier_work();
  const float total = column_sum(p.partials, p.warps_of_head, p.columns, first);
  const long long column = first + threadIdx.x;
  if (threadIdx.x >= kWarp || column >= p.columns) return;
  const long long of_all = column / p.nchunks, c = column % p.nchunks;
  const long long b = of_all / p.nheads, head = of_all % p.nheads;
  const OxiTensor3 &t = p.ddecay;
  static_cast<float *>(t.data)[b * t.stride[0] + c * t.stride[1] + head * t.stride[2]] = total;
}
