// The chunk scan, forward, on Hopper's warpgroup products: bf16 and fp16 at the sizes that models have, tensors whose rows
// move in 16 bytes. Equals oxiscan.reference.mamba_chunk_scan_combined.
//
// Per head, in tiles of up to 64 tokens of one run, with H (headdim, dstate) the state that enters the tile, exponents to
// base 2, l = cumsum(dt A) within the tile:
//
//   S = C B^T      M[t, s] = S[t, s] 2^(l[t] - l[s]) dt[s] for t >= s, else 0
//   Y = M X + 2^l[t] (C H^T) + D X      out = Y silu(z)
//   H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B
//
// Grid: a block has a segment of a sequence, for one head, or for a slice of it (kHeaddim rows of the state).
// Warpgroups, each with a part of the work, a tile or more apart from one another:
//
//   loads     Four warps, each with every kStages-th tile and a stage of the ring: where tiles end, dt and l, bulk copies of
//             x, B and C. After the last tile come empty ones, for the others to stop at.
//   outputs   kOutputGroups of them, each with every kOutputGroups-th tile: S, M, Y and out. S and C H^T by products from
//             shared memory, M X with M in registers, but for M's diagonal, which is added with D in full.
//   states    kStateGroups of them, each with H in accumulators, up to 128 columns. At a tile's start they write it, rounded,
//             to shared memory for the outputs. X^T is scaled in registers, during the products of the tile before.
//
// Barriers: full[stage]: the vectors and copies of a tile are there; where the run ends within the tile the copies come to
// landed[stage] first, and the loads clear the rows past that first. empty[stage]: those that work on the tile no longer
// need them. state_full[group]: H is there for that group of the outputs. state_empty[buffer]: their products no longer read it.
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros, and
// the state at a run's start is assigned.
//
// Shared memory: Storage below: a ring of kStages times X, B, C in slabs of 64 columns (wgmma.cuh), H, out.
//
// fp32: dt, l and the powers, S, Y, H, M's diagonal, all sums. Rounded to Element: the rest of M, H and dt X as operands.

#include "barrier.cuh"
#include "ssd.cuh"
#include "wgmma.cuh"

namespace oxi {

constexpr int kTile = OXI_SSD_TILE;
// A block's part of it.
constexpr int kHeaddim = HEADDIM;
constexpr int kDstate = DSTATE;

constexpr int kWarpgroup = 128;
// Of dstate, what a warpgroup has of the state.
constexpr int kColumns = kDstate < 128 ? kDstate : 128;
constexpr int kStateGroups = kDstate / kColumns;
constexpr int kOutputGroups = 4 - kStateGroups;
constexpr int kThreads = (kOutputGroups + kStateGroups + 1) * kWarpgroup;
// Registers of a thread at first, as each warpgroup has a warp on each of a multiprocessor's four parts; and later.
constexpr int kRegisters = 65536 / kThreads / 8 * 8;
constexpr int kLoadRegisters = 24;
constexpr int kStateRegisters = kDstate == 256 ? 128 : 144;
constexpr int kOutputRegisters =
    (kThreads / kWarpgroup * kRegisters - kLoadRegisters - kStateGroups * kStateRegisters) / kOutputGroups / 8 * 8;

// Rows of a warpgroup's products.
constexpr int kRows = 64;

constexpr int kSlabBytes = kTile * kSlabRowBytes;
constexpr int kSlabsOfB = kDstate / kSlabColumns;
// Of the state as (headdim, dstate).
constexpr int kStateSlabBytes = kHeaddim * kSlabRowBytes;
constexpr int kStages = kDstate == 256 ? 2 : 4;
constexpr int kStateBuffers = kDstate == 256 ? 1 : 2;

struct Stage {
  unsigned char x[kSlabBytes];
  unsigned char B[kSlabsOfB * kSlabBytes];
  unsigned char C[kSlabsOfB * kSlabBytes];
};

// Where a token's value is in a vector of a tile, so that what a thread needs in one step of 16 tokens moves in one access:
// the values of an operand's columns 2 (lane % 4) + {0, 1} and those 8 on; of rows lane / 4 and those 8 on.
__device__ __forceinline__ int by_column(int t) { return t / 16 * 16 + t % 8 / 2 * 4 + t / 8 % 2 * 2 + t % 2; }
__device__ __forceinline__ int by_row(int t) { return t / 16 * 16 + t % 8 * 2 + t / 8 % 2; }

// What dt and A make of a tile, and which one it is; of no tokens after the last one.
struct Vectors {
  Span tile;
  // The decay over the tile.
  float over_tile;
  // By columns: log2 of the decay from the tile's start; dt; what remains at the tile's end of what a token adds.
  alignas(16) float l[kTile];
  float dt[kTile];
  float leaving[kTile];
  // Of a warp's 16 rows of M, left of its diagonal's 16 columns, the power of a row and a column is of two factors, neither
  // above 1: the decay from the row before the warp's first one, and what remains there of what a column's token adds. By
  // columns those of warp 1, 2 and 3.
  float columns[(1 + 2 + 3) * 16];
  // By rows: the former factor; the decay from the tile's start, and its log2.
  float rows[kTile];
  float entering[kTile];
  float l_of_row[kTile];
};

struct __align__(1024) Storage {
  Stage stages[kStages];
  unsigned char state[kStateBuffers][kSlabsOfB * kStateSlabBytes];
  unsigned char out[kOutputGroups][kSlabBytes];
  Vectors vectors[kStages];
  float D[kHeaddim];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier landed[kStages];
  Barrier state_full[kOutputGroups];
  Barrier state_empty[kStateBuffers];
};
static_assert(sizeof(Storage) <= 227 * 1024);

using Ring = RingPosition<kStages>;

// Whether out's rows are as wide as a slab and go out by bulk copies.
constexpr bool kStoresBoxes = kHeaddim == kSlabColumns;

__device__ __forceinline__ const Element *rows_of(const OxiTensor4 &tensor, long long b, int head_or_group, int first) {
  return static_cast<const Element *>(tensor.data) + b * tensor.stride[0] + head_or_group * tensor.stride[2] + first;
}

// By one warp: what dt and A make of the tile's tokens, of which a lane has two.
__device__ __forceinline__ void discretize(const OxiSsd &p, const Discretize &head, const unsigned (&raw)[2], const Tiles &tile,
                                           Vectors &vectors) {
  const int lane = threadIdx.x % kWarp;
  float dt[2], l[2];
  const auto value = [&](int i) { return p.wide_dt ? __uint_as_float(raw[i]) : low(raw[i], Element()); };
  const float total = __shfl_sync(kAllLanes, sum_decays(p, head, tile.size, value, dt, l), kWarp - 1);
  // Of the token before each warp's first one.
  float border[4] = {};
#pragma unroll
  for (int warp = 1; warp < 4; ++warp) border[warp] = __shfl_sync(kAllLanes, l[1], 8 * warp - 1);
  const int column = by_column(2 * lane);
  const auto store = [&](float *vector, float first, float second) {
    *reinterpret_cast<float2 *>(vector + column) = make_float2(first, second);
  };
  store(vectors.l, l[0], l[1]);
  store(vectors.dt, dt[0], dt[1]);
  store(vectors.leaving, dt[0] * fast_exp2(total - l[0]), dt[1] * fast_exp2(total - l[1]));
  float own_border = 0.0f;
#pragma unroll
  for (int warp = 1; warp < 4; ++warp) {
    if (2 * lane < 16 * warp) {
      store(vectors.columns + warp * (warp - 1) / 2 * 16, dt[0] * fast_exp2(border[warp] - l[0]),
            dt[1] * fast_exp2(border[warp] - l[1]));
    } else {
      own_border = border[warp];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = by_row(2 * lane + i);
    vectors.rows[row] = fast_exp2(l[i] - own_border);
    vectors.entering[row] = fast_exp2(l[i]);
    vectors.l_of_row[row] = l[i];
  }
  if (lane == kWarp - 1) vectors.over_tile = fast_exp2(l[1]);
  if (lane == 0) vectors.tile = tile;
}

// By one thread: a tile's x, B and C. `arrived` will have their bytes.
__device__ __forceinline__ void copy_tile(const OxiSsdMapped &p, const Walk &walk, int begin, Stage &stage, Barrier &arrived) {
  const int b = static_cast<int>(walk.b);
  arrived.expect((1 + (p.ssd.states_only ? 1 : 2) * kSlabsOfB) * kSlabBytes);
  copy_box(stage.x, p.x, walk.first, walk.head, begin, b, arrived);
#pragma unroll 1
  for (int slab = 0; slab < kSlabsOfB; ++slab) {
    const int column = slab * kSlabColumns;
    copy_box(stage.B + slab * kSlabBytes, p.B, column, walk.group, begin, b, arrived);
    if (!p.ssd.states_only) copy_box(stage.C + slab * kSlabBytes, p.C, column, walk.group, begin, b, arrived);
  }
}

// By one warp: zeros for a tile's x and B from row `size` on.
__device__ __forceinline__ void clear_rows(Stage &stage, int size) {
  for (int slab = 0; slab < 1 + kSlabsOfB; ++slab) {
    unsigned char *rows = slab == 0 ? stage.x : stage.B + (slab - 1) * kSlabBytes;
    for (int at = size * kSlabRowBytes + threadIdx.x % kWarp * 16; at < kSlabBytes; at += kWarp * 16) {
      *reinterpret_cast<uint4 *>(rows + at) = make_uint4(0, 0, 0, 0);
    }
  }
}

__device__ __forceinline__ void load(const OxiSsdMapped &mapped, const Walk &walk, Storage &storage, int warp) {
  const OxiSsd &p = mapped.ssd;
  const int lane = threadIdx.x % kWarp;
  const Discretize head(p, walk.head);
  const long long dt = walk.b * p.dt.stride[0] + walk.head * p.dt.stride[2];
  Tiles tile(p, walk);
  Stage &stage = storage.stages[warp];
  Barrier &full = storage.full[warp];
  unsigned parity = 0, landed_parity = 0;
  for (int i = 0, ends = 0; ends < kOutputGroups; ++i) {
    const bool is_tile = tile.next();
    if (!is_tile) tile.size = 0, ++ends;
    if (i % kStages != warp) continue;
    // As they lie in memory: what is done with a load waits for it.
    unsigned raw[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = 2 * lane + e;
      if (t >= tile.size) continue;
      const long long offset = dt + (tile.begin + t) * p.dt.stride[1];
      if (p.wide_dt) {
        raw[e] = static_cast<const unsigned *>(p.dt.data)[offset];
      } else {
        const unsigned short *from = static_cast<const unsigned short *>(p.dt.data) + offset;
        asm volatile("ld.global.u16 %0, [%1];" : "=r"(raw[e]) : "l"(from));
      }
    }
    storage.empty[warp].wait(parity ^ 1);
    parity ^= 1;
    // Past a sequence's end copies give zeros, past a run's end what is not this run's.
    const bool is_cut = tile.size < kTile && tile.begin + tile.size < p.seqlen;
    Barrier &arrived = is_cut ? storage.landed[warp] : full;
    if (is_tile && lane == 0) copy_tile(mapped, walk, tile.begin, stage, arrived);
    discretize(p, head, raw, tile, storage.vectors[warp]);
    if (is_tile && is_cut) {
      __syncwarp();
      arrived.arrive();
      arrived.wait(landed_parity);
      landed_parity ^= 1;
      clear_rows(stage, tile.size);
      publish_to_products();
    }
    full.arrive();
  }
}

// M of a warp's 16 rows, as an operand: of products over 16 columns each. Its diagonal comes apart, in full, of a thread's two
// rows.
__device__ __forceinline__ void masked_products(const float (&S)[kTile / 2], const Vectors &vectors, int warp, int lane,
                                                unsigned (&M)[kTile / 16][4], float (&diagonal)[2]) {
  const auto load_column = [&](const float *vector, int k) {
    return *reinterpret_cast<const float4 *>(vector + 16 * k + 4 * (lane % 4));
  };
  const auto load_rows = [&](const float *vector) {
    return *reinterpret_cast<const float2 *>(vector + 16 * warp + 2 * (lane / 4));
  };
  const float2 rows = load_rows(vectors.rows);
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const float *own = S + 8 * k;
    if (k < warp) {
      const float4 factor = load_column(vectors.columns + warp * (warp - 1) / 2 * 16, k);
      M[k][0] = join(own[0] * factor.x * rows.x, own[1] * factor.y * rows.x, Element());
      M[k][1] = join(own[2] * factor.x * rows.y, own[3] * factor.y * rows.y, Element());
      M[k][2] = join(own[4] * factor.z * rows.x, own[5] * factor.w * rows.x, Element());
      M[k][3] = join(own[6] * factor.z * rows.y, own[7] * factor.w * rows.y, Element());
    } else if (k == warp) {
      const float4 l = load_column(vectors.l, k), dt = load_column(vectors.dt, k);
      const float2 l_t = load_rows(vectors.l_of_row);
      const auto power = [](float l_t, float l_s, float dt) { return fast_exp2(l_t - l_s) * dt; };
      // Quadrants of 8 columns and 8 rows: upper left, lower left, lower right.
      const float values[3][2] = {
          {own[0] * power(l_t.x, l.x, dt.x), own[1] * power(l_t.x, l.y, dt.y)},
          {own[2] * power(l_t.y, l.x, dt.x), own[3] * power(l_t.y, l.y, dt.y)},
          {own[6] * power(l_t.y, l.z, dt.z), own[7] * power(l_t.y, l.w, dt.w)},
      };
      const int past = 2 * (lane % 4) - lane / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float(&pair)[2] = values[2 * i];
        M[k][3 * i] = join(past < 0 ? pair[0] : 0.0f, past < -1 ? pair[1] : 0.0f, Element());
        // Of the row's lanes the one that has it.
        diagonal[i] = __shfl_sync(kAllLanes, lane / 4 % 2 == 0 ? pair[0] : pair[1], lane / 4 * 4 + lane / 8);
      }
      M[k][1] = join(values[1][0], values[1][1], Element());
      M[k][2] = 0;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) M[k][i] = 0;
    }
  }
}

__device__ __forceinline__ void write_outputs(const OxiSsdMapped &mapped, const Walk &walk, Storage &storage, int group) {
  const OxiSsd &p = mapped.ssd;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  unsigned char *staged = storage.out[group];
  unsigned state_parity = 0;
  Ring at;
  RingPosition<kStateBuffers> buffer;
  for (int i = 0; i < group; ++i) at.advance(), buffer.advance();
  for (;;) {
    storage.full[at.stage].wait(at.parity);
    const Vectors &vectors = storage.vectors[at.stage];
    const int begin = vectors.tile.begin, size = vectors.tile.size;
    if (size == 0) break;
    // Where a thread's elements are is computed anew for each tile: kept, it would take registers.
    int lane = threadIdx.x % kWarp;
    asm volatile("" : "+r"(lane));
    const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
    // Of blocks of 16 rows, the one that the lane names.
    const int block_row = 16 * warp + lane % 16;
    const Stage &stage = storage.stages[at.stage];
    const unsigned x = operand(shared_address(stage.x), kSlabBytes);
    const unsigned B = operand(shared_address(stage.B), 0), C = operand(shared_address(stage.C), 0);
    float S[kTile / 2], Y[kHeaddim / 2];
    products_begin();
#pragma unroll
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kTile>::of_shared(S, C + along_k(k, kSlabBytes), B + along_k(k, kSlabBytes), k > 0);
    }
    end_of_products();
    const unsigned state = operand(shared_address(storage.state[buffer.stage]), 0);
    storage.state_full[group].wait(state_parity);
#pragma unroll
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kHeaddim>::of_shared(Y, C + along_k(k, kSlabBytes), state + along_k(k, kStateSlabBytes), k > 0);
    }
    end_of_products();

    unsigned M[kTile / 16][4];
    float diagonal[2];
    wait_for_products<1>();
    keep_in_place(S);
    masked_products(S, vectors, warp, lane, M, diagonal);
    const float2 entering = *reinterpret_cast<const float2 *>(vectors.entering + 16 * warp + 2 * (lane / 4));
    wait_for_products<0>();
    keep_in_place(Y);
    storage.state_empty[buffer.stage].arrive();
#pragma unroll
    for (int j = 0; j < kHeaddim / 8; j += 2) {
      unsigned words[4];
      load_blocks(words, shared_address(stage.x) + slab_offset(block_row, j + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 D = *reinterpret_cast<const float2 *>(storage.D + 8 * (j + i / 2) + column);
        const float over_rows = i % 2 == 0 ? entering.x : entering.y;
        float *y = Y + 4 * j + 2 * i;
        y[0] = fmaf(y[0], over_rows, (diagonal[i % 2] + D.x) * low(words[i], Element()));
        y[1] = fmaf(y[1], over_rows, (diagonal[i % 2] + D.y) * high(words[i], Element()));
      }
    }
    keep_in_place(Y);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kHeaddim>::of_registers(Y, M[k], x + across_k(k));
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(Y);
    storage.empty[at.stage].arrive();
    if (__builtin_expect(p.z.data != nullptr, 0)) {
      const Element *z = rows_of(p.z, walk.b, walk.head, walk.first + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = row + 8 * half;
        const Element *from = z + (begin + t) * p.z.stride[1];
#pragma unroll
        for (int j = 0; j < kHeaddim / 8; ++j) {
          const unsigned word = t < size ? *reinterpret_cast<const unsigned *>(from + 8 * j) : 0;
          float *y = Y + 4 * j + 2 * half;
          y[0] *= silu(low(word, Element()));
          y[1] *= silu(high(word, Element()));
        }
      }
    }

    // Through shared memory, a warp its own rows.
    if (kStoresBoxes && lane == 0) wait_for_box_reads();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kHeaddim / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = join(Y[4 * j + 2 * i], Y[4 * j + 2 * i + 1], Element());
      store_blocks(shared_address(staged) + slab_offset(block_row, j + lane / 16), words);
    }
    // A tile's rows past its tokens are another run's, or lie past the sequence's end, where bulk copies end too.
    const bool in_boxes = kStoresBoxes && (size == kTile || begin + size == p.seqlen);
    if (kStoresBoxes) publish_to_products();
    __syncwarp();
    if (__builtin_expect(in_boxes, 1)) {
      const int b = static_cast<int>(walk.b);
      const unsigned char *rows = staged + 16 * warp * kSlabRowBytes;
      if (lane == 0) store_box(mapped.out, walk.first, walk.head, begin + 16 * warp, b, rows);
    } else {
      constexpr int kChunks = kHeaddim / 8;
      Element *out = const_cast<Element *>(rows_of(p.out, walk.b, walk.head, walk.first)) + begin * p.out.stride[1];
#pragma unroll
      for (int i = 0; i < 16 * kChunks / kWarp; ++i) {
        const int t = 16 * warp + (i * kWarp + lane) / kChunks, chunk = (i * kWarp + lane) % kChunks;
        const uint4 words = *reinterpret_cast<const uint4 *>(staged + slab_offset(t, chunk));
        if (t < size) *reinterpret_cast<uint4 *>(out + t * p.out.stride[1] + 8 * chunk) = words;
      }
    }
    for (int i = 0; i < kOutputGroups; ++i) at.advance(), buffer.advance();
    state_parity ^= 1;
  }
  if (kStoresBoxes && threadIdx.x % kWarp == 0) wait_for_box_reads();
}

// A thread's part of the state: kColumns columns of a warpgroup's 64 rows, of which there may be kHeaddim.
struct State {
  float value[kColumns / 2];
  // Of the warpgroups with states, which one this is.
  int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) - kOutputGroups;

  // visit(element, where it is from the begin of this head's part of a row of `states`) of each. The barriers, of this
  // warpgroup's threads, keep the compiler from asking for all of a state's loads before it uses the first, and what is said
  // of the offset keeps it from computing all of them: either would take more registers than there are.
  template <typename Visit>
  __device__ __forceinline__ void each(const OxiTensor4 &states, Visit visit) {
    int thread = threadIdx.x % kWarpgroup;
    asm volatile("" : "+r"(thread));
    const int row = thread / kWarp * 16 + thread % kWarp / 4, column = group * kColumns + 2 * (thread % 4);
    long long offset = row * states.stride[2] + column * states.stride[3];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row < kHeaddim) visit(value[4 * j + i], offset + i % 2 * states.stride[3] + i / 2 * 8 * states.stride[2]);
      }
      offset += 8 * states.stride[3];
      asm volatile("" : "+l"(offset));
      if (j % 2 == 1) wait_for_warpgroup();
    }
  }

  __device__ __forceinline__ void wait_for_warpgroup() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kWarpgroup) : "memory");
  }

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
    each(states, [&](float &value, long long offset) { value = to_float(from[offset]); });
  }

  template <typename T>
  __device__ __forceinline__ void store(const OxiTensor4 &states, const Walk &walk, long long row) {
    T *to = at<T>(states, walk, row);
    each(states, [&](float &value, long long offset) { to[offset] = from_float<T>(value); });
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
        copy_initial(p, walk, initial, p.varlen_states, p.varlen_dtype, row);
      } else if (p.varlen_dtype == OXI_F32) {
        store<float>(p.varlen_states, walk, row);
      } else if (p.varlen_dtype == OXI_BF16) {
        store<bf16>(p.varlen_states, walk, row);
      } else {
        store<f16>(p.varlen_states, walk, row);
      }
    });
  }

  // The state of what has no tokens: row `initial` of the initial states, zeros if it is negative.
  __device__ static __forceinline__ void copy_initial(const OxiSsd &p, const Walk &walk, long long initial,
                                                      const OxiTensor4 &to, int dtype, long long row) {
    const OxiTensor4 &from = p.initial_states;
#pragma unroll 1
    for (int i = threadIdx.x - kOutputGroups * kWarpgroup; i < kHeaddim * kDstate; i += kStateGroups * kWarpgroup) {
      const int along_headdim = i / kDstate, n = i % kDstate;
      float value = 0.0f;
      if (initial >= 0) {
        value = oxi::load_initial(
            p, walk.state_offset(from, initial) + along_headdim * from.stride[2] + n * from.stride[3]);
      }
      store_scalar(to.data, dtype,
                   walk.state_offset(to, row) + along_headdim * to.stride[2] + n * to.stride[3], value);
    }
  }

  // Where this thread's elements of what a segment adds are, in fours that kStateGroups * kWarpgroup fours apart.
  __device__ static __forceinline__ float4 *in_segment(const OxiSsd &p, const Walk &walk, int part) {
    const long long index = walk.of_part(p, part) * p.slices + walk.slice;
    return reinterpret_cast<float4 *>(p.segment_states) + index * (kRows * kDstate / 4) +
           (threadIdx.x - kOutputGroups * kWarpgroup);
  }

  __device__ __forceinline__ void store_segment(const OxiSsd &p, const Walk &walk) const {
    float4 *to = in_segment(p, walk, walk.segment);
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 4) {
      to[i / 4 * (kStateGroups * kWarpgroup)] = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
    }
  }

  // The state at the walk's begin: what the parts before it added, each decayed over those that follow.
  __device__ __forceinline__ void enter_segment(const OxiSsd &p, const Walk &walk) {
    clear();
#pragma unroll 1
    for (int part = 0; part < Walk::parts_before(walk.segment); ++part) {
      const float decay = p.segment_decays[walk.of_part(p, part)];
      // A state that another run begins after may not be finite.
      if (decay == 0.0f) clear();
      keep_in_place(value);
      const float4 *from = in_segment(p, walk, part);
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4) {
        const float4 four = from[i / 4 * (kStateGroups * kWarpgroup)];
        const float added[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i + e] = fmaf(decay, value[i + e], added[e]);
        if (i % 8 == 4) wait_for_warpgroup();
      }
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
};

// What a tile adds to a state: an operand, X^T scaled by what remains at the tile's end of what each token adds; and how much
// the state before it decays.
struct Step {
  unsigned leaving[kTile / 16][4];
  float over_tile;

  __device__ __forceinline__ void load(const Stage &stage, const Vectors &vectors) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    over_tile = vectors.over_tile;
    float4 factors[kTile / 16];
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      load_transposed(leaving[k], shared_address(stage.x) + slab_offset(16 * k + row, chunk));
      factors[k] = *reinterpret_cast<const float4 *>(vectors.leaving + 16 * k + 4 * (lane % 4));
    }
    // Has the compiler ask for all of it first.
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned &word = leaving[k][i];
        const float x = i < 2 ? factors[k].x : factors[k].z, y = i < 2 ? factors[k].y : factors[k].w;
        word = join(low(word, Element()) * x, high(word, Element()) * y, Element());
      }
    }
  }

  // The next one, once the products with this one are done. They read registers until then, of which the compiler takes no
  // notice: to have this one's used after them keeps it from giving them to the next one before.
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

__device__ __forceinline__ void walk_states(const OxiSsd &p, const Walk &walk, Storage &storage) {
  State state;
  if (p.states_only) {
    state.clear();
  } else {
    state.enter_segment(p, walk);
  }
  if (walk.begin == 0 && !p.states_only) state.store_ended(p, walk, 0);
  float decay = 1.0f;
  Ring at;
  RingPosition<kOutputGroups> output;
  RingPosition<kStateBuffers> buffer;
  storage.full[0].wait(0);
  Span tile = storage.vectors[0].tile;
  Step step;
  step.load(storage.stages[0], storage.vectors[0]);
  while (tile.size > 0) {
    if (tile.starts) {
      state.load_initial(p, walk, entry_row(p, walk.b, tile.begin));
      decay = 0.0f;
    }
    if (!p.states_only) {
      storage.state_empty[buffer.stage].wait(buffer.parity ^ 1);
      state.publish(storage.state[buffer.stage]);
    }
    decay *= step.over_tile;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) state.value[i] *= step.over_tile;
    keep_in_place(state.value);
    const unsigned char *slabs = storage.stages[at.stage].B + state.group * (kColumns / kSlabColumns) * kSlabBytes;
    const unsigned B = operand(shared_address(slabs), kSlabBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) Product<kColumns>::of_registers(state.value, step.leaving[k], B + across_k(k));
    end_of_products();

    // While those are under way.
    if (!p.states_only) {
      publish_to_products();
      storage.state_full[output.stage].arrive();
      output.advance();
      buffer.advance();
    }
    Ring next = at;
    next.advance();
    storage.full[next.stage].wait(next.parity);
    const Span next_tile = storage.vectors[next.stage].tile;
    // Of no use if the next tile is none.
    Step next_step;
    next_step.load(storage.stages[next.stage], storage.vectors[next.stage]);

    wait_for_products<0>();
    keep_in_place(state.value);
    storage.empty[at.stage].arrive();
    if (tile.ends && !p.states_only) state.store_ended(p, walk, tile.begin + tile.size);
    at = next;
    tile = next_tile;
    step.replace(next_step);
  }
  if (p.states_only) {
    state.store_segment(p, walk);
    const bool first = walk.slice == 0 && threadIdx.x == kOutputGroups * kWarpgroup;
    if (first) p.segment_decays[walk.of_part(p, walk.segment)] = decay;
  } else if (walk.end == p.seqlen && p.final_states.data != nullptr) {
    if (p.seqlen > 0) {
      state.store<float>(p.final_states, walk, walk.b);
    } else {
      State::copy_initial(p, walk, document_row(p, walk.b, 0), p.final_states, OXI_F32, walk.b);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    KERNEL(const __grid_constant__ OxiSsdMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage &storage = *reinterpret_cast<Storage *>(shared);
  const OxiSsd &p = mapped.ssd;
  const Walk walk(p);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      storage.full[stage].init(kWarp);
      storage.landed[stage].init(kWarp);
      storage.empty[stage].init(kWarpgroup * (kStateGroups + !p.states_only));
    }
    for (int group = 0; group < kOutputGroups; ++group) {
      storage.state_full[group].init(kStateGroups * kWarpgroup);
    }
    for (int buffer = 0; buffer < kStateBuffers; ++buffer) storage.state_empty[buffer].init(kWarpgroup);
    publish_to_products();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(mapped.x);
    prefetch_map(mapped.B);
    prefetch_map(mapped.C);
    prefetch_map(mapped.out);
  }
  wait_for_earlier_work();
  if (threadIdx.x < kHeaddim) {
    const long long offset = walk.head * p.D.stride[0] + (walk.first + threadIdx.x) * p.D.stride[1];
    storage.D[threadIdx.x] = p.D.data == nullptr ? 0.0f : load_either<Element>(p.D.data, offset, p.wide_D);
  }
  __syncthreads();
  // The same for a warp, which the compiler has to know of products.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0), group = warp / 4;
  if (group < kOutputGroups) {
    change_registers<kOutputRegisters, kRegisters>();
    if (!p.states_only) write_outputs(mapped, walk, storage, group);
  } else if (group < kOutputGroups + kStateGroups) {
    change_registers<kStateRegisters, kRegisters>();
    walk_states(p, walk, storage);
  } else {
    change_registers<kLoadRegisters, kRegisters>();
    const int stage = warp - 4 * (kOutputGroups + kStateGroups);
    if (stage < kStages) load(mapped, walk, storage, stage);
  }
}

}  // namespace oxi
