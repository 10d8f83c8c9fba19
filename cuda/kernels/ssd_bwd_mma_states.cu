// The chunk scan, backward, along the states, on a warp's products: any headdim up to 256 and dstate up to DSTATE, tensors of
// any strides. Per head and tile (ssd_bwd.cuh), with exponents to base 2 and l = cumsum(dt A) within the tile:
//
//   forward      H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B       H, the state, is (headdim, dstate)
//   in reverse   G = 2^l[end] G' + dY^T diag(2^l) C                    G' is the gradient of the state that leaves, G of H
//
// A run begins with its initial state, and ends with the gradients of its last state, zeros where there are none. Stored,
// rounded to Element, are H before each tile and G' after each, in their slots; and the gradients of initial states.
//
// With states_only each block walks one segment of all but the last it has in its direction, from zero on, and stores what the
// segment adds and by how much a state decays over it; blocks of the next launch begin with what the segments before add.
//
// Grid: one block per StateWalkOf: a direction of a segment, for one head, or for a slice of up to 64 of its rows of the state.
// Warps: of the first eight, warp w has rows 16 (w / 2) on, and half w % 2 of the columns, in accumulators; all of them copy.
// The last one is the clock: it makes what dt and A make of the tile that comes next.
//
// A tile's tokens come in pieces, of 64, of fp32 of 32, kStages - 1 of them asked for ahead. One barrier before each piece
// publishes its copies and, with a tile's first, its factors; what it is asked for into was last read before that barrier, as
// were the factors that the clock makes new.
//
// Shared memory: Shared below, kStages (8 KB + 128 DSTATE) bytes and 1 KB: 49, 73, 81 KB for a DSTATE of 64, 128, 256.
//
// fp32: dt, l (of fp32 elements fp64), the powers, H, G, what segments add. Rounded to Element: the rows of X and dY times
// their factors, as operands, and what is stored.

#include "ssd_bwd_mma.cuh"

namespace oxi {

constexpr int kAcross = 2;
constexpr int kWarps = kSlice / kBlock * kAcross;
constexpr int kWorkers = kWarps * kWarp;
constexpr int kThreads = kWorkers + kWarp;
// Columns of the state that a warp has.
constexpr int kColumns = kDstate / kAcross;
// Tokens.
constexpr int kPiece = 128 / sizeof(Element);
constexpr int kPieces = kTile / kPiece;
constexpr int kStages = kDstate > 128 ? 2 : 3;

struct Stage {
  // Of X or dY, of B or C.
  Element rows[kPiece * kSlice];
  Element columns[kPiece * kDstate];
};

// What dt and A make of a tile, of two of them in turn.
struct alignas(8) Factors {
  float of_token[kTile];
  float decay;
};

struct alignas(1024) Shared {
  Stage stages[kStages];
  Factors factors[2];
  // Of the tile at hand and the next ones.
  Span spans[4];
  // Here for lack of registers.
  StateWalkOf walk;
};
static_assert(sizeof(Shared) <= 99 * 1024);

// The raw dt of the two tokens of a tile that a lane of the clock has.
struct RawDt {
  Either<Element> value[2];

  __device__ __forceinline__ RawDt(const OxiSsd &p, const StateWalkOf &walk, const Span &tile) {
    const long long line = walk.b * p.dt.stride[0] + walk.head * p.dt.stride[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * (threadIdx.x % kWarp) + i;
      if (t < tile.size) value[i] = Either<Element>(p.dt.data, line + (tile.begin + t) * p.dt.stride[1], p.wide_dt);
    }
  }
};

// By the clock. Gives the tile's decay.
__device__ __forceinline__ float make_factors(const OxiSsd &p, const Discretize &head, float A, bool reverse, int size,
                                             const RawDt &raw, Factors &factors) {
  float dt[2];
  Log l[2];
  sum_log_decays(p, head, A, size, [&](int i) -> float { return raw.value[i]; }, dt, l);
  const Log total = __shfl_sync(kAllLanes, l[1], kWarp - 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * (threadIdx.x % kWarp) + i;
    factors.of_token[t] = reverse ? fast_exp2(l[i]) : dt[i] * fast_exp2(total - l[i]);
  }
  const float decay = fast_exp2(total);
  if (threadIdx.x % kWarp == 0) factors.decay = decay;
  return decay;
}

// An element of a tensor whose dtype is known at run time, loaded as Either does. But both words are always set: otherwise they
// would keep registers from one tile to the next.
struct Raw {
  unsigned word;
  unsigned half;

  Raw() = default;
  __device__ __forceinline__ Raw(const void *data, int dtype, long long offset) {
    const bool wide = dtype == OXI_F32;
    const char *address = static_cast<const char *>(data) + offset * (wide ? 4 : 2);
    asm volatile(
        "{\n"
        ".reg .pred wide;\n"
        "setp.ne.s32 wide, %3, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "@wide ld.global.u32 %0, [%2];\n"
        "@!wide ld.global.u16 %1, [%2];\n"
        "}"
        : "=&r"(word), "=&r"(half)
        : "l"(address), "r"(static_cast<int>(wide)));
  }

  __device__ __forceinline__ float value(int dtype) const {
    if (dtype == OXI_F32) return __uint_as_float(word);
    return dtype == OXI_BF16 ? low(half, bf16()) : low(half, f16());
  }
};

// A warp's part of a state.
struct State {
  float value[kColumns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] = 0.0f;
    }
  }

  // Add a row of a tensor of states, of which there are `rows` from the walk's first one on.
  __device__ __forceinline__ void add(const OxiSsd &p, const StateWalkOf &walk, int rows, const OxiTensor4 &states, int dtype,
                                      long long index) {
    // Instead of elements that there are not the walk's first one, so that loads need no branches and are under way together.
    const long long first = index * states.stride[0] + walk.head * states.stride[1] + walk.first * states.stride[2];
    each_four(p, walk, rows, states, index, [&](float (&own)[4], const long long (&offset)[4], const bool (&inside)[4]) {
      Raw raw[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[i] = Raw(states.data, dtype, inside[i] ? offset[i] : first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (inside[i]) own[i] += raw[i].value(dtype);
      }
    });
  }

  __device__ __forceinline__ void store(const OxiSsd &p, const StateWalkOf &walk, int rows, const OxiTensor4 &states, int dtype,
                                        long long index) {
    each_four(p, walk, rows, states, index, [&](float (&own)[4], const long long (&offset)[4], const bool (&inside)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (inside[i]) store_scalar(states.data, dtype, offset[i], own[i]);
      }
    });
  }

  // To a state of the workspace, all of it.
  __device__ __forceinline__ void store_rounded(Element *state) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_row<kColumns>(state + (own_row() + 8 * half) * kDstate + first_column(), 1, kColumns, true, true, half, value);
    }
  }

  // What a segment adds, in an order of the threads'; the next four are all threads' fours apart.
  __device__ __forceinline__ void store_added(float *state) const {
    float4 *to = reinterpret_cast<float4 *>(state) + thread_now();
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      to[j * kWorkers] = make_float4(value[j][0], value[j][1], value[j][2], value[j][3]);
    }
  }
  __device__ __forceinline__ void pass_segment(const float *state, float decay) {
    const float4 *from = reinterpret_cast<const float4 *>(state) + thread_now();
    // A state that another run begins after may not be finite.
    if (decay == 0.0f) clear();
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float4 four = from[j * kWorkers];
      const float added[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] = fmaf(decay, value[j][i], added[i]);
    }
  }

  // Over a tile: it decays, and gets what pieces add.
  __device__ __forceinline__ void decay(float factor) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] *= factor;
    }
  }
  __device__ __forceinline__ void add(const Stage &stage, const float *factors) {
    const ColumnsOfA rows(stage.rows, kSlice);
    const RowsOfB columns(stage.columns, kDstate);
    const int row = first_row(), column = first_column();
    constexpr int kUnrolled = kNarrow ? kPiece / kBlock : 1;
#pragma unroll kUnrolled
    for (int k = 0; k < kPiece; k += kBlock) {
      auto a = rows.load_transposed(k, row);
      scale_columns(a, factors + k);
#pragma unroll
      for (int n = 0; n < kColumns; n += kBlock) {
        multiply(value + n / 8, a, columns.load_transposed(k, column + n));
        // For the compiler not to load all blocks first, into registers that there are not.
        if constexpr (!kNarrow) __syncwarp();
      }
    }
  }

 private:
  __device__ static __forceinline__ int first_row() { return thread_now() / kWarp / kAcross * kBlock; }
  __device__ static __forceinline__ int first_column() { return thread_now() / kWarp % kAcross * kColumns; }
  // Of its first accumulators.
  __device__ static __forceinline__ int own_row() { return first_row() + lane_now() / 4; }

  // Call visit(own, offset, inside) for the thread's elements, with their offsets in a row of a tensor and whether they exist.
  template <typename Visit>
  __device__ __forceinline__ void each_four(const OxiSsd &p, const StateWalkOf &walk, int rows, const OxiTensor4 &states,
                                            long long index, Visit visit) {
    const int row = own_row(), first = first_column(), column = first + lane_now() % 4 * 2;
    long long at = index * states.stride[0] + walk.head * states.stride[1] + (walk.first + row) * states.stride[2] +
                   column * states.stride[3];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      // Of all lanes the same; and without a branch all loads would be asked for first, for registers that there are not.
      if (first + 8 * j >= p.dstate) break;
      long long offset[4];
      bool inside[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        offset[i] = at + i / 2 * 8 * states.stride[2] + i % 2 * states.stride[3];
        inside[i] = row + i / 2 * 8 < rows && column + 8 * j + i % 2 < p.dstate;
      }
      visit(value[j], offset, inside);
      at = unknown(at + 8 * states.stride[3]);
    }
  }
};

// The gradients of the initial states of documents without tokens that end at a token.
__device__ __forceinline__ void store_untouched(const OxiSsdBackward &params, const StateWalkOf &walk, int rows, int end) {
  const OxiSsd &p = params.ssd;
  const OxiTensor4 &to = params.dinitial_states;
  for_documents_ending_at(p, walk.b, end, [&](long long final_row, long long initial_row) {
    if (initial_row < 0) return;
    // The first document's.
    const bool has_final = p.seqlen == 0 && p.final_states.data != nullptr && (p.cu_seqlens == nullptr || final_row == 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * p.dstate; i += kWorkers) {
      const int row = i / p.dstate, column = i % p.dstate;
      const auto offset = [&](const OxiTensor4 &states, long long index) {
        return index * states.stride[0] + walk.head * states.stride[1] + (walk.first + row) * states.stride[2] +
               column * states.stride[3];
      };
      float value = 0.0f;
      if (p.varlen_states.data != nullptr) {
        value = load_scalar(p.varlen_states.data, p.varlen_dtype, offset(p.varlen_states, final_row));
      }
      if (has_final) value += load_scalar(p.final_states.data, OXI_F32, offset(p.final_states, walk.b));
      const int dtype = params.wide_dinitial_states ? OXI_F32 : kDtype<Element>;
      store_scalar(to.data, dtype, offset(to, initial_row), value);
    }
  });
}

// The work of all threads but the clock's.
struct Worker {
  const OxiSsdBackward &params;
  const OxiSsd &p;
  const StateWalkOf &walk;

  __device__ __forceinline__ Worker(const OxiSsdBackward &params, const StateWalkOf &walk)
      : params(params), p(params.ssd), walk(walk) {}

  // Of the state, from the walk's first one on.
  __device__ __forceinline__ int rows() const { return min(p.slice, p.headdim - walk.first); }
  __device__ __forceinline__ bool stores_initial() const {
    return walk.reverse && !p.states_only && params.dinitial_states.data != nullptr;
  }

  __device__ __forceinline__ void ask(Stage &stage, const Span &tile, int piece) const {
    if (tile.size > 0) {
      const int begin = tile.begin + piece * kPiece, size = tile.size - piece * kPiece;
      const auto x = Lines::of(walk.reverse ? params.dy : p.x, walk.b, begin, walk.head, walk.first, rows());
      copy<kPiece, kSlice, kWorkers>(stage.rows, x, size, p.width > 1);
      const auto B = Lines::of(walk.reverse ? p.C : p.B, walk.b, begin, walk.group, 0, p.dstate);
      copy<kPiece, kDstate, kWorkers>(stage.columns, B, size, p.width > 1);
    }
    end_of_batch();
  }

  // What the segments before add.
  __device__ __forceinline__ void enter(State &state) const {
    for (int order = 0; order < walk.order; ++order) {
      const long long added = walk.added(params, order);
      state.pass_segment(p.segment_states + (added * p.slices + walk.slice) * kSlice * kDstate, p.segment_decays[added]);
    }
  }

  // Before a tile: begin a run, in the walk's direction, and store the state.
  __device__ __forceinline__ void begin_tile(State &state, const Span &tile) const {
    const int end = tile.begin + tile.size;
    if (!walk.reverse && tile.starts) {
      state.clear();
      const long long row = entry_row(p, walk.b, tile.begin);
      const int dtype = p.wide_initial_states ? OXI_F32 : kDtype<Element>;
      if (row >= 0) state.add(p, walk, rows(), p.initial_states, dtype, row);
    }
    if (walk.reverse && tile.ends) {
      state.clear();
      if (end == p.seqlen && p.final_states.data != nullptr) {
        state.add(p, walk, rows(), p.final_states, OXI_F32, walk.b);
      }
      const int document = p.varlen_states.data == nullptr ? -1 : document_to(p, end);
      if (document >= 0) {
        state.add(p, walk, rows(), p.varlen_states, p.varlen_dtype, final_row(p, walk.b, document));
      }
      if (stores_initial()) store_untouched(params, walk, rows(), end);
    }
    if (p.states_only) return;
    const int slot = walk.reverse ? exit_slot(params, tile) : entry_slot(p, walk.b, tile);
    if (slot < 0) return;
    constexpr int kBytes = kSlice * kDstate * sizeof(Element);
    state.store_rounded(
        reinterpret_cast<Element *>(in_slot(params, walk.reverse, walk.b, slot, walk.head, walk.slice, kBytes)));
  }

  // After a tile.
  __device__ __forceinline__ void end_tile(State &state, const Span &tile) const {
    if (!stores_initial() || !tile.starts) return;
    const long long row = entry_row(p, walk.b, tile.begin);
    const int dtype = params.wide_dinitial_states ? OXI_F32 : kDtype<Element>;
    if (row >= 0) state.store(p, walk, rows(), params.dinitial_states, dtype, row);
  }

  // After the walk's last tile: what the segment adds. In reverse that is nothing if a run begins with its first token.
  __device__ __forceinline__ void store_segment(State &state, const Span &last) const {
    if (walk.reverse && last.starts) state.clear();
    const long long added = walk.added(params, walk.order);
    state.store_added(p.segment_states + (added * p.slices + walk.slice) * kSlice * kDstate);
  }
};

__device__ __forceinline__ void compute(const OxiSsdBackward &params, Shared &shared) {
  const OxiSsd &p = params.ssd;
  const Worker worker(params, shared.walk);
  // A piece that many ahead goes to where the last one was.
  constexpr int kAhead = kStages - 1;
  State state;
  state.clear();
  synchronize_all<kThreads>();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) worker.ask(shared.stages[i], shared.spans[i / kPieces], i % kPieces);
  if (!p.states_only) worker.enter(state);
  if (worker.stores_initial() && shared.walk.begin == 0) store_untouched(params, shared.walk, worker.rows(), 0);
  // The walk's i-th piece, its tile and place there, which are found anew each time, for lack of registers.
  unsigned i = 0;
  const auto tile_of = [&](unsigned i) -> const Span & { return shared.spans[unknown(i) / kPieces % 4]; };
  const auto first_now = [&] { return static_cast<int>(unknown(i) % kPieces * kPiece); };
  const auto factors_now = [&]() -> const Factors & { return shared.factors[unknown(i) / kPieces % 2]; };
#pragma unroll 1
  for (; tile_of(i).size > 0; ++i) {
    wait_for_batches<kAhead - 1>();
    synchronize_all<kThreads>();
    worker.ask(shared.stages[(i + kAhead) % kStages], tile_of(i + kAhead), (i + kAhead) % kPieces);
    if (first_now() == 0) {
      worker.begin_tile(state, tile_of(i));
      state.decay(factors_now().decay);
    }
    if (const int first = first_now(); first < tile_of(i).size) {
      state.add(shared.stages[unknown(i) % kStages], factors_now().of_token + first);
    }
    if (first_now() + kPiece == kTile) worker.end_tile(state, tile_of(i));
  }
  if (p.states_only) worker.store_segment(state, tile_of(i - 1));
}

// By the clock: where tiles are, what dt and A make of them.
__device__ __forceinline__ void keep_time(const OxiSsdBackward &params, Shared &shared) {
  const OxiSsd &p = params.ssd;
  const StateWalkOf walk(params, kDstate);
  const Cuts cuts(params, walk.b);
  const Discretize head(p, walk.head);
  const float A = load_either<Element>(p.A.data, walk.head * p.A.step, p.A.dtype == OXI_F32);
  const bool is_first = threadIdx.x % kWarp == 0;
  // After the last tile a size of 0.
  int at = walk.reverse ? walk.end : walk.begin;
  const auto next = [&](unsigned i) {
    Span tile{};
    if (walk.reverse ? at > walk.begin : at < walk.end) tile = walk.reverse ? cuts.before(at) : cuts.from(at);
    if (tile.size > 0) at = walk.reverse ? tile.begin : tile.begin + tile.size;
    if (is_first) shared.spans[i % 4] = tile;
    return tile;
  };
  Span tile = next(0), following = next(1), last = next(2);
  RawDt raw(p, walk, tile);
  // Of a state that enters the walk, at its end.
  float total = 1.0f;
  const auto make = [&](unsigned i, const Span &tile) {
    const float decay = make_factors(p, head, A, walk.reverse, tile.size, raw, shared.factors[i % 2]);
    // A state that does not reach the end is not multiplied: the decay after it may not be finite.
    if (tile.starts || (walk.reverse && tile.ends)) total = 0.0f;
    if (total != 0.0f) total *= decay;
  };
  make(0, tile);
  raw = RawDt(p, walk, following);
  synchronize_all<kThreads>();
  for (unsigned i = 0; tile.size > 0; ++i) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      synchronize_all<kThreads>();
      if (piece > 0) continue;
      make(i + 1, following);
      raw = RawDt(p, walk, last);
      tile = following;
      following = last;
      last = next(i + 3);
    }
  }
  if (p.states_only && walk.slice == 0 && is_first) p.segment_decays[walk.added(params, walk.order)] = total;
}

// Blocks that share a multiprocessor at least.
constexpr int kMinBlocks = kDstate > 128 ? 1 : 2;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) KERNEL(const __grid_constant__ OxiSsdBackward p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared &shared = *reinterpret_cast<Shared *>(memory);
  wait_for_earlier_work();
  if (threadIdx.x < kWorkers) {
    if (threadIdx.x == 0) shared.walk = StateWalkOf(p, kDstate);
    compute(p, shared);
  } else {
    keep_time(p, shared);
  }
}

}  // namespace oxi
