// Where runs begin in the sequences of the chunk scan's backward, whose other kernels find tiles by it (ssd_bwd.cuh).
//
// A run begins with a sequence's first token, with one whose seq_idx differs from the token's before, and at each value of
// cu_seqlens within the sequence; other values of it are passed over.
//
// Grid: a block has a sequence. In windows of 64 tokens, a word of marks each, a warp a window: a lane has two tokens.
//
// Phases, a barrier after each: marks from seq_idx; bits of cu_seqlens; run starts, the latest marks so far, by a scan over
// windows, a thread a window.
//
// Shared memory: an integer a warp.

#include "dependent_launch.cuh"
#include "documents.cuh"
#include "params.h"
#include "reduce.cuh"

namespace oxi {

constexpr int kWindow = OXI_SSD_TILE;
constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarp;
// Windows of a warp whose loads are under way together.
constexpr int kAtOnce = 4;

// Marks of the sequence's first token and of changes of seq_idx.
__device__ __forceinline__ void mark_changes(const OxiSsdBackward &p, long long b, unsigned long long *marks) {
  const OxiSsd &ssd = p.ssd;
  const int *ids = ssd.seq_idx + b * ssd.seq_idx_stride[0];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int first = warp; first < p.windows; first += kAtOnce * kWarps) {
    int own[kAtOnce][2] = {}, before[kAtOnce][2] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // In 64 bits, since it may lie many windows past the last token.
        const long long t = (first + i * kWarps + 0ll) * kWindow + half * kWarp + lane;
        if (ssd.seq_idx == nullptr || t == 0 || t >= ssd.seqlen) continue;
        own[i][half] = ids[t * ssd.seq_idx_stride[1]];
        before[i][half] = ids[(t - 1) * ssd.seq_idx_stride[1]];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int window = first + i * kWarps;
      unsigned long long bits = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned differ = __ballot_sync(kAllLanes, own[i][half] != before[i][half]);
        bits |= static_cast<unsigned long long>(differ) << (half * kWarp);
      }
      if (lane == 0 && window < p.windows) marks[window] = bits | (window == 0);
    }
  }
}

__device__ __forceinline__ void mark_documents(const OxiSsd &p, unsigned long long *marks) {
  if (p.cu_seqlens == nullptr) return;
  for (int document = threadIdx.x; document <= p.ndocs; document += kThreads) {
    const long long bound = document_bound(p, document);
    if (bound > 0 && bound < p.seqlen) atomicOr(marks + bound / kWindow, 1ull << bound % kWindow);
  }
}

__device__ __forceinline__ void find_run_starts(int windows, const unsigned long long *marks, int *run_starts) {
  __shared__ int latest[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // The last mark so far of all windows before those of this round, of which there are kThreads.
  int before = 0;
  for (int first = 0; first < windows; first += kThreads) {
    const int window = first + threadIdx.x;
    const unsigned long long bits = window < windows ? marks[window] : 0;
    // The last mark up to this window's end, as far as the warp knows of one.
    int last = bits == 0 ? 0 : window * kWindow + kWindow - 1 - __clzll(static_cast<long long>(bits));
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, last, step);
      if (lane >= step) last = max(last, other);
    }
    if (lane == kWarp - 1) latest[warp] = last;
    __syncthreads();
    const int of_warp = latest[lane];
    int start = __shfl_up_sync(kAllLanes, last, 1);
    if (lane == 0) start = 0;
    start = max(max(start, before), __reduce_max_sync(kAllLanes, lane < warp ? of_warp : 0));
    if (window < windows) run_starts[window] = bits & 1 ? window * kWindow : start;
    before = max(before, __reduce_max_sync(kAllLanes, of_warp));
    // The next round's are written to the same place.
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) KERNEL(const __grid_constant__ OxiSsdBackward p) {
  const long long b = blockIdx.x;
  unsigned long long *marks = p.marks + b * p.windows;
  wait_for_earlier_work();
  mark_changes(p, b, marks);
  __syncthreads();
  mark_documents(p.ssd, marks);
  __syncthreads();
  find_run_starts(p.windows, marks, p.run_starts + b * p.windows);
}

}  // namespace oxi
