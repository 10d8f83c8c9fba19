// Sums over threads, in an order that depends on nothing but their number.
#pragma once

namespace oxi {

constexpr int kWarp = 32;

// Sums of `values` over `width` lanes (a power of two up to 32), in every lane.
template <int N>
__device__ inline void warp_sum(float (&values)[N], int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
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

// The sum of a column of `partials` (rows, columns): in a block of 32 x 32 threads, lane 0 of warp w has that of column
// first + w, which may lie past the last one. Thread (c, r) sums rows r, r + 32, ... of its column; the barrier publishes
// those sums, a row of 33 of them so that a column lies in 32 banks; then warp r adds up column r by shuffles.
__device__ inline float column_sum(const float *partials, int rows, long long columns, long long first) {
  __shared__ float sums[kWarp][kWarp + 1];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  float sum = 0.0f;
  if (first + lane < columns) {
#pragma unroll 4
    for (int row = warp; row < rows; row += kWarp) sum += partials[row * columns + first + lane];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  float total[1] = {sums[lane][warp]};
  warp_sum(total);
  return total[0];
}

}  // namespace oxi
