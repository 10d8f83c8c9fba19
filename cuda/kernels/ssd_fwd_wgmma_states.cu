// What the parts of a long sequence's segments add to the state, on Hopper's warpgroup products: the first launch of the chunk
// scan (ssd_fwd_wgmma.cu) where a sequence is walked in segments.
//
// Per head and part, in tiles of up to 64 tokens of one run, from zeros on, exponents to base 2, l = cumsum(dt A) within the
// tile:
//
//   H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B
//
// and the decay over the part, 0 if a run begins in it.
//
// Grid: a block has a part of a segment, for one head, or for a slice of it (kHeaddim rows of the state).
// Warpgroups, barriers and the ring: ssd_wgmma.cuh. Two blocks share a multiprocessor, since in one alone little is under way at
// a time; with a dstate of 256, where a block has two warpgroups with states, one has it.
//
// Shared memory: a ring of four times X and B in slabs of 64 columns (wgmma.cuh), 66 to 162 KB.
//
// fp32: dt, l and the powers, H, all sums. Rounded to Element: dt X as an operand; its factor to 16 bits in
// bf16 (scale_factors).

#include "ssd_wgmma.cuh"

namespace oxi {

constexpr int kThreads = (kStateGroups + 1) * kWarpgroup;
constexpr int kBlocks = kDstate == 256 ? 1 : 2;

using TileRing = Ring<4, 4, false>;
static_assert(kBlocks == 1 || sizeof(TileRing) <= OXI_SSD_STATES_SHARED_BYTES);

__device__ __forceinline__ void walk_states(const OxiSsd &p, const Walk &walk, TileRing &ring) {
  State state;
  state.clear();
  float decay = 1.0f;
  for (StateWalk tiles(ring); tiles.tile.size > 0; tiles.advance(state)) {
    if (tiles.tile.starts) {
      state.load_initial(p, walk, entry_row(p, walk.b, tiles.tile.begin));
      decay = 0.0f;
    }
    decay *= tiles.step.over_tile;
    state.begin_step(tiles.step, tiles.stage());
  }
  const long long added = walk.of_part(p, walk.segment);
  state.store_segment(p, added * p.slices + walk.slice);
  if (walk.slice == 0 && threadIdx.x == 0) p.segment_decays[added] = decay;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    KERNEL(const __grid_constant__ OxiSsdMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  TileRing &ring = *reinterpret_cast<TileRing *>(shared);
  const OxiSsd &p = mapped.ssd;
  const Walk walk(p);
  if (threadIdx.x == 0) {
    ring.init();
    publish_to_products();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(mapped.x);
    prefetch_map(mapped.B);
  }
  wait_for_earlier_work();
  __syncthreads();
  // The same for a warp, which the compiler has to know of products.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp / 4 < kStateGroups) {
    walk_states(p, walk, ring);
  } else {
    load_tiles(mapped, walk, ring, warp % 4, 1);
  }
}

}  // namespace oxi
