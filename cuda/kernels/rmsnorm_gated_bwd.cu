// Gated RMSNorm, backward, but for the sum over blocks (rmsnorm_gated_bwd_parameters). Equals the gradients of
// oxiscan.reference.rmsnorm_gated.
//
// With r = rsqrt(mean(v^2) + eps), n = v r, dy the gradient of n weight + bias, and m = mean(dy weight n) over the group:
//
//   GATE = NONE:    v = x           dy = dout           dx = dv
//   GATE = AFTER:   v = x           dy = dout silu(z)   dx = dv           dz = dout (n weight + bias) silu'(z)
//   GATE = BEFORE:  v = x silu(z)   dy = dout           dx = dv silu(z)   dz = dv x silu'(z)
//   dv = r (dy weight - n m)        dweight = sum of dy n over rows       dbias = sum of dy over rows
//
// r and m come from the sums of v^2 and of dy weight v (m is r times the latter's mean): one reduction a row.
//
// Grid: block b of group g (blockIdx.x = b ngroups + g) owns rows b, b + blocks, ... of that group: with warps = 1 as many
// at a time as it has warps, a row each; otherwise one at a time. rmsnorm_gated.cuh says which thread owns which elements;
// the sums for the parameters' gradients stay with the element's thread until the block's last row: in registers or, with
// VECTORS = 0, in the block's row of partials. dbias is summed with VECTORS = 0 alone.
//
// Phases, for each row: load x, z, dout; the two sums (with several warps a barrier publishes the warps' sums, in one of
// two buffers in turn, so that the next row needs no other barrier before it writes); dx and dz. At the end the warps of a
// block with warps = 1 add up their sums for dweight in order, through shared memory, with a barrier after each.
//
// Shared memory: 4 floats a warp, and a float for each element of the longest group that one warp owns. fp32: everything
// between loads and stores.

// Without a gate there are registers for twice as many.
#define HELD (kGate == NONE && VECTORS > 1 ? 2 * VECTORS : VECTORS)

#include "dependent_launch.cuh"
#include "math.cuh"
#include "reduce.cuh"
#include "rmsnorm_gated.cuh"
#include "rows.cuh"

using namespace oxi;

constexpr int kMaxWarps = 16;

// Two vectors and a gate fit into 96 registers on sm_90, which leaves room for two blocks of up to ten warps.
#define BOUNDS_NONE __launch_bounds__(kMaxWarps *kWarp, 1)
#if __CUDA_ARCH__ == 900 && VECTORS == 2
#define BOUNDS_AFTER __maxnreg__(96)
#else
#define BOUNDS_AFTER BOUNDS_NONE
#endif
#define BOUNDS_BEFORE BOUNDS_AFTER
#define BOUNDS_OF(gate) BOUNDS_##gate
#define BOUNDS(gate) BOUNDS_OF(gate)

extern "C" __global__ void BOUNDS(GATE) KERNEL(const __grid_constant__ OxiNormBackward p) {
  __shared__ float warp_sums[2][kMaxWarps * 2];
  __shared__ float totals[kHeld * kWidth * kWarp];

  const int threads = p.warps * kWarp;
  const int thread = threadIdx.x % threads;
  const int slot = threadIdx.x / threads;
  const int slots = blockDim.x / threads;
  const int ngroups = p.dim / p.group_size;
  const int block = blockIdx.x / ngroups;
  const int begin = static_cast<int>(blockIdx.x % ngroups) * p.group_size;
  const bool biased = p.bias.data != nullptr;

  // This block's part of the gradient of weight, then of bias.
  const auto partials_of_block = [&] {
    return p.partials + static_cast<long long>(block) * (biased ? 2 : 1) * p.dim + begin;
  };
  float dweight[kHeld][kWidth];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dweight[i][j] = 0.0f;
  }

  wait_for_earlier_work();
  int turn = 0;
  for (long long row = static_cast<long long>(block) * slots + slot; row < p.rows.count;
       row += static_cast<long long>(p.blocks) * slots) {
    long long offsets[5];
    row_offsets<5>(p.rows, {&p.x, &p.z, &p.dout, &p.dx, &p.dz}, row, offsets);
    const Line x_line(p.x, offsets[0], begin), z_line(p.z, offsets[1], begin), dout_line(p.dout, offsets[2], begin);
    const Line dx_line(p.dx, offsets[3], begin), dz_line(p.dz, offsets[4], begin);

    Vector x[kHeld], z[kHeld], dout[kHeld];
    const auto load = [&](int i, int first) {
      x[i] = x_line.load(first, p.group_size, p.dense);
      if constexpr (kGated) z[i] = z_line.load(first, p.group_size, p.dense);
      dout[i] = dout_line.load(first, p.group_size, p.dense);
    };

    if constexpr (kInRegisters) each_vector(thread, threads, p.group_size, load);
    float sums[2] = {0.0f, 0.0f};  // of v^2 and of dy weight v
    each_vector(thread, threads, p.group_size, [&](int i, int first) {
      if constexpr (!kInRegisters) load(i, first);
      float weight[kWidth];
      load_parameter(p.weight, begin, first, p.group_size, p.dense, weight);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float gate = kGated ? silu(z[i][j]) : 1.0f;
        const float v = kGate == BEFORE ? x[i][j] * gate : x[i][j];
        const float dy = kGate == AFTER ? dout[i][j] * gate : dout[i][j];
        sums[0] = fmaf(v, v, sums[0]);
        sums[1] = fmaf(dy * weight[j], v, sums[1]);
      }
    });
    block_sum(sums, p.warps, warp_sums[turn]);
    turn ^= 1;
    const float rstd = rsqrtf(sums[0] / p.group_size + p.eps);
    const float mean = rstd * sums[1] / p.group_size;

    each_vector(thread, threads, p.group_size, [&](int i, int first) {
      if constexpr (kInRegisters) {
        x[i].forget();
        if constexpr (kGated) z[i].forget();
        dout[i].forget();
      } else {
        load(i, first);
      }
      float weight[kWidth], bias[kWidth];
      load_parameter(p.weight, begin, first, p.group_size, p.dense, weight);
      if (!kInRegisters && biased) load_parameter(p.bias, begin, first, p.group_size, p.dense, bias);
      float dx[kWidth], dz[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float sig = kGated ? sigmoid(z[i][j]) : 1.0f;
        const float gate = kGated ? z[i][j] * sig : 1.0f;
        const float n = (kGate == BEFORE ? x[i][j] * gate : x[i][j]) * rstd;
        const float dy = kGate == AFTER ? dout[i][j] * gate : dout[i][j];
        const float dv = rstd * fmaf(dy, weight[j], -n * mean);
        dx[j] = kGate == BEFORE ? dv * gate : dv;
        if constexpr (kGated) {
          // silu'(z) = sigmoid(z) + silu(z) (1 - sigmoid(z))
          const float gate_grad = fmaf(gate, 1.0f - sig, sig);
          const float y = !kInRegisters && biased ? fmaf(n, weight[j], bias[j]) : n * weight[j];
          dz[j] = (kGate == BEFORE ? dv * x[i][j] : dout[i][j] * y) * gate_grad;
        }
        if constexpr (kInRegisters) {
          dweight[i][j] = fmaf(dy, n, dweight[i][j]);
        } else if (first + j < p.group_size) {
          // Nobody else touches the block's row of partials.
          float *total = partials_of_block() + first + j;
          const bool first_row = row < p.blocks;
          total[0] = fmaf(dy, n, first_row ? 0.0f : total[0]);
          if (biased) total[p.dim] = dy + (first_row ? 0.0f : total[p.dim]);
        }
      }
      dx_line.store(first, p.group_size, p.dense, Vector::of(dx));
      if constexpr (kGated) dz_line.store(first, p.group_size, p.dense, Vector::of(dz));
    });
  }

  if constexpr (kInRegisters) {
    for (int next = 0; next < slots; ++next) {
      if (slot == next) {
        each_vector(thread, threads, p.group_size, [&](int i, int first) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const int element = first + j;
            const float total = dweight[i][j] + (next > 0 ? totals[element] : 0.0f);
            if (next < slots - 1) {
              totals[element] = total;
            } else if (element < p.group_size) {
              partials_of_block()[element] = total;
            }
          }
        });
      }
      __syncthreads();
    }
  }
}
