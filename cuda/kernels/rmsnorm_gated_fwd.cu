// Gated RMSNorm, forward. Equals oxiscan.reference.rmsnorm_gated.
//
// For each row and each group of group_size neighbours in it, with r = rsqrt(mean(v^2) + eps):
//
//   GATE = NONE, AFTER:  v = x           out = (v r weight + bias) silu(z)   (AFTER: norm_before_gate; NONE: no z)
//   GATE = BEFORE:       v = x silu(z)   out =  v r weight + bias
//
// Grid: one-dimensional. With warps = 1 a warp owns a group of a row, a block as many groups as it has warps; otherwise a
// block of `warps` warps owns one group. rmsnorm_gated.cuh says which thread owns which elements.
//
// Phases: load x and z; sum v^2 by shuffles and, with several warps, over the block (its barrier, the only one, publishes
// the warps' sums); scale, gate, store.
//
// Shared memory: one float a warp. fp32: everything between loads and stores.

#define HELD VECTORS

#include "dependent_launch.cuh"
#include "math.cuh"
#include "reduce.cuh"
#include "rmsnorm_gated.cuh"
#include "rows.cuh"

using namespace oxi;

constexpr int kMaxWarps = 16;
// So that an SM holds 28 warps: with more registers fewer loads are under way, with fewer the 32 words of x and z spill,
// on 12.x a little already with as many.
constexpr int kRegisters = __CUDA_ARCH__ >= 1200 ? 80 : 72;

extern "C" __global__ void __maxnreg__(kRegisters) KERNEL(const __grid_constant__ OxiNormForward p) {
  __shared__ float warp_sums[kMaxWarps];

  const int threads = p.warps * kWarp;
  const int thread = threadIdx.x % threads;
  const int ngroups = p.dim / p.group_size;
  const long long task = static_cast<long long>(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
  const long long row = divide(task, ngroups);
  wait_for_earlier_work();
  // Only where a warp is alone with its group, so nobody waits for it at a barrier.
  if (row >= p.rows.count) return;
  const int begin = static_cast<int>(task - row * ngroups) * p.group_size;

  long long offsets[3];
  row_offsets<3>(p.rows, {&p.x, &p.z, &p.out}, row, offsets);
  const Line x_line(p.x, offsets[0], begin), z_line(p.z, offsets[1], begin), out_line(p.out, offsets[2], begin);

  Vector x[kHeld], z[kHeld];
  const auto load = [&](int i, int first) {
    x[i] = x_line.load(first, p.group_size, p.dense);
    if constexpr (kGated) z[i] = z_line.load(first, p.group_size, p.dense);
  };
  // Where silu is part of v, v is kept, in the registers that x and z leave, instead of computed twice.
  constexpr bool kKept = kOnChip && kGate == BEFORE;
  float kept[kHeld][kWidth];
  const auto v = [&](int i, int j) { return kGate == BEFORE ? x[i][j] * silu(z[i][j]) : x[i][j]; };

  if constexpr (kOnChip) each_vector(thread, threads, p.group_size, load);
  float sum[1] = {0.0f};
  each_vector(thread, threads, p.group_size, [&](int i, int first) {
    if constexpr (!kOnChip) load(i, first);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = v(i, j);
      sum[0] = fmaf(value, value, sum[0]);
      if constexpr (kKept) kept[i][j] = value;
    }
  });
  block_sum(sum, p.warps, warp_sums);
  const float rstd = rsqrtf(sum[0] / p.group_size + p.eps);

  each_vector(thread, threads, p.group_size, [&](int i, int first) {
    if constexpr (!kOnChip) {
      load(i, first);
    } else if constexpr (!kKept) {
      x[i].forget();
      if constexpr (kGated) z[i].forget();
    }
    float weight[kWidth], bias[kWidth];
    load_parameter(p.weight, begin, first, p.group_size, p.dense, weight);
    const bool biased = p.bias.data != nullptr;
    if (biased) load_parameter(p.bias, begin, first, p.group_size, p.dense, bias);
    float out[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      // Told which products to fuse, all instances give the same bits.
      const float n = (kKept ? kept[i][j] : v(i, j)) * rstd;
      float value = biased ? fmaf(n, weight[j], bias[j]) : n * weight[j];
      if constexpr (kGate == AFTER) value *= silu(z[i][j]);
      out[j] = value;
    }
    out_line.store(first, p.group_size, p.dense, Vector::of(out));
  });
}
