// The chunk scan, forward, on Hopper's warpgroup products: bf16 and fp16 at the sizes that models have, tensors whose rows
// move in 16 bytes. Equals oxiscan.reference.mamba_chunk_scan_combined.
//
// Per head, in tiles of up to 64 tokens of one run, with H (headdim, dstate) the state that enters the tile, exponents to
// base 2, l = cumsum(dt A) within the tile:
//
//   S = C B^T      M[t, s] = S[t, s] 2^(l[t] - l[s]) dt[s] for t >= s, else 0
//   Y = M X + 2^l[t] (C H^T) + D X      out = Y silu(z)      (one D a head is added to M's diagonal)
//   H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B
//
// Grid: a block has a segment of a sequence, for one head, or for a slice of it (kHeaddim rows of the state).
// Warpgroups, each with a part of the work, a tile or more apart from one another:
//
//   loads     Four warps, each with every kStages-th tile and a stage of the ring: where tiles end, dt and l, bulk copies of
//             x, B and C. After the last tile come empty ones, for the others to stop at.
//   outputs   kOutputGroups of them, each with every kOutputGroups-th tile: S, M, Y and out. S and C H^T by products from
//             shared memory, M X with M in registers.
//   states    kStateGroups of them, each with H^T in accumulators, 64 rows of dstate for each of kBlocks products. At a
//             tile's start they write it, rounded, to shared memory for the outputs. B^T is scaled in registers.
//
// Barriers: full[stage]: the vectors and copies of a tile are there; where the run ends within the tile the copies come to
// landed[stage] first, and the loads clear the rows past that first. empty[stage]: those that work on the tile no longer
// need them. state_full[group]: H is there, state_empty[group]: the products of that group of the outputs no longer read it.
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros, and
// the state at a run's start is assigned.
//
// Shared memory: Storage below, 129 to 216 KB: a ring of kStages times X, B, C in slabs of 64 columns (wgmma.cuh), H, out.
//
// fp32: dt, l and the powers, S, Y, H, all sums. Rounded to Element: M, H and dt B as operands.

#include "barrier.cuh"
#include "ssd.cuh"
#include "wgmma.cuh"

namespace oxi {

constexpr int kTile = OXI_SSD_TILE;
// A block's part of it.
constexpr int kHeaddim = HEADDIM;
constexpr int kDstate = DSTATE;

constexpr int kWarpgroup = 128;
constexpr int kBlocks = kDstate == 256 ? 2 : 1;
constexpr int kStateGroups = kDstate / 64 / kBlocks;
constexpr int kOutputGroups = kDstate == 256 ? 1 : 2;
constexpr int kThreads = (kOutputGroups + kStateGroups + 1) * kWarpgroup;
// Registers of a thread at first, as each warpgroup has a warp on each of a multiprocessor's four parts; and later, found by
// trial.
constexpr int kRegisters = 65536 / kThreads / 8 * 8;
constexpr int kLoadRegisters = kDstate == 128 ? 32 : 64;
constexpr int kStateRegisters = kDstate == 128 ? 80 : kDstate == 256 ? 144 : 160;
constexpr int kOutputRegisters =
    (kThreads / kWarpgroup * kRegisters - kLoadRegisters - kStateGroups * kStateRegisters) / kOutputGroups;

constexpr int kSlabBytes = kTile * kSlabRowBytes;
constexpr int kSlabsOfB = kDstate / kSlabColumns;
// Of the state as (headdim, dstate).
constexpr int kStateSlabBytes = kHeaddim * kSlabRowBytes;
constexpr int kStages = kDstate == 256 ? 2 : 4;

struct Stage {
  unsigned char x[kSlabBytes];
  unsigned char B[kSlabsOfB * kSlabBytes];
  unsigned char C[kSlabsOfB * kSlabBytes];
};

// What dt and A make of a tile, and which one it is; of no tokens after the last one.
struct Vectors {
  // log2 of the decay from the tile's start, and the decay.
  float l[kTile];
  float entering[kTile];
  float dt[kTile];
  // What remains at the tile's end of what a token adds.
  float leaving[kTile];
  // Of a warp's 16 rows of M, left of its diagonal's 16 columns, where the power of a row and a column is of two factors,
  // neither above 1: the decay from the row before the warp's first one, and what remains there of what a column's token
  // adds; `columns` has those of warp 1, 2 and 3.
  float rows[kTile];
  float columns[(1 + 2 + 3) * 16];
  int begin;
  int size;
  int starts;
  int ends;
};

struct __align__(1024) Storage {
  Stage stages[kStages];
  unsigned char state[kOutputGroups][kSlabsOfB * kStateSlabBytes];
  unsigned char out[kOutputGroups][kSlabBytes];
  Vectors vectors[kStages];
  float D[kHeaddim];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier landed[kStages];
  Barrier state_full[kOutputGroups];
  Barrier state_empty[kOutputGroups];
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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    vectors.l[t] = l[i];
    vectors.entering[t] = fast_exp2(l[i]);
    vectors.dt[t] = dt[i];
    vectors.leaving[t] = dt[i] * fast_exp2(total - l[i]);
    float own_border = 0.0f;
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) {
      if (t < 16 * warp) {
        vectors.columns[warp * (warp - 1) / 2 * 16 + t] = dt[i] * fast_exp2(border[warp] - l[i]);
      } else {
        own_border = border[warp];
      }
    }
    vectors.rows[t] = fast_exp2(l[i] - own_border);
  }
  if (lane == 0) {
    vectors.begin = tile.begin;
    vectors.size = tile.size;
    vectors.starts = tile.starts;
    vectors.ends = tile.ends;
  }
}

// By one thread: a tile's x, B and C. `arrived` will have their bytes.
__device__ __forceinline__ void copy_tile(const OxiSsdMapped &p, const Walk &walk, int begin, Stage &stage, Barrier &arrived) {
  const int b = static_cast<int>(walk.b);
  arrived.expect((1 + (p.ssd.states_only ? 1 : 2) * kSlabsOfB) * kSlabBytes);
  copy_box(stage.x, p.x, walk.first, walk.head, begin, b, arrived);
#pragma unroll
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

// M of a warp's 16 rows, as an operand: of products over 16 columns each. D is added along the diagonal, in full: what an
// element of the operand does not hold of that sum is in `rest`, of the diagonal's 16 columns: of their upper left and
// lower right 8 x 8.
__device__ __forceinline__ void masked_products(const float (&S)[kTile / 2], const Vectors &vectors, int warp, int lane,
                                                float D, unsigned (&M)[kTile / 16][4], unsigned (&rest)[2]) {
  const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
  const float rows[2] = {vectors.rows[row], vectors.rows[row + 8]};
  const float *columns = vectors.columns + warp * (warp - 1) / 2 * 16 + column;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const float *own = S + 8 * k;
    if (k < warp) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 factor = *reinterpret_cast<const float2 *>(columns + 16 * k + 8 * half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float *pair = own + 4 * half + 2 * i;
          M[k][2 * half + i] = join(pair[0] * factor.x * rows[i], pair[1] * factor.y * rows[i], Element());
        }
      }
    } else if (k == warp) {
      const float2 *l = reinterpret_cast<const float2 *>(vectors.l + 16 * k + column);
      const float2 *dt = reinterpret_cast<const float2 *>(vectors.dt + 16 * k + column);
      // The quadrant of 8 columns from 8 half on and 8 rows from 8 i on.
      auto quadrant = [&](int half, int i, float (&values)[2]) {
        const float l_t = vectors.l[row + 8 * i];
        const float2 l_s = l[4 * half], dt_s = dt[4 * half];
        values[0] = own[4 * half + 2 * i] * (fast_exp2(l_t - l_s.x) * dt_s.x);
        values[1] = own[4 * half + 2 * i + 1] * (fast_exp2(l_t - l_s.y) * dt_s.y);
      };
      const int past = column - lane / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float values[2];
        quadrant(i, i, values);
        values[0] = (past <= 0 ? values[0] : 0.0f) + (past == 0 ? D : 0.0f);
        values[1] = (past < 0 ? values[1] : 0.0f) + (past == -1 ? D : 0.0f);
        const unsigned word = join(values[0], values[1], Element());
        M[k][3 * i] = word;
        rest[i] = join(past == 0 ? values[0] - low(word, Element()) : 0.0f,
                       past == -1 ? values[1] - high(word, Element()) : 0.0f, Element());
      }
      float values[2];
      quadrant(0, 1, values);
      M[k][1] = join(values[0], values[1], Element());
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
  const unsigned state = operand(shared_address(storage.state[group]), 0);
  unsigned char *staged = storage.out[group];
  // One value a head goes along with M, other ones are multiplied here.
  const bool D_of_head = p.D.data != nullptr && p.D.stride[1] == 0, D_of_element = p.D.data != nullptr && !D_of_head;
  unsigned state_parity = 0;
  Ring at;
  for (int i = 0; i < group; ++i) at.advance();
  for (;;) {
    storage.full[at.stage].wait(at.parity);
    const Vectors &vectors = storage.vectors[at.stage];
    const int begin = vectors.begin, size = vectors.size;
    if (size == 0) break;
    // Where a thread's elements are is computed anew for each tile: kept, it would take registers.
    int lane = threadIdx.x % kWarp;
    asm volatile("" : "+r"(lane));
    const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
    const Stage &stage = storage.stages[at.stage];
    const unsigned x = operand(shared_address(stage.x), kSlabBytes);
    const unsigned B = operand(shared_address(stage.B), 0), C = operand(shared_address(stage.C), 0);
    float S[kTile / 2], Y[kHeaddim / 2];
    products_begin();
    // Eight at a time, for operands to take few registers.
#pragma unroll 8
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kTile>::of_shared(S, C + along_k(k, kSlabBytes), B + along_k(k, kSlabBytes), k > 0);
    }
    end_of_products();
    storage.state_full[group].wait(state_parity);
#pragma unroll 8
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kHeaddim>::of_shared(Y, C + along_k(k, kSlabBytes), state + along_k(k, kStateSlabBytes), k > 0);
    }
    end_of_products();

    unsigned M[kTile / 16][4], rest[2];
    wait_for_products<1>();
    keep_in_place(S);
    masked_products(S, vectors, warp, lane, D_of_head ? storage.D[0] : 0.0f, M, rest);
    const float entering[2] = {vectors.entering[row], vectors.entering[row + 8]};
    wait_for_products<0>();
    keep_in_place(Y);
    storage.state_empty[group].arrive();
#pragma unroll
    for (int i = 0; i < kHeaddim / 2; ++i) Y[i] *= entering[i / 2 % 2];
    keep_in_place(Y);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kHeaddim>::of_registers(Y, M[k], x + across_k(k));
    }
    if (D_of_head) {
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        const unsigned operand[4] = {k == warp ? rest[0] : 0, 0, 0, k == warp ? rest[1] : 0};
        Product<kHeaddim>::of_registers(Y, operand, x + across_k(k));
      }
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(Y);

    if (__builtin_expect(D_of_element, 0)) {
#pragma unroll
      for (int j = 0; j < kHeaddim / 8; ++j) {
        const float2 D = *reinterpret_cast<const float2 *>(storage.D + 8 * j + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at_x = slab_offset(row + 8 * half, j) + 2 * column;
          const unsigned word = *reinterpret_cast<const unsigned *>(stage.x + at_x);
          float *y = Y + 4 * j + 2 * half;
          y[0] = fmaf(D.x, low(word, Element()), y[0]);
          y[1] = fmaf(D.y, high(word, Element()), y[1]);
        }
      }
    }
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
      const int block = lane / 8, chunk = j + block / 2;
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = join(Y[4 * j + 2 * i], Y[4 * j + 2 * i + 1], Element());
      store_blocks(shared_address(staged) + slab_offset(16 * warp + block % 2 * 8 + lane % 8, chunk), words);
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
    for (int i = 0; i < kOutputGroups; ++i) at.advance();
    state_parity ^= 1;
  }
  if (kStoresBoxes && threadIdx.x % kWarp == 0) wait_for_box_reads();
}

// A thread's part of the state, as (dstate, headdim): kBlocks times 64 rows.
struct State {
  float value[kBlocks][kHeaddim / 2];
  // Of the warpgroups with states, which one this is.
  int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) - kOutputGroups;

  // visit(element, where it is from the begin of this head's part of a row of `states`) of each. The barriers, of this
  // warpgroup's threads, keep the compiler from asking for all of a state's loads before it uses the first, and what is said
  // of the offset keeps it from computing all of them: either would take more registers than there are.
  template <typename Visit>
  __device__ __forceinline__ void each(const OxiTensor4 &states, Visit visit) {
    int thread = threadIdx.x % kWarpgroup;
    asm volatile("" : "+r"(thread));
    const int row = group * kBlocks * 64 + thread / kWarp * 16 + thread % kWarp / 4, column = 2 * (thread % 4);
    long long offset = column * states.stride[2] + row * states.stride[3];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < kHeaddim / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(value[block][4 * j + i], offset + i % 2 * states.stride[2] + i / 2 * 8 * states.stride[3]);
        }
        offset += 8 * states.stride[2];
        asm volatile("" : "+l"(offset));
        if (j % 2 == 1) wait_for_warpgroup();
      }
      offset += 64 * states.stride[3] - kHeaddim * states.stride[2];
    }
  }

  __device__ __forceinline__ void wait_for_warpgroup() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kWarpgroup) : "memory");
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kHeaddim / 2; ++i) value[block][i] = 0.0f;
    }
  }

  // Row `row` of the initial states; zeros if it is negative.
  __device__ __forceinline__ void load_initial(const OxiSsd &p, const Walk &walk, long long row) {
    if (row < 0) return clear();
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
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) keep_in_place(value[block]);
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

  // Where this thread's elements of what a segment adds are, in fours that are kStateGroups * kWarpgroup fours apart.
  __device__ static __forceinline__ float4 *in_segment(const OxiSsd &p, const Walk &walk, int part) {
    const long long index = walk.of_part(p, part) * p.slices + walk.slice;
    return reinterpret_cast<float4 *>(p.segment_states) + index * (kHeaddim * kDstate / 4) +
           (threadIdx.x - kOutputGroups * kWarpgroup);
  }

  __device__ __forceinline__ void store_segment(const OxiSsd &p, const Walk &walk) const {
    float4 *to = in_segment(p, walk, walk.segment);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kHeaddim / 2; i += 4) {
        const float *own = value[block] + i;
        to[(block * (kHeaddim / 8) + i / 4) * (kStateGroups * kWarpgroup)] = make_float4(own[0], own[1], own[2], own[3]);
      }
    }
  }

  // The state at the walk's begin: what the parts before it added, each decayed over those that follow.
  __device__ __forceinline__ void enter_segment(const OxiSsd &p, const Walk &walk) {
    clear();
#pragma unroll 1
    for (int part = 0; part < Walk::parts_before(walk.segment); ++part) {
      const float decay = p.segment_decays[walk.of_part(p, part)];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) keep_in_place(value[block]);
      const float4 *from = in_segment(p, walk, part);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kHeaddim / 2; i += 4) {
          const float4 added = from[(block * (kHeaddim / 8) + i / 4) * (kStateGroups * kWarpgroup)];
          const float words[4] = {added.x, added.y, added.z, added.w};
          // A state that another run begins after is not multiplied: it may not be finite.
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &own = value[block][i + e];
            own = decay == 0.0f ? words[e] : fmaf(decay, own, words[e]);
          }
          if (i % 8 == 4) wait_for_warpgroup();
        }
      }
    }
  }

  // For the outputs' products.
  __device__ __forceinline__ void publish(unsigned char *slabs) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    const int matrix = lane / 8;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const unsigned slab = shared_address(slabs) + (group * kBlocks + block) * kStateSlabBytes;
#pragma unroll
      for (int j = 0; j < kHeaddim / 8; j += 2) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = join(value[block][4 * j + 2 * i], value[block][4 * j + 2 * i + 1], Element());
        }
        store_transposed(slab + slab_offset(8 * (j + matrix / 2) + lane % 8, 2 * warp + matrix % 2), words);
      }
    }
  }
};

__device__ __forceinline__ void walk_states(const OxiSsd &p, const Walk &walk, Storage &storage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
  const int matrix = lane / 8;
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
  for (;;) {
    storage.full[at.stage].wait(at.parity);
    const Vectors &vectors = storage.vectors[at.stage];
    const int end = vectors.begin + vectors.size;
    if (vectors.size == 0) break;
    const Stage &stage = storage.stages[at.stage];
    if (vectors.starts) {
      state.load_initial(p, walk, entry_row(p, walk.b, vectors.begin));
      decay = 0.0f;
    }
    if (!p.states_only) {
      storage.state_empty[output.stage].wait(output.parity ^ 1);
      state.publish(storage.state[output.stage]);
      publish_to_products();
      storage.state_full[output.stage].arrive();
      output.advance();
    }

    const unsigned x = operand(shared_address(stage.x), kSlabBytes);
    const float over_tile = fast_exp2(vectors.l[kTile - 1]);
    decay *= over_tile;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      unsigned leaving[kTile / 16][4];
      const unsigned B = shared_address(stage.B) + (state.group * kBlocks + block) * kSlabBytes;
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        load_transposed(leaving[k], B + slab_offset(16 * k + matrix / 2 * 8 + lane % 8, 2 * warp + matrix % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int s = 16 * k + 8 * half + 2 * (lane % 4);
          const float2 factor = *reinterpret_cast<const float2 *>(vectors.leaving + s);
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            unsigned &word = leaving[k][i];
            word = join(low(word, Element()) * factor.x, high(word, Element()) * factor.y, Element());
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kHeaddim / 2; ++i) state.value[block][i] *= over_tile;
      keep_in_place(state.value[block]);
      products_begin();
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        Product<kHeaddim>::of_registers(state.value[block], leaving[k], x + across_k(k));
      }
      end_of_products();
      wait_for_products<0>();
      keep_in_place(state.value[block]);
    }
    const bool run_ends = vectors.ends;
    storage.empty[at.stage].arrive();
    if (run_ends && !p.states_only) state.store_ended(p, walk, end);
    at.advance();
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
      storage.state_empty[group].init(kWarpgroup);
    }
    publish_to_products();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(mapped.x);
    prefetch_map(mapped.B);
    prefetch_map(mapped.C);
    prefetch_map(mapped.out);
  }
  wait_for_earlier_work();
  if (p.D.data != nullptr && threadIdx.x < kHeaddim) {
    const long long offset = walk.head * p.D.stride[0] + (walk.first + threadIdx.x) * p.D.stride[1];
    storage.D[threadIdx.x] = load_either<Element>(p.D.data, offset, p.wide_D);
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
