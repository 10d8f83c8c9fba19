// Sums over threads, in an order that depends on nothing but their number.
#pragma once

namespace oxi {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums of `values` over `width` lanes (a power of two up to 32), in every lane.
template <int N>
__device__ inline void warp_sum(float (&values)[N], int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], step);
  }
}

// Sums over all threads of a block of `warps` warps. `buffer`: N floats a warp of shared memory, which nobody reads or
// writes between the barrier inside and the next barrier of the block.
template <int N>
__device__ inline void block_sum(float (&values)[N], int warps, float *buffer) {
  warp_sum(values);
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) buffer[warp * N + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.0f;
  for (int other = 0; other < warps; ++other) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += buffer[other * N + i];
  }
}

// The sum of a column of `partials` (rows, columns): lane c of the block's first warp has that of column first + c, which
// may lie past the last one. Warp r sums rows r, r + warps, ... of 32 columns; the barrier publishes those sums, and the
// first warp adds them up. To be called by blocks of at most 32 warps.
__device__ inline float column_sum(const float *partials, int rows, long long columns, long long first) {
  __shared__ float sums[kWarp][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  float sum = 0.0f;
  if (first + lane < columns) {
    // Rows whose loads are under way together.
    constexpr int kAtOnce = 8;
    for (int row = warp; row < rows; row += kAtOnce * warps) {
      float own[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int other = row + i * warps;
        own[i] = other < rows ? partials[other * columns + first + lane] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += own[i];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
#pragma unroll 8
    for (int other = 1; other < warps; ++other) sum += sums[other][lane];
  }
  return sum;
}

}  // namespace oxi
