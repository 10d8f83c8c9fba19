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
// Phases, for each row: ask for the next row's x, z, dout, to be copied into shared memory; wait for this row's, of which
// a thread reads its own alone; the two sums (with several warps a barrier publishes the warps' sums, in one of two
// buffers in turn, so that the next row needs no other barrier before it writes); dx and dz. With VECTORS = 0 nothing is
// asked for ahead. At the end the warps of a block with warps = 1 add up their sums for dweight in order, through shared
// memory, with a barrier before each.
//
// Shared memory: 4 floats a warp; for each thread, of two rows, the vectors it owns of x, z and dout, 16 bytes each; the
// group's weight in fp32. That is 16 KB for 1024 elements of bf16 with z, 36 KB for four such groups without, and at most
// 192 KB. fp32: everything between loads and stores.

// Without a gate a thread has registers for the sums of twice as many.
#define HELD (kGate == NONE && VECTORS > 1 ? 2 * VECTORS : VECTORS)

#include "async_copy.cuh"
#include "dependent_launch.cuh"
#include "math.cuh"
#include "reduce.cuh"
#include "rmsnorm_gated.cuh"
#include "rows.cuh"

using namespace oxi;

constexpr int kMaxWarps = 16;

enum Tensor { X, DOUT, Z };
constexpr int kTensors = kGated ? 3 : 2;
constexpr int kQuads = kWidth / 4;

// 128 leave room for one block of sixteen warps; 96, where they suffice, for two of ten.
constexpr int kRegisters = kGated && VECTORS == 2 ? 96 : 128;

extern "C" __global__ void __maxnreg__(kRegisters) KERNEL(const __grid_constant__ OxiNormBackward p) {
  __shared__ float warp_sums[2][kMaxWarps * 2];

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

  extern __shared__ uint4 shared[];
  // The group's weight in fp32, as (vector, quad, thread of the group); in the end sums for its gradient.
  const auto quad = [&](int i, int q) -> float4 & {
    return reinterpret_cast<float4 &>(shared[(i * kQuads + q) * threads + thread]);
  };
  // Vectors of two rows, the one at work and the next, as (row, tensor, vector, thread).
  const auto place = [&](int turn, int tensor, int i) -> Vector & {
    const int index = (turn * kTensors + tensor) * kHeld + i;
    return reinterpret_cast<Vector &>(shared[kHeld * kQuads * threads + index * blockDim.x + threadIdx.x]);
  };
  const auto fetch = [&](long long row, int turn) {
    if (row < p.rows.count) {
      long long offsets[3];
      row_offsets<3>(p.rows, {&p.x, &p.dout, &p.z}, row, offsets);
      const Line lines[3] = {{p.x, offsets[X], begin}, {p.dout, offsets[DOUT], begin}, {p.z, offsets[Z], begin}};
      each_vector(thread, threads, p.group_size, [&](int i, int first) {
#pragma unroll
        for (int tensor = 0; tensor < kTensors; ++tensor) {
          copy_async<16>(&place(turn, tensor, i), lines[tensor].data + first, first < p.group_size);
        }
      });
    }
    end_of_batch();
  };

  wait_for_earlier_work();
  const long long first_row = static_cast<long long>(block) * slots + slot;
  const long long step = static_cast<long long>(p.blocks) * slots;
  int turn = 0;
  if constexpr (kOnChip) {
    fetch(first_row, turn);
    if (slot == 0) {
      each_vector(thread, threads, p.group_size, [&](int i, int first) {
        alignas(float4) float weight[kWidth];
        load_parameter(p.weight, begin, first, p.group_size, p.dense, weight);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) quad(i, q) = reinterpret_cast<const float4 *>(weight)[q];
      });
    }
    __syncthreads();
  }
  const auto load_weight = [&](int i, int first, float(&weight)[kWidth]) {
    if constexpr (kOnChip) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) reinterpret_cast<float4 *>(weight)[q] = quad(i, q);
    } else {
      load_parameter(p.weight, begin, first, p.group_size, p.dense, weight);
    }
  };
  for (long long row = first_row; row < p.rows.count; row += step) {
    long long offsets[5];
    row_offsets<5>(p.rows, {&p.x, &p.dout, &p.z, &p.dx, &p.dz}, row, offsets);
    const Line lines[3] = {{p.x, offsets[X], begin}, {p.dout, offsets[DOUT], begin}, {p.z, offsets[Z], begin}};
    const Line dx_line(p.dx, offsets[3], begin), dz_line(p.dz, offsets[4], begin);
    if constexpr (kOnChip) {
      fetch(row + step, turn ^ 1);
      wait_for_batches<1>();
    }
    const auto load = [&](int tensor, int i, int first) {
      // Without a word to the compiler, it would read all vectors at once, and keep them over the sum, in registers.
      if (kOnChip && tensor == X) __syncwarp();
      return kOnChip ? place(turn, tensor, i) : lines[tensor].load(first, p.group_size, p.dense);
    };

    float sums[2] = {0.0f, 0.0f};  // of v^2 and of dy weight v
    each_vector(thread, threads, p.group_size, [&](int i, int first) {
      const Vector x = load(X, i, first), dout = load(DOUT, i, first), z = kGated ? load(Z, i, first) : x;
      alignas(float4) float weight[kWidth];
      load_weight(i, first, weight);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float gate = kGated ? silu(z[j]) : 1.0f;
        const float v = kGate == BEFORE ? x[j] * gate : x[j];
        const float dy = kGate == AFTER ? dout[j] * gate : dout[j];
        sums[0] = fmaf(v, v, sums[0]);
        sums[1] = fmaf(dy * weight[j], v, sums[1]);
      }
    });
    block_sum(sums, p.warps, warp_sums[turn]);
    const float rstd = rsqrtf(sums[0] / p.group_size + p.eps);
    const float mean = rstd * sums[1] / p.group_size;

    each_vector(thread, threads, p.group_size, [&](int i, int first) {
      const Vector x = load(X, i, first), dout = load(DOUT, i, first), z = kGated ? load(Z, i, first) : x;
      alignas(float4) float weight[kWidth];
      float bias[kWidth];
      load_weight(i, first, weight);
      if (!kOnChip && biased) load_parameter(p.bias, begin, first, p.group_size, p.dense, bias);
      float dx[kWidth], dz[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float sig = kGated ? sigmoid(z[j]) : 1.0f;
        const float gate = kGated ? z[j] * sig : 1.0f;
        const float n = (kGate == BEFORE ? x[j] * gate : x[j]) * rstd;
        const float dy = kGate == AFTER ? dout[j] * gate : dout[j];
        const float dv = rstd * fmaf(dy, weight[j], -n * mean);
        dx[j] = kGate == BEFORE ? dv * gate : dv;
        if constexpr (kGated) {
          // silu'(z) = sigmoid(z) + silu(z) (1 - sigmoid(z))
          const float gate_grad = fmaf(gate, 1.0f - sig, sig);
          const float y = !kOnChip && biased ? fmaf(n, weight[j], bias[j]) : n * weight[j];
          dz[j] = (kGate == BEFORE ? dv * x[j] : dout[j] * y) * gate_grad;
        }
        if constexpr (kOnChip) {
          dweight[i][j] = fmaf(dy, n, dweight[i][j]);
        } else if (first + j < p.group_size) {
          // Nobody else touches the block's row of partials.
          float *total = partials_of_block() + first + j;
          const bool is_first = row < p.blocks;
          total[0] = fmaf(dy, n, is_first ? 0.0f : total[0]);
          if (biased) total[p.dim] = dy + (is_first ? 0.0f : total[p.dim]);
        }
      }
      dx_line.store(first, p.group_size, p.dense, Vector::of(dx));
      if constexpr (kGated) dz_line.store(first, p.group_size, p.dense, Vector::of(dz));
    });
    turn ^= 1;
  }

  if constexpr (kOnChip) {
    for (int next = 0; next < slots; ++next) {
      __syncthreads();
      if (slot != next) continue;
      each_vector(thread, threads, p.group_size, [&](int i, int first) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          float *own = dweight[i] + q * 4;
          if (next > 0) {
            const float4 before = quad(i, q);
            own[0] += before.x, own[1] += before.y, own[2] += before.z, own[3] += before.w;
          }
          const float4 total = make_float4(own[0], own[1], own[2], own[3]);
          if (next < slots - 1) {
            quad(i, q) = total;
          } else if (first < p.group_size) {
            reinterpret_cast<float4 *>(partials_of_block() + first)[q] = total;
          }
        }
      });
    }
  }
}
