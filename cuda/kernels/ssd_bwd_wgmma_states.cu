// The chunk scan, backward, on Hopper's warpgroup products: the walks along a sequence that leave what tiles need of states, or
// with states_only what the segments of a long sequence add. Then come the tiles (ssd_bwd_wgmma.cu).
//
// Per head, in tiles of up to 64 tokens of one run, exponents to base 2, l = cumsum(dt A) within the tile:
//
//   forward, from the initial state on:            H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B
//   in reverse, from the final state's gradient:   G' = 2^l[end] G + dY^T diag(2^l) C
//
// Before a step H, or G, is rounded and goes to a slot, if not to a boundary that an odd tile begins at, counted from where a
// run or segment begins; dinitial_states is the G that comes before a run. Where the forward has kept H, all walks are in
// reverse.
//
// Grid: a block has one direction over a segment of a sequence, for one head, or for a slice of it (kHeaddim rows of the
// state), and for all or half of the state's columns, kDstate of them. Two blocks share a multiprocessor, so that one's copies
// and products are under way while the other one waits. Warpgroups and the ring: ssd_wgmma.cuh, but that in reverse the ring
// has dY, C and 2^l in place of X, B and dt 2^(l[end] - l).
//
// A state goes out by a bulk copy from one of two buffers. The thread that asks for it waits until the one before the last was
// read; a barrier of the warpgroup then lets the state in, another one before the copy publishes it.
//
// Shared memory: Storage below, 77 to 107 KB: a ring of X and B in slabs of 64 columns (wgmma.cuh), the buffers.
//
// fp32: dt, l and the powers, H, G, all sums. Rounded to Element: the states in slots, dt X and 2^l dY as operands, their
// factors to 16 bits in bf16 (scale_factors).

#include "ssd_bwd.cuh"
#include "ssd_wgmma.cuh"

namespace oxi {

static_assert(kStateGroups == 1);
constexpr int kThreads = 2 * kWarpgroup;
constexpr int kBlocks = 2;
// Registers of a thread at first, and later.
constexpr int kRegisters = 65536 / kBlocks / kThreads / 8 * 8;
constexpr int kLoadRegisters = 88;
constexpr int kStateRegisters = 2 * kRegisters - kLoadRegisters;
constexpr int kStages = kDstate == 64 ? 4 : 3;
constexpr int kBuffers = 2;
// Of a block's columns of a state, as they lie in a slot.
constexpr int kPartBytes = kSlabsOfB * kStateSlabBytes;

using TileRing = Ring<kStages, kStages, false>;

struct Storage {
  TileRing ring;
  alignas(1024) unsigned char state[kBuffers][kPartBytes];
};
static_assert(sizeof(Storage) <= OXI_SSD_STATES_SHARED_BYTES);

// The tiles of a walk, one after another in its direction; after the last one a size of 0.
struct TilesOfWalk : Span {
  __device__ __forceinline__ TilesOfWalk(const Cuts &cuts, const StateWalkOf &walk) : Span{}, cuts(cuts), walk(walk) {
    begin = walk.reverse ? walk.end : walk.begin;
  }

  // Whether no run begins within the sequence, so that one can go to any tile.
  __device__ __forceinline__ bool is_plain() const { return cuts.marks == nullptr; }

  // To the i-th tile of a plain walk; how many there are too few for that, 0 if it exists.
  __device__ __forceinline__ int go_to(int i) {
    const int count = (walk.end - walk.begin + kTile - 1) / kTile;
    begin = walk.begin + (walk.reverse ? max(count - 1 - i, 0) : i) * kTile;
    size = i < count ? min(walk.end - begin, kTile) : 0;
    starts = begin == 0;
    ends = begin + size == cuts.seqlen;
    return max(i - count + 1, 0);
  }

  // On by so many; how many of them there are too few.
  __device__ __forceinline__ int next(int steps) {
    int missing = 0;
    for (int step = 0; step < steps; ++step) {
      next();
      missing += size == 0;
    }
    return missing;
  }

 private:
  const Cuts &cuts;
  const StateWalkOf &walk;

  __device__ __forceinline__ void next() {
    if (walk.reverse) {
      size = 0;
      if (begin > walk.begin) static_cast<Span &>(*this) = cuts.before(begin);
    } else {
      begin += size;
      size = 0;
      if (begin < walk.end) static_cast<Span &>(*this) = cuts.from(begin);
    }
  }
};

// By one warp: what dt and A make of a tile's tokens, of which a lane has two. It is left for the tiles too.
__device__ __forceinline__ void discretize(const OxiSsdBackward &params, const StateWalkOf &walk, const Discretize &head,
                                           const Either<Element> (&raw)[2], const Span &tile, int slot,
                                           Vectors<false> &vectors) {
  const OxiSsd &p = params.ssd;
  const bool reverse = walk.reverse;
  const int lane = threadIdx.x % kWarp;
  float dt[2], slope[2], l[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    dt[i] = head.dt(p, raw[i], slope[i]);
    if (2 * lane + i >= tile.size) dt[i] = 0.0f;
  }
  const float total = __shfl_sync(kAllLanes, sum_decays(head, dt, l), kWarp - 1);
  // By one of a head's walks.
  if (reverse != (params.finds_entry_states != 0) && !p.states_only && walk.slice == 0 && walk.column_part == 0) {
    const long long tokens = static_cast<long long>(params.batch) * p.nheads * p.seqlen;
    float *line = params.tokens + (walk.b * p.nheads + walk.head) * p.seqlen + tile.begin + 2 * lane;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * lane + i < tile.size) line[i] = dt[i], line[i + tokens] = l[i], line[i + 2 * tokens] = slope[i];
    }
  }
  vectors.leaving[by_column(2 * lane) / 2] =
      reverse ? scale_factors(fast_exp2(l[0]), fast_exp2(l[1]), Element())
              : scale_factors(dt[0] * fast_exp2(total - l[0]), dt[1] * fast_exp2(total - l[1]), Element());
  if (lane == kWarp - 1) vectors.over_tile = fast_exp2(l[1]);
  if (lane == 0) vectors.tile = tile, vectors.slot = slot;
}

// The slot of what the state is before a step over a tile, -1 for none.
__device__ __forceinline__ int slot_of(const OxiSsdBackward &p, const StateWalkOf &walk, const Cuts &cuts, const Span &tile) {
  if (p.ssd.states_only || tile.size == 0) return -1;
  if (walk.reverse) return cuts.has_odd_after(tile) ? -1 : exit_slot(p, tile);
  return cuts.is_odd(tile) ? -1 : entry_slot(p.ssd, walk.b, tile);
}

// By one warp of the loads: every kStages-th tile, and the first one of no tokens after the last, for the others to stop at.
__device__ __forceinline__ void load_walk(const OxiSsdBackwardMapped &mapped, const StateWalkOf &walk, TileRing &ring,
                                          int warp) {
  if (warp >= kStages) return;
  const OxiSsd &p = mapped.bwd.ssd;
  const int lane = threadIdx.x % kWarp, b = static_cast<int>(walk.b);
  const Discretize head(p, walk.head);
  const long long dt_line = walk.b * p.dt.stride[0] + walk.head * p.dt.stride[2];
  const Cuts cuts(mapped.bwd, walk.b);
  const OxiTensorMap &rows_map = walk.reverse ? mapped.dy : mapped.x;
  const OxiTensorMap &columns_map = walk.reverse ? mapped.C : mapped.B;
  TilesOfWalk tile(cuts, walk);
  auto &stage = ring.stages[warp];
  unsigned char *rows = ring.x[warp];
  unsigned parity = 0, landed_parity = 0;
  int missing = 0;
  for (int i = warp, steps = warp + 1;; i += kStages, steps = kStages) {
    missing = tile.is_plain() ? tile.go_to(i) : missing + tile.next(steps);
    if (missing > 1) break;
    // Under way until the copies are asked for. Past the tile's tokens it is of no use, but there.
    Either<Element> raw[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = min(tile.begin + 2 * lane + e, p.seqlen - 1);
      raw[e] = Either<Element>(p.dt.data, dt_line + t * p.dt.stride[1], p.wide_dt);
    }
    const int slot = slot_of(mapped.bwd, walk, cuts, tile);
    ring.empty[warp].wait(parity ^ 1);
    parity ^= 1;
    // Past a sequence's end copies give zeros, past a tile's end what is another's.
    const bool is_cut = missing == 0 && tile.size < kTile && tile.begin + tile.size < p.seqlen;
    Barrier &arrived = is_cut ? ring.landed[warp] : ring.full[warp];
    if (missing == 0 && lane == 0) {
      arrived.expect(kSlabBytes + sizeof(stage));
      copy_box(rows, rows_map, walk.first, walk.head, tile.begin, b, arrived);
#pragma unroll 1
      for (int slab = 0; slab < kSlabsOfB; ++slab) {
        const int column = walk.first_column + slab * kSlabColumns;
        copy_box(stage.B + slab * kSlabBytes, columns_map, column, walk.group, tile.begin, b, arrived);
      }
    }
    discretize(mapped.bwd, walk, head, raw, tile, slot, ring.vectors[warp]);
    if (is_cut) {
      __syncwarp();
      arrived.arrive();
      arrived.wait(landed_parity);
      landed_parity ^= 1;
      clear_rows(rows, stage, tile.size);
      publish_to_products();
    }
    ring.full[warp].arrive();
  }
}

// What a warpgroup with states does with them beside the steps.
class Walker {
 public:
  __device__ __forceinline__ Walker(const OxiSsdBackward &p, const StateWalkOf &walk, Storage &storage)
      : p(p),
        walk(walk),
        storage(storage),
        rows(min(kHeaddim, p.ssd.headdim - walk.first)) {}

  // What the segments that were walked before this one add, each decayed over those that follow.
  __device__ __forceinline__ void enter_segment(State &state) const {
    state.clear();
#pragma unroll 1
    for (int order = 0; order < walk.order; ++order) {
      const long long added = walk.added(p, order);
      state.pass_segment(p.ssd, in_segment(added), p.ssd.segment_decays[added]);
    }
  }
  // Where what a segment adds to a head's state has these rows and columns.
  __device__ __forceinline__ long long in_segment(long long added) const {
    return (added * p.ssd.slices + walk.slice) * p.column_parts + walk.column_part;
  }

  // What a run has before it, in the walk's direction.
  __device__ __forceinline__ void enter_run(State &state, const Span &tile) const {
    state.clear();
    if (!walk.reverse) {
      const long long row = entry_row(p.ssd, walk.b, tile.begin);
      if (row >= 0) add(state, p.ssd.initial_states, p.ssd.wide_initial_states ? OXI_F32 : kDtype<Element>, row);
      return;
    }
    const int end = tile.begin + tile.size;
    if (end == p.ssd.seqlen && p.ssd.final_states.data != nullptr) add(state, p.ssd.final_states, OXI_F32, walk.b);
    if (p.ssd.varlen_states.data == nullptr) return;
    const int document = document_to(p.ssd, end);
    if (document >= 0) add(state, p.ssd.varlen_states, p.ssd.varlen_dtype, final_row(p.ssd, walk.b, document));
  }

  // To shared memory with it, and on to a slot: apart, for a step's products to be under way between them.
  __device__ __forceinline__ void publish(const State &state) {
    if (is_first()) wait_for_bulk_reads<kBuffers - 1>();
    state.wait_for_warpgroup();
    state.publish(storage.state[buffer]);
  }
  __device__ __forceinline__ void store(const State &state, int slot) {
    publish_to_products();
    state.wait_for_warpgroup();
    if (is_first()) {
      unsigned char *to = in_slot(p, walk.reverse, walk.b, slot, walk.head, walk.slice, p.column_parts * kPartBytes);
      store_bytes(to + walk.column_part * kPartBytes, storage.state[buffer], kPartBytes);
    }
    buffer = (buffer + 1) % kBuffers;
  }

  // Stay until all that is to go out was read.
  __device__ __forceinline__ void finish() const {
    if (is_first()) wait_for_bulk_reads<0>();
  }

  // In reverse: the gradients of initial states of the run that begins with a tile, and of the documents without tokens that
  // end at a token.
  __device__ __forceinline__ void leave_run(State &state, const Span &tile) const {
    if (p.dinitial_states.data == nullptr) return;
    const long long row = entry_row(p.ssd, walk.b, tile.begin);
    if (row < 0) return;
    if (p.wide_dinitial_states) {
      store_row<float>(state, row);
    } else {
      store_row<Element>(state, row);
    }
  }
  __device__ __forceinline__ void pass_empty_documents(int end) const {
    if (p.dinitial_states.data == nullptr || p.ssd.cu_seqlens == nullptr) return;
    const OxiTensor4 &from = p.ssd.varlen_states, &to = p.dinitial_states;
    for_documents_ending_at(p.ssd, walk.b, end, [&](long long row, long long initial) {
      if (initial < 0) return;
#pragma unroll 1
      for (int i = threadIdx.x; i < rows * kDstate; i += kWarpgroup) {
        const int along_headdim = i / kDstate, n = i % kDstate;
        const auto offset = [&](const OxiTensor4 &states, long long row) {
          return walk.state_offset(states, row) + along_headdim * states.stride[2] + n * states.stride[3];
        };
        const float value = from.data == nullptr ? 0.0f : load_scalar(from.data, p.ssd.varlen_dtype, offset(from, row));
        store_scalar(to.data, p.wide_dinitial_states ? OXI_F32 : kDtype<Element>, offset(to, initial), value);
      }
    });
  }

 private:
  const OxiSsdBackward &p;
  const StateWalkOf &walk;
  Storage &storage;
  // How many there are of the state.
  int rows;
  int buffer = 0;

  __device__ __forceinline__ static bool is_first() { return threadIdx.x % kWarpgroup == 0; }

  __device__ __forceinline__ void add(State &state, const OxiTensor4 &states, int dtype, long long row) const {
    const long long first = walk.state_offset(states, row);
    state.each(states, rows,
               [&](float &value, long long offset) { value += load_scalar(states.data, dtype, first + offset); });
  }
  template <typename T>
  __device__ __forceinline__ void store_row(State &state, long long row) const {
    T *to = static_cast<T *>(p.dinitial_states.data) + walk.state_offset(p.dinitial_states, row);
    state.each(p.dinitial_states, rows, [&](float &value, long long offset) { to[offset] = from_float<T>(value); });
  }
};

__device__ __forceinline__ void walk_states(const OxiSsdBackward &p, const StateWalkOf &walk, Storage &storage) {
  State state;
  Walker walker(p, walk, storage);
  float decay = 1.0f;
  const bool stores = !p.ssd.states_only;
  if (stores) {
    walker.enter_segment(state);
  } else {
    state.clear();
  }
  for (StateWalk tiles(storage.ring); tiles.tile.size > 0;) {
    const Span tile = tiles.tile;
    if (walk.reverse ? tile.ends : tile.starts) {
      walker.enter_run(state, tile);
      if (walk.reverse && stores) walker.pass_empty_documents(tile.begin + tile.size);
    }
    if (tile.starts) decay = 0.0f;
    decay *= tiles.step.over_tile;
    const int slot = tiles.ring.vectors[tiles.at.stage].slot;
    if (slot >= 0) walker.publish(state);
    state.begin_step(tiles.step, tiles.stage());
    if (slot >= 0) walker.store(state, slot);
    tiles.advance(state);
    if (walk.reverse && tile.starts) {
      if (stores) {
        walker.leave_run(state, tile);
      } else {
        state.clear();
      }
    }
  }
  if (!stores) {
    const long long added = walk.added(p, walk.order);
    state.store_segment(p.ssd, walker.in_segment(added));
    if (walk.slice == 0 && walk.column_part == 0 && threadIdx.x == 0) p.ssd.segment_decays[added] = decay;
  } else if (walk.reverse && walk.begin == 0) {
    walker.pass_empty_documents(0);
  }
  walker.finish();
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    KERNEL(const __grid_constant__ OxiSsdBackwardMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage &storage = *reinterpret_cast<Storage *>(shared);
  const StateWalkOf walk(mapped.bwd, kDstate);
  if (threadIdx.x == 0) {
    storage.ring.init();
    publish_to_products();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(walk.reverse ? mapped.dy : mapped.x);
    prefetch_map(walk.reverse ? mapped.C : mapped.B);
  }
  wait_for_earlier_work();
  __syncthreads();
  // The same for a warp, which the compiler has to know of products.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp < 4) {
    change_registers<kStateRegisters, kRegisters>();
    walk_states(mapped.bwd, walk, storage);
  } else {
    change_registers<kLoadRegisters, kRegisters>();
    load_walk(mapped, walk, storage.ring, warp % 4);
  }
}

}  // namespace oxi
