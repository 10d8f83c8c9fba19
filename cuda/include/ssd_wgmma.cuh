// What the chunk scan's kernels on Hopper's warpgroup products share: how tiles come to shared memory, and the state.
//
// Warpgroups of a block: first those with states, kStateGroups, each with up to 128 columns of H (headdim, dstate) in
// accumulators; last the loads, four warps, each with every kStages-th tile and a stage of the ring: where tiles end, dt and
// l, bulk copies of x, B and, for outputs, C. After the last tile come empty ones, for the others to stop at. Outputs need x
// long after B and C, so that it has stages of its own.
//
// Barriers of the ring: full[stage]: the vectors and copies of a tile are there; where the run ends within the tile the
// copies come to landed[stage] first, and the loads clear the rows past that first. empty[stage]: those that work on the tile
// no longer need them, x aside if there are outputs: x_empty[x_stage].
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros, and
// the state at a run's start is assigned.
#pragma once

#include "barrier.cuh"
#include "ssd.cuh"
#include "wgmma.cuh"

namespace oxi {

constexpr int kTile = OXI_SSD_TILE;
// A block's part of it.
constexpr int kHeaddim = HEADDIM;
constexpr int kDstate = DSTATE;

constexpr int kWarpgroup = 128;
// Rows of a warpgroup's products.
constexpr int kRows = 64;
// Of dstate, what a warpgroup has of the state.
constexpr int kColumns = kDstate < 128 ? kDstate : 128;
constexpr int kStateGroups = kDstate / kColumns;

constexpr int kSlabBytes = kTile * kSlabRowBytes;
constexpr int kSlabsOfB = kDstate / kSlabColumns;
// Of the state as (headdim, dstate).
constexpr int kStateSlabBytes = kHeaddim * kSlabRowBytes;

// A tile's B; for outputs also C.
template <bool kOutputs>
struct Stage {
  unsigned char B[kSlabsOfB * kSlabBytes];
};
template <>
struct Stage<true> : Stage<false> {
  unsigned char C[kSlabsOfB * kSlabBytes];
};

// The threads of a block's warpgroup of this index.
__device__ __forceinline__ void synchronize_warpgroup(int index) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + index), "n"(kWarpgroup) : "memory");
}

// Where a token's value is in a vector of a tile, so that what a thread needs in one step of 16 tokens moves in one access:
// the values of an operand's columns 2 (lane % 4) + {0, 1} and those 8 on; of rows lane / 4 and those 8 on.
__device__ __forceinline__ int by_column(int t) { return t / 16 * 16 + t % 8 / 2 * 4 + t / 8 % 2 * 2 + t % 2; }
__device__ __forceinline__ int by_row(int t) { return t / 16 * 16 + t % 8 * 2 + t / 8 % 2; }

// What dt and A make of a tile, and which one it is; of no tokens after the last one.
template <bool kOutputs>
struct Vectors {
  Span tile;
  // The decay over the tile.
  float over_tile;
  // Of a walk that leaves states in slots: the one of the state before the tile, in the walk's direction, -1 for none.
  int slot;
  // By columns: what remains at the tile's end of what a token adds, factors for pairs of x.
  alignas(16) uint2 leaving[kTile / 2];
};
template <>
struct Vectors<true> : Vectors<false> {
  // By columns: log2 of the decay from the tile's start; dt.
  float l[kTile];
  float dt[kTile];
  // Of a warp's 16 rows of M, left of its diagonal's 16 columns, the power of a row and a column is of two factors, neither
  // above 1: the decay from the row before the warp's first one, and what remains there of what a column's token adds. By
  // columns those of warp 1, 2 and 3.
  float columns[(1 + 2 + 3) * 16];
  // By rows: the former factor; the decay from the tile's start, and its log2.
  float rows[kTile];
  float entering[kTile];
  float l_of_row[kTile];
  // Whether the tile is an odd one.
  bool odd;
};

template <int kCount, int kCountOfX, bool kWithOutputs>
struct __align__(1024) Ring {
  static constexpr int kStages = kCount;
  // At least as many.
  static constexpr int kStagesOfX = kCountOfX;
  static constexpr bool kOutputs = kWithOutputs;

  Stage<kOutputs> stages[kStages];
  unsigned char x[kStagesOfX][kSlabBytes];
  Vectors<kOutputs> vectors[kStages];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier landed[kStages];
  Barrier x_empty[kStagesOfX];

  // By one thread.
  __device__ __forceinline__ void init() {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(kWarp);
      landed[stage].init(kWarp);
      // The warpgroups that work on a tile.
      empty[stage].init((kStateGroups + kOutputs) * kWarpgroup);
    }
    for (Barrier &barrier : x_empty) barrier.init(kWarpgroup);
  }
};

// By one warp: what dt and A make of the tile's tokens, of which a lane has two.
template <bool kOutputs>
__device__ __forceinline__ void discretize(const OxiSsd &p, const Discretize &head, const Either<Element> (&raw)[2],
                                           const Tiles &tile, Vectors<kOutputs> &vectors) {
  const int lane = threadIdx.x % kWarp;
  float dt[2], l[2];
  const auto value = [&](int i) -> float { return raw[i]; };
  const float total = __shfl_sync(kAllLanes, sum_decays(p, head, tile.size, value, dt, l), kWarp - 1);
  const int column = by_column(2 * lane);
  const auto store = [&](float *vector, float first, float second) {
    *reinterpret_cast<float2 *>(vector + column) = make_float2(first, second);
  };
  vectors.leaving[column / 2] =
      scale_factors(dt[0] * fast_exp2(total - l[0]), dt[1] * fast_exp2(total - l[1]), Element());
  if (lane == kWarp - 1) vectors.over_tile = fast_exp2(l[1]);
  if (lane == 0) vectors.tile = tile;
  if constexpr (kOutputs) {
    if (lane == 0) vectors.odd = tile.odd;
    store(vectors.l, l[0], l[1]);
    store(vectors.dt, dt[0], dt[1]);
    // l of the token before each warp's first one.
    float own_border = 0.0f;
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) {
      const float border = __shfl_sync(kAllLanes, l[1], 8 * warp - 1);
      if (2 * lane < 16 * warp) {
        store(vectors.columns + warp * (warp - 1) / 2 * 16, dt[0] * fast_exp2(border - l[0]),
              dt[1] * fast_exp2(border - l[1]));
      } else {
        own_border = border;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = by_row(2 * lane + i);
      vectors.rows[row] = fast_exp2(l[i] - own_border);
      vectors.entering[row] = fast_exp2(l[i]);
      vectors.l_of_row[row] = l[i];
    }
  }
}

// By one thread: a tile's x, B and C. `arrived` will have their bytes.
template <bool kOutputs>
__device__ __forceinline__ void copy_tile(const OxiSsdMapped &p, const Walk &walk, int begin, unsigned char *x,
                                          Stage<kOutputs> &stage, Barrier &arrived) {
  const int b = static_cast<int>(walk.b);
  arrived.expect(kSlabBytes + sizeof(stage));
  copy_box(x, p.x, walk.first, walk.head, begin, b, arrived);
#pragma unroll 1
  for (int slab = 0; slab < kSlabsOfB; ++slab) {
    const int column = slab * kSlabColumns;
    copy_box(stage.B + slab * kSlabBytes, p.B, column, walk.group, begin, b, arrived);
    if constexpr (kOutputs) copy_box(stage.C + slab * kSlabBytes, p.C, column, walk.group, begin, b, arrived);
  }
}

// By one warp: zeros for a tile's x and B from row `size` on.
__device__ __forceinline__ void clear_rows(unsigned char *x, Stage<false> &stage, int size) {
  for (int slab = 0; slab < 1 + kSlabsOfB; ++slab) {
    unsigned char *rows = slab == 0 ? x : stage.B + (slab - 1) * kSlabBytes;
    for (int at = size * kSlabRowBytes + threadIdx.x % kWarp * 16; at < kSlabBytes; at += kWarp * 16) {
      *reinterpret_cast<uint4 *>(rows + at) = make_uint4(0, 0, 0, 0);
    }
  }
}

// By one warp of the loads; `last`: how many empty tiles come after the last one.
template <typename TileRing>
__device__ __forceinline__ void load_tiles(const OxiSsdMapped &mapped, const Walk &walk, TileRing &ring, int warp, int last) {
  if (warp >= TileRing::kStages) return;
  const OxiSsd &p = mapped.ssd;
  const int lane = threadIdx.x % kWarp;
  const Discretize head(p, walk.head);
  const long long dt = walk.b * p.dt.stride[0] + walk.head * p.dt.stride[2];
  Tiles tile(p, walk);
  auto &stage = ring.stages[warp];
  Barrier &full = ring.full[warp];
  unsigned parity = 0, landed_parity = 0;
  RingPosition<TileRing::kStagesOfX> of_x;
  of_x.advance(warp);
  // How many tiles too few there are for the latest one to exist.
  int missing = 0;
  for (int i = warp, steps = warp + 1;; i += TileRing::kStages, steps = TileRing::kStages) {
    if (tile.is_plain()) {
      missing = tile.go_to(i);
    } else {
      for (int step = 0; step < steps; ++step) missing += !tile.next();
    }
    if (missing > last) break;
    // Under way until the copies are asked for. Past the tile's tokens it is of no use, but there.
    Either<Element> raw[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = min(tile.begin + 2 * lane + e, p.seqlen - 1);
      raw[e] = Either<Element>(p.dt.data, dt + t * p.dt.stride[1], p.wide_dt);
    }
    ring.empty[warp].wait(parity ^ 1);
    parity ^= 1;
    const bool is_tile = missing == 0;
    unsigned char *x = ring.x[of_x.stage];
    if (TileRing::kOutputs && is_tile) ring.x_empty[of_x.stage].wait(of_x.parity ^ 1);
    of_x.advance(TileRing::kStages);
    // Past a sequence's end copies give zeros, past a run's end what is not this run's.
    const bool is_cut = is_tile && tile.size < kTile && tile.begin + tile.size < p.seqlen;
    Barrier &arrived = is_cut ? ring.landed[warp] : full;
    if (is_tile && lane == 0) copy_tile(mapped, walk, tile.begin, x, stage, arrived);
    discretize(p, head, raw, tile, ring.vectors[warp]);
    if (is_cut) {
      __syncwarp();
      arrived.arrive();
      arrived.wait(landed_parity);
      landed_parity ^= 1;
      clear_rows(x, stage, tile.size);
      publish_to_products();
    }
    full.arrive();
  }
}

// What a tile adds to a state: an operand, X^T scaled by what remains at the tile's end of what each token adds; and how much
// the state before it decays.
struct Step {
  unsigned leaving[kTile / 16][4];
  float over_tile;

  __device__ __forceinline__ void load(const unsigned char *x, const Vectors<false> &vectors, unsigned thread = threadIdx.x) {
    const int lane = thread % kWarp, warp = thread / kWarp % 4;
    const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    over_tile = vectors.over_tile;
    uint4 factors[kTile / 16];
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      load_transposed(leaving[k], shared_address(x) + slab_offset(16 * k + row, chunk));
      factors[k] = *reinterpret_cast<const uint4 *>(vectors.leaving + 8 * k + 2 * (lane % 4));
    }
    // Has the compiler ask for more of it ahead.
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned &word = leaving[k][i];
        word = scale(word, i < 2 ? make_uint2(factors[k].x, factors[k].y) : make_uint2(factors[k].z, factors[k].w), Element());
      }
    }
  }

  // The next one, once the products with this one are done. They read registers until then, of which the compiler takes no
  // notice, or so much that it waits for each product: to have this one's used after them keeps the next one out of them.
  __device__ __forceinline__ void replace(const Step &next) {
    // 0, which it does not know.
    const unsigned none = blockIdx.y;
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) leaving[k][i] = next.leaving[k][i] | (leaving[k][i] & none);
    }
    over_tile = next.over_tile;
  }
};

// A thread's part of the state: kColumns columns of a warpgroup's 64 rows, of which there may be kHeaddim.
struct State {
  float value[kColumns / 2];
  // The warpgroups with states are the first ones.
  int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);

  // visit(element, where it is from the begin of this head's part of a row of `states`) of each in `rows` rows. The barriers,
  // of this warpgroup's threads, keep the compiler from asking for all of a state's loads before it uses the first, and what
  // is said of the offset keeps it from computing all of them: either would take more registers than there are.
  template <typename Visit>
  __device__ __forceinline__ void each(const OxiTensor4 &states, int rows, Visit visit) {
    int thread = threadIdx.x % kWarpgroup;
    asm volatile("" : "+r"(thread));
    const int row = thread / kWarp * 16 + thread % kWarp / 4, column = group * kColumns + 2 * (thread % 4);
    long long offset = row * states.stride[2] + column * states.stride[3];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i / 2 * 8 < rows) visit(value[4 * j + i], offset + i % 2 * states.stride[3] + i / 2 * 8 * states.stride[2]);
      }
      offset += 8 * states.stride[3];
      asm volatile("" : "+l"(offset));
      if (j % 2 == 1) wait_for_warpgroup();
    }
  }

  __device__ __forceinline__ void wait_for_warpgroup() const { synchronize_warpgroup(group); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) value[i] = 0.0f;
  }

  // Row `row` of the initial states; zeros if it is negative.
  __device__ __forceinline__ void load_initial(const OxiSsd &p, const Walk &walk, long long row) {
    clear();
    if (row < 0) return;
    if (p.wide_initial_states) {
      load<float>(p.initial_states, walk, row);
    } else {
      load<Element>(p.initial_states, walk, row);
    }
  }

  template <typename T>
  __device__ __forceinline__ void load(const OxiTensor4 &states, const Walk &walk, long long row) {
    const T *from = at<T>(states, walk, row);
    each(states, kHeaddim, [&](float &value, long long offset) { value = to_float(from[offset]); });
  }

  template <typename T>
  __device__ __forceinline__ void store(const OxiTensor4 &states, const Walk &walk, long long row) {
    T *to = at<T>(states, walk, row);
    each(states, kHeaddim, [&](float &value, long long offset) { to[offset] = from_float<T>(value); });
  }

  // Of this head and slice in a tensor of states.
  template <typename T>
  __device__ static __forceinline__ T *at(const OxiTensor4 &states, const Walk &walk, long long row) {
    return static_cast<T *>(states.data) + walk.state_offset(states, row);
  }

  // The states of the documents that end at a token.
  __device__ __forceinline__ void store_ended(const OxiSsd &p, const Walk &walk, int end) {
    if (p.varlen_states.data == nullptr) return;
    for_documents_ending_at(p, walk.b, end, [&](long long row, long long initial) {
      // Not rounded to every dtype ahead of the loop over documents.
      keep_in_place(value);
      if (initial >= -1) {
        copy_initial(p, walk, initial, row);
      } else if (p.varlen_dtype == OXI_F32) {
        store<float>(p.varlen_states, walk, row);
      } else if (p.varlen_dtype == OXI_BF16) {
        store<bf16>(p.varlen_states, walk, row);
      } else {
        store<f16>(p.varlen_states, walk, row);
      }
    });
  }

  // To row `row` of varlen states what a document without tokens has: row `initial` of the initial states, zeros if negative.
  __device__ static __forceinline__ void copy_initial(const OxiSsd &p, const Walk &walk, long long initial, long long row) {
    const OxiTensor4 &from = p.initial_states, &to = p.varlen_states;
#pragma unroll 1
    for (int i = threadIdx.x; i < kHeaddim * kDstate; i += kStateGroups * kWarpgroup) {
      const int along_headdim = i / kDstate, n = i % kDstate;
      float value = 0.0f;
      if (initial >= 0) {
        value = oxi::load_initial(
            p, walk.state_offset(from, initial) + along_headdim * from.stride[2] + n * from.stride[3]);
      }
      store_scalar(to.data, p.varlen_dtype,
                   walk.state_offset(to, row) + along_headdim * to.stride[2] + n * to.stride[3], value);
    }
  }

  // Where this thread's elements of what a segment adds are, of the state of this index, in fours that
  // kStateGroups * kWarpgroup fours apart.
  __device__ static __forceinline__ float4 *in_segment(const OxiSsd &p, long long index) {
    return reinterpret_cast<float4 *>(p.segment_states) + index * (kRows * kDstate / 4) + threadIdx.x;
  }

  __device__ __forceinline__ void store_segment(const OxiSsd &p, long long index) const {
    float4 *to = in_segment(p, index);
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 4) {
      to[i / 4 * (kStateGroups * kWarpgroup)] = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
    }
  }

  // On over a segment, of which it is known how much what comes before it decays and what it adds.
  __device__ __forceinline__ void pass_segment(const OxiSsd &p, long long index, float decay) {
    const float4 *from = in_segment(p, index);
    // Values whose loads are under way together.
    constexpr int kAtOnce = kDstate == 256 ? 32 : kColumns / 2;
#pragma unroll
    for (int first = 0; first < kColumns / 2; first += kAtOnce) {
      float4 added[kAtOnce / 4];
#pragma unroll
      for (int i = 0; i < kAtOnce / 4; ++i) added[i] = from[(first / 4 + i) * (kStateGroups * kWarpgroup)];
      // A state that another run begins after may not be finite.
      if (first == 0 && decay == 0.0f) clear();
#pragma unroll
      for (int i = 0; i < kAtOnce / 4; ++i) {
        float *own = value + first + 4 * i;
        own[0] = fmaf(decay, own[0], added[i].x);
        own[1] = fmaf(decay, own[1], added[i].y);
        own[2] = fmaf(decay, own[2], added[i].z);
        own[3] = fmaf(decay, own[3], added[i].w);
      }
      wait_for_warpgroup();
    }
  }

  // What `publish` wrote to slabs, from global memory. The barriers as in `each`.
  __device__ __forceinline__ void load_rounded(const unsigned char *slabs) {
    int thread = threadIdx.x % kWarpgroup;
    asm volatile("" : "+r"(thread));
    const int row = thread / kWarp * 16 + thread % kWarp / 4;
    const unsigned char *slab = slabs + group * kColumns / kSlabColumns * kStateSlabBytes + thread % 4 * 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned char *from = slab + slab_offset(row + i / 2 * 8, j % 8) + i % 2 * sizeof(Element);
        if (row + i / 2 * 8 < kHeaddim) value[4 * j + i] = to_float(*reinterpret_cast<const Element *>(from));
      }
      if (j % 8 == 7) slab += kStateSlabBytes;
      asm volatile("" : "+l"(slab));
      if (j % 2 == 1) wait_for_warpgroup();
    }
  }

  // For the outputs' products.
  __device__ __forceinline__ void publish(unsigned char *slabs) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    if (16 * warp >= kHeaddim) return;
    const int row = 16 * warp + lane % 16;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      const unsigned slab = shared_address(slabs) + (group * kColumns / kSlabColumns + j / 8) * kStateSlabBytes;
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = join(value[4 * j + 2 * i], value[4 * j + 2 * i + 1], Element());
      store_blocks(slab + slab_offset(row, j % 8 + lane / 16), words);
    }
  }

  // Over a tile: the products are under way until `end_step`.
  __device__ __forceinline__ void begin_step(const Step &step, const Stage<false> &stage) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) value[i] *= step.over_tile;
    keep_in_place(value);
    const unsigned char *slabs = stage.B + group * (kColumns / kSlabColumns) * kSlabBytes;
    const unsigned B = operand(shared_address(slabs), kSlabBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) Product<kColumns>::of_registers<kAcrossRows>(value, step.leaving[k], B + across_k(k), 1);
    end_of_products();
  }
  __device__ __forceinline__ void end_step() {
    wait_for_products<0>();
    keep_in_place(value);
  }
};

// A walk over the ring's tiles by the warpgroups with states.
template <typename TileRing>
struct StateWalk {
  TileRing &ring;
  RingPosition<TileRing::kStages> at;
  RingPosition<TileRing::kStagesOfX> of_x;
  Span tile;
  Step step;

  __device__ __forceinline__ explicit StateWalk(TileRing &ring) : ring(ring) {
    ring.full[0].wait(0);
    tile = ring.vectors[0].tile;
    step.load(ring.x[0], ring.vectors[0]);
  }

  __device__ __forceinline__ const Stage<false> &stage() const { return ring.stages[at.stage]; }

  // On to the next tile, while `state` is on its way over this one. A tile that is none gives a step of no use.
  __device__ __forceinline__ void advance(State &state) {
    RingPosition<TileRing::kStages> next = at;
    next.advance();
    ring.full[next.stage].wait(next.parity);
    const Span next_tile = ring.vectors[next.stage].tile;
    Step next_step;
    of_x.advance();
    next_step.load(ring.x[of_x.stage], ring.vectors[next.stage]);
    state.end_step();
    ring.empty[at.stage].arrive();
    at = next;
    tile = next_tile;
    step.replace(next_step);
  }
};

}  // namespace oxi
