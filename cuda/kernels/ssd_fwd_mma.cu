// The chunk scan, forward, on a warp's products: bf16 and fp16 from 8.0 on, any headdim up to 256 and dstate up to DSTATE,
// tensors of any strides. Equals oxiscan.reference.mamba_chunk_scan_combined.
//
// Per head, in tiles of up to 64 tokens of one run, with H (headdim, dstate) the state that enters the tile, exponents to
// base 2, l = cumsum(dt A) within the tile:
//
//   S = C B^T      M[t, s] = S[t, s] 2^(l[t] - l[s]) dt[s] for t >= s, else 0
//   Y = M X + 2^l[t] (C H^T) + D X      out = Y silu(z)
//   H' = 2^l[end] H + X^T diag(dt 2^(l[end] - l)) B
//
// With dout, of a backward: dz = dout Y silu'(z) and out = dout silu(z), the gradient of Y.
//
// Grid: a block has a segment of a sequence, for one head, or for a slice of it (up to 64 rows of the state).
// Warps: the last one is the clock: it finds where tiles end and makes what dt and A make of them, a tile ahead of the
// others. Of those four warp w has rows 16 w to 16 w + 15 of the state in accumulators, and the same columns of Y, zeros
// where the slice has fewer; the blocks of M are dealt out to all four, and all copy.
//
// Phases of a tile, one barrier before each:
//   1  Of all threads. Published: the tile's copies, its vectors, how long the next tile is, whose copies are asked for now
//      if there are two stages. M, C H^T, H'.
//   2  Without the clock. Published: M; and of this tile only x is needed from here on, so that with one stage the next
//      tile's copies are asked for now. M X, the rest of Y, out; states of documents that end here.
//
// States pass from and to tensors by way of M's memory, with barriers more where a run begins or a document ends.
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros, and
// the state at a run's start is assigned.
//
// Shared memory: Shared below, 27 KB, and after it `stages` times B and C, of 8 to 32 KB each.
//
// fp32: dt, l and the powers, S, Y, H, all sums. Rounded to Element: M, H and X^T diag(...) as operands.

#include "async_copy.cuh"
#include "mma.cuh"
#include "ssd.cuh"
#include "ssd_mma.cuh"

namespace oxi {

constexpr int kTile = OXI_SSD_TILE;
constexpr int kDstate = DSTATE;
constexpr int kBlock = 16;
// Blocks along a tile, along dstate.
constexpr int kTileBlocks = kTile / kBlock;
constexpr int kStateBlocks = kDstate / kBlock;
// Rows of the state that a block has at most, and pitch of x.
constexpr int kSlice = 64;
constexpr int kWarps = kSlice / kBlock;
constexpr int kThreads = (kWarps + 1) * kWarp;

// Fours of a block's rows of the state, in segment_states.
constexpr int kSegmentFours = kSlice * kDstate / 4;

// What dt and A make of a tile's tokens. Past its size dt is 0 and l that of the last token.
struct Vectors {
  // log2 of the decay from the tile's start, and the decay.
  float l[kTile];
  float entering[kTile];
  float dt[kTile];
  // What remains at the tile's end of what a token adds.
  float leaving[kTile];
};

// Where a tensor has this sequence and head, or group, token after token, and whether pairs of a token's elements move in one
// access.
struct Line {
  Element *data;
  int dense;
};

// x and vectors of two tiles, spans of them and the next one.
struct alignas(1024) Shared {
  union {
    Element M[kTile * kTile];
    // Of each warp, part of its rows of the state on the way from or to a tensor.
    float states[kWarps][kBlock * kWarp];
  };
  Element x[2][kTile * kSlice];
  Vectors vectors[2];
  float D[kSlice];
  Span spans[4];
  // Here for lack of registers.
  Walk walk;
  // Rows of the state, columns of x, that the slice has.
  int columns;
  Line x_line;
  Line B_line;
  Line C_line;
  Line z_line;
  Line out_line;
  Line dout_line;
  Line dz_line;
};

// Of a tile, rows padded to DSTATE.
struct Stage {
  Element B[kTile * kDstate];
  Element C[kTile * kDstate];
};
static_assert(sizeof(Shared) + (kDstate > 128 ? 1 : 2) * sizeof(Stage) <= 99 * 1024);

// Of all but the clock's.
__device__ __forceinline__ void synchronize_rows() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads - kWarp) : "memory");
}

// The first row of the state that the thread's warp has, in the slice, and column of x.
__device__ __forceinline__ int first_now() { return thread_now() / kWarp * kBlock; }

// The clock's part of a walk.
__device__ __forceinline__ void keep_time(const OxiSsd &p, Shared &shared) {
  const Walk walk(p);
  const int lane = threadIdx.x % kWarp;
  const Discretize head(p, walk.head);
  const long long line = walk.b * p.dt.stride[0] + walk.head * p.dt.stride[2];
  Tiles tile(p, walk);
  bool more;
  const auto next = [&](int i) {
    more = tile.next();
    if (lane == 0) shared.spans[i % 4] = tile;
  };
  // Of the state that enters the walk, at its end.
  float decay = 1.0f;
  next(0);
  synchronize_all<kThreads>();
  for (int i = 0; more; ++i) {
    const int size = tile.size;
    // Under way while the next tile is found. A lane has two tokens.
    Either<Element> raw[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      if (t < size) raw[j] = Either<Element>(p.dt.data, line + (tile.begin + t) * p.dt.stride[1], p.wide_dt);
    }
    if (tile.starts) decay = 0.0f;
    next(i + 1);

    float dt[2], l[2];
    sum_decays(p, head, size, [&](int j) -> float { return raw[j]; }, dt, l);
    const float total = __shfl_sync(kAllLanes, l[1], kWarp - 1);
    Vectors &vectors = shared.vectors[i % 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      vectors.l[t] = l[j];
      vectors.entering[t] = fast_exp2(l[j]);
      vectors.dt[t] = dt[j];
      vectors.leaving[t] = dt[j] * fast_exp2(total - l[j]);
    }
    // A state that does not reach the end is not multiplied: the decay after it may not be finite.
    if (decay != 0.0f) decay *= fast_exp2(total);
    synchronize_all<kThreads>();
  }
  if (p.states_only && walk.slice == 0 && lane == 0) p.segment_decays[walk.of_part(p, walk.segment)] = decay;
}

__device__ __forceinline__ Line line_of(const OxiTensor4 &tensor, long long b, int head_or_group, int first, int columns) {
  Element *data = static_cast<Element *>(tensor.data) + b * tensor.stride[0] + head_or_group * tensor.stride[2] +
                  first * tensor.stride[3];
  const bool aligned = reinterpret_cast<unsigned long long>(data) % (2 * sizeof(Element)) == 0;
  return Line{data, tensor.stride[3] == 1 && tensor.stride[1] % 2 == 0 && columns % 2 == 0 && aligned};
}

// What is the same for all tiles, by all threads but the clock's.
__device__ __forceinline__ void prepare(const OxiSsd &p, Shared &shared) {
  const Walk walk(p);
  const int columns = min(p.slice, p.headdim - walk.first);
  const int i = threadIdx.x;
  if (i == 0) {
    shared.walk = walk;
    shared.columns = columns;
    shared.x_line = line_of(p.x, walk.b, walk.head, walk.first, columns);
    shared.B_line = line_of(p.B, walk.b, walk.group, 0, p.dstate);
    shared.C_line = line_of(p.C, walk.b, walk.group, 0, p.dstate);
    shared.z_line = line_of(p.z, walk.b, walk.head, walk.first, columns);
    shared.out_line = line_of(p.out, walk.b, walk.head, walk.first, columns);
    shared.dout_line = line_of(p.dout, walk.b, walk.head, walk.first, columns);
    shared.dz_line = line_of(p.dz, walk.b, walk.head, walk.first, columns);
  }
  if (p.D.data != nullptr && i < kSlice) {
    const long long offset = walk.head * p.D.stride[0] + (walk.first + i) * p.D.stride[1];
    shared.D[i] = i < columns ? load_either<Element>(p.D.data, offset, p.wide_D) : 0.0f;
  }
}

// Ask for a tile of a tensor, by all threads but the clock's, kWidth elements at once; with a width of 1 the copy is done
// then. Zeros past the tile's tokens and past `columns`.
template <int kWidth, int kPitch>
__device__ __forceinline__ void copy(Element *to, const OxiTensor4 &tensor, const Line &line, const Span &tile, int columns) {
  // Stores are of 16 bytes even with a width of 1.
  constexpr int kPiece = kWidth == 1 ? kVector<Element> : kWidth;
  constexpr int kRows = (kThreads - kWarp) * kPiece / kPitch;
  static_assert(kTile % kRows == 0);
  const int thread = thread_now();
  const int first = thread * kPiece / kPitch, column = thread * kPiece % kPitch;
  const long long stride = unknown(tensor.stride[1]);
  const Element *from = unknown(line.data) + (tile.begin + first) * stride;
  constexpr int kUnrolled = kWidth == 8 ? kTile / kRows : 1;
#pragma unroll kUnrolled
  for (int row = first; row < first + kTile; row += kRows) {
    Element *target = to + swizzled(row, column, kPitch);
    if constexpr (kWidth == 1) {
      const int end = row < tile.size ? columns : 0;
      *reinterpret_cast<Pack<Element, kPiece> *>(target) = load_pack<kPiece>(from, tensor.stride[3], column, end, false);
    } else {
      copy_async<kPiece * sizeof(Element)>(target, from + column, row < tile.size && column < columns);
    }
    from = unknown(from + kRows * stride);
  }
}

// The walk's i-th tile, its B and C.
__device__ __forceinline__ const Span &span_of(const Shared &shared, unsigned i) { return shared.spans[unknown(i) % 4]; }
__device__ __forceinline__ Stage &stage_of(const OxiSsd &p, Shared &shared, unsigned i) {
  Stage *stages = reinterpret_cast<Stage *>(&shared + 1);
  return stages[p.stages > 1 ? unknown(i) % 2 : 0];
}

template <int kWidth>
__device__ __forceinline__ void ask_in(const OxiSsd &p, Shared &shared, unsigned i) {
  const Span tile = span_of(shared, i);
  Stage &stage = stage_of(p, shared, i);
  copy<kWidth, kSlice>(shared.x[i % 2], p.x, shared.x_line, tile, shared.columns);
  copy<kWidth, kDstate>(stage.B, p.B, shared.B_line, tile, p.dstate);
  if (!p.states_only) copy<kWidth, kDstate>(stage.C, p.C, shared.C_line, tile, p.dstate);
}

// Ask for x, B and C of the i-th tile, if there is one.
__device__ __forceinline__ void ask(const OxiSsd &p, Shared &shared, unsigned i) {
  if (span_of(shared, i).size == 0) return;
  if (p.width == 8) {
    ask_in<8>(p, shared, i);
  } else if (p.width == 4) {
    ask_in<4>(p, shared, i);
  } else if (p.width == 2) {
    ask_in<2>(p, shared, i);
  } else {
    ask_in<1>(p, shared, i);
  }
  end_of_batch();
}

// S and M, of tokens up to the last one: the blocks up to the diagonal, dealt out to the warps but the clock.
__device__ __forceinline__ void make_M(const OxiSsd &p, Shared &shared, unsigned i) {
  const Vectors &vectors = shared.vectors[i % 2];
  const Stage &stage = stage_of(p, shared, i);
  const Blocks C(stage.C, kDstate), B(stage.B, kDstate, Order::ALONG);
  const int lane = lane_now();
  const int rows = (span_of(shared, i).size + kBlock - 1) / kBlock;
#pragma unroll 1
  for (int block = thread_now() / kWarp; block < rows * (rows + 1) / 2; block += kWarps) {
    const int row = (block >= 1) + (block >= 3) + (block >= 6);
    const int column = block - row * (row + 1) / 2;
    // Even and odd blocks apart: more products that do not wait for one another.
    float S[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < kStateBlocks; ++k) {
      const Block a = C.load(row * kBlock, k * kBlock), b = B.load(column * kBlock, k * kBlock);
      mma(S[k % 2][0], a.word, b.word[0], b.word[1], Element());
      mma(S[k % 2][1], a.word, b.word[2], b.word[3], Element());
    }
    const int t = row * kBlock + lane / 4;
    const float l[2] = {vectors.l[t], vectors.l[t + 8]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int s = column * kBlock + n * 8 + lane % 4 * 2;
      const float2 l_s = *reinterpret_cast<const float2 *>(vectors.l + s);
      const float2 dt = *reinterpret_cast<const float2 *>(vectors.dt + s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto element = [&](int j, float l_s, float dt) {
          const float sum = S[0][n][2 * half + j] + S[1][n][2 * half + j];
          return t + half * 8 >= s + j ? sum * (fast_exp2(l[half] - l_s) * dt) : 0.0f;
        };
        const unsigned pair = join(element(0, l_s.x, dt.x), element(1, l_s.y, dt.y), Element());
        *reinterpret_cast<unsigned *>(shared.M + swizzled(t + half * 8, s, kTile)) = pair;
      }
    }
  }
}

// A warp's rows of the state. Pairs of 8 x 8 elements as accumulators have them, along dstate: rounded they are B of a
// product that sums along dstate.
struct State {
  float value[2 * kStateBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < 2 * kStateBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] = 0.0f;
    }
  }

  // What a run that begins at token t has before it. Tensors of states are reached by way of shared.states.
  __device__ __forceinline__ void enter_run(const OxiSsd &p, const Walk &walk, Shared &shared, int t) {
    const long long index = entry_row(p, walk.b, t);
    clear();
    if (index < 0) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      __syncwarp();
      if (p.wide_initial_states) {
        load_part<float>(p, walk, shared, index, part);
      } else {
        load_part<Element>(p, walk, shared, index, part);
      }
      __syncwarp();
      each_pair(shared, part, [](float *own, float2 &pair) { own[0] = pair.x, own[1] = pair.y; });
    }
  }

  // To row `index` of a tensor.
  __device__ __forceinline__ void store(const OxiSsd &p, const Walk &walk, Shared &shared, const OxiTensor4 &states,
                                        int dtype, long long index) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      __syncwarp();
      each_pair(shared, part, [](float *own, float2 &pair) { pair = make_float2(own[0], own[1]); });
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < kBlock; ++i) {
        each_row<1>(p, walk, shared, states, index, part, i, [&](int, long long offset) {
          store_scalar(states.data, dtype, offset, place(shared, i, lane_now()));
        });
      }
    }
  }

  // Where there are no tokens: row `initial` of the initial states, zeros if it is negative.
  __device__ __forceinline__ void store_initial(const OxiSsd &p, const Walk &walk, const Shared &shared,
                                                const OxiTensor4 &states, int dtype, long long index,
                                                long long initial) const {
    const OxiTensor4 &source = p.initial_states;
    const long long from = walk.state_offset(source, initial);
#pragma unroll 1
    for (int i = 0; i < kParts * kBlock; ++i) {
      const int part = i / kBlock, row = i % kBlock;
      each_row<1>(p, walk, shared, states, index, part, row, [&](int, long long offset) {
        const long long at = (first_now() + row) * source.stride[2] + (part * kWarp + lane_now()) * source.stride[3];
        store_scalar(states.data, dtype, offset, initial < 0 ? 0.0f : load_initial(p, from + at));
      });
    }
  }

  // The states of the documents that end at a token.
  __device__ __forceinline__ void store_ended(const OxiSsd &p, const Walk &walk, Shared &shared, int end) {
    for_documents_ending_at(p, walk.b, end, [&](long long index, long long initial) {
      if (initial == -2) {
        store(p, walk, shared, p.varlen_states, p.varlen_dtype, index);
      } else {
        store_initial(p, walk, shared, p.varlen_states, p.varlen_dtype, index, initial);
      }
    });
  }

  // That after the last token there is.
  __device__ __forceinline__ void store_final(const OxiSsd &p, const Walk &walk, Shared &shared) {
    if (p.seqlen > 0) {
      store(p, walk, shared, p.final_states, OXI_F32, walk.b);
    } else {
      const long long initial = document_row(p, walk.b, 0);
      store_initial(p, walk, shared, p.final_states, OXI_F32, walk.b, initial);
    }
  }

  // Where the thread's elements are in what a block of a launch for segments' states stores, in fours a warp apart.
  __device__ __forceinline__ float4 *in_segment(const OxiSsd &p, long long block) const {
    const unsigned thread = thread_now();
    return reinterpret_cast<float4 *>(p.segment_states) +
           block * kSegmentFours + thread / kWarp * (kSegmentFours / kWarps) + thread % kWarp;
  }

  __device__ __forceinline__ void store_segment(const OxiSsd &p) const {
    float4 *to = in_segment(p, blockIdx.x);
#pragma unroll
    for (int j = 0; j < 2 * kStateBlocks; ++j) {
      to[j * kWarp] = make_float4(value[j][0], value[j][1], value[j][2], value[j][3]);
    }
  }

  // From zero on: what the segments before the walk's add, each decayed over those that follow.
  __device__ __forceinline__ void enter_segment(const OxiSsd &p, const Walk &walk) {
    const long long first = walk.of_part(p, 0);
    const float *decays = p.segment_decays + first;
    const float4 *from = in_segment(p, first * p.slices + walk.slice);
    const long long next = static_cast<long long>(p.nheads) * p.slices * kSegmentFours;
    for (int part = 0; part < Walk::parts_before(walk.segment); ++part) {
      const float decay = *decays;
      // A state that another run begins after may not be finite.
      if (decay == 0.0f) clear();
#pragma unroll
      for (int j = 0; j < 2 * kStateBlocks; ++j) {
        const float4 four = from[j * kWarp];
        const float added[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) value[j][i] = fmaf(decay, value[j][i], added[i]);
      }
      decays += p.nheads;
      from += next;
    }
  }

  // Over the i-th tile.
  __device__ __forceinline__ void advance(const OxiSsd &p, Shared &shared, unsigned i) {
    const Vectors &vectors = shared.vectors[i % 2];
    const Blocks x(shared.x[i % 2], kSlice, Order::ALONG), B(stage_of(p, shared, i).B, kDstate);
    const int column = thread_now() % 4 * 2, first = first_now();
    const float decay = vectors.entering[kTile - 1];
#pragma unroll
    for (int j = 0; j < 2 * kStateBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] *= decay;
    }
#pragma unroll
    for (int k = 0; k < kTileBlocks; ++k) {
      const Block own = x.load_transposed(k * kBlock, first);
      const float *leaving = vectors.leaving + k * kBlock + column;
      const float2 factors[2] = {*reinterpret_cast<const float2 *>(leaving),
                                 *reinterpret_cast<const float2 *>(leaving + 8)};
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned pair = own.word[i];
        a[i] = join(low(pair, Element()) * factors[i / 2].x, high(pair, Element()) * factors[i / 2].y, Element());
      }
#pragma unroll
      for (int n = 0; n < kStateBlocks; ++n) {
        const Block b = B.load_transposed(k * kBlock, n * kBlock);
        mma(value[2 * n], a, b.word[0], b.word[1], Element());
        mma(value[2 * n + 1], a, b.word[2], b.word[3], Element());
      }
    }
  }

 private:
  // Columns that pass through shared.states at once are 32, a lane each, of the warp's 16 rows.
  static constexpr int kParts = kDstate / kWarp;

  // Permuted, so that pairs of a thread in 4 rows and 4 columns are in different banks.
  __device__ __forceinline__ static float &place(Shared &shared, int i, int column) {
    return shared.states[thread_now() / kWarp][i * kWarp + (column ^ (i % 4 * 8))];
  }

  // Of a row of the initial states to shared.states, zeros where there is nothing.
  template <typename T>
  __device__ __forceinline__ void load_part(const OxiSsd &p, const Walk &walk, Shared &shared, long long index,
                                            int part) const {
    // Rows whose loads are under way together.
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int begin = 0; begin < kBlock; begin += kAtOnce) {
      float values[kAtOnce] = {};
      each_row<kAtOnce>(p, walk, shared, p.initial_states, index, part, begin, [&](int i, long long offset) {
        values[i] = to_float(static_cast<const T *>(p.initial_states.data)[offset]);
      });
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) place(shared, begin + i, lane_now()) = values[i];
    }
  }

  // Call visit(i, offset) for those of the warp's rows begin + i, up to kCount, that there are, if the lane's column exists,
  // with its offset in the tensor.
  template <int kCount, typename Visit>
  __device__ __forceinline__ void each_row(const OxiSsd &p, const Walk &walk, const Shared &shared, const OxiTensor4 &states,
                                           long long index, int part, int begin, Visit visit) const {
    const int n = part * kWarp + lane_now(), first = first_now() + begin;
    long long offset = walk.state_offset(states, index) + first * states.stride[2] + n * states.stride[3];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < shared.columns && n < p.dstate) visit(i, offset);
      offset += states.stride[2];
    }
  }

  // Call visit(own, pair) for pairs of the thread's elements and their places.
  template <typename Visit>
  __device__ __forceinline__ void each_pair(Shared &shared, int part, Visit visit) {
    const int lane = lane_now();
#pragma unroll
    for (int j = 0; j < kWarp / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &at = place(shared, lane / 4 + half * 8, j * 8 + lane % 4 * 2);
        visit(value[part * (kWarp / 8) + j] + 2 * half, reinterpret_cast<float2 &>(at));
      }
    }
  }
};

// Have z of a tile brought to the L2 cache, before there are registers for it.
__device__ __forceinline__ void prefetch_gates(const OxiSsd &p, const Shared &shared, unsigned i) {
  const Span &tile = span_of(shared, i);
  const int t = threadIdx.x;
  if (p.z.data != nullptr && t < tile.size) prefetch_early(shared.z_line.data + (tile.begin + t) * p.z.stride[1]);
}

// A warp's columns of Y, for all tokens of a tile: a thread has, of each block, column 8 n + 2 (lane % 4) + {0, 1} in row
// lane / 4 + 8 half at [block][n][2 half + {0, 1}].
struct Outputs {
  using Pair = Pack<Element, 2>;
  using Pairs = Pair[kTileBlocks][2][2];

  float value[kTileBlocks][2][4];

  // Before each tile.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTileBlocks * 8; ++i) value[i / 8][i / 4 % 2][i % 4] = 0.0f;
  }

  // What the state that enters the tile makes of C.
  __device__ __forceinline__ void begin(const OxiSsd &p, Shared &shared, unsigned i, const State &state) {
    const Vectors &vectors = shared.vectors[i % 2];
    const Blocks C(stage_of(p, shared, i).C, kDstate);
#pragma unroll
    for (int k = 0; k < kStateBlocks; ++k) {
      unsigned b[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          b[n][i] = join(state.value[2 * k + i][2 * n], state.value[2 * k + i][2 * n + 1], Element());
        }
      }
#pragma unroll
      for (int block = 0; block < kTileBlocks; ++block) {
        const Block a = C.load(block * kBlock, k * kBlock);
        mma(value[block][0], a.word, b[0][0], b[0][1], Element());
        mma(value[block][1], a.word, b[1][0], b[1][1], Element());
      }
    }
    const int row = lane_now() / 4;
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float entering = vectors.entering[block * kBlock + row + half * 8];
#pragma unroll
        for (int i = 0; i < 4; ++i) value[block][i / 2][2 * half + i % 2] *= entering;
      }
    }
  }

  // The rest of Y, out.
  __device__ __forceinline__ void finish(const OxiSsd &p, const Shared &shared, unsigned i) {
    const Span &tile = span_of(shared, i);
    const Blocks M(shared.M, kTile), x(shared.x[i % 2], kSlice);
    Pairs gates = {};
    if (p.z.data != nullptr) {
      load(p.z, shared.z_line, shared, tile, [&](const Pair &pair, int block, int half, int n) { gates[block][half][n] = pair; });
    }
    add(M, x);
    store(p, shared, tile, x, gates);
  }

 private:
  // What the tile's own tokens add.
  __device__ __forceinline__ void add(const Blocks &M, const Blocks &x) {
    const int first = first_now();
#pragma unroll
    for (int k = 0; k < kTileBlocks; ++k) {
      const Block b = x.load_transposed(k * kBlock, first);
#pragma unroll
      for (int block = k; block < kTileBlocks; ++block) {
        const Block a = M.load(block * kBlock, k * kBlock);
        mma(value[block][0], a.word, b.word[0], b.word[1], Element());
        mma(value[block][1], a.word, b.word[2], b.word[3], Element());
      }
    }
  }

  // Call visit(pair, block, half, n) with the thread's pairs of a tensor.
  template <typename Visit>
  __device__ __forceinline__ void load(const OxiTensor4 &tensor, const Line &line, const Shared &shared, const Span &tile,
                                       Visit visit) const {
    if (line.dense) {
      each_pair(tensor, line, shared, tile, [&](const Element *pair, int, int block, int half, int n) {
        visit(*reinterpret_cast<const Pair *>(pair), block, half, n);
      });
    } else {
      each_pair(tensor, line, shared, tile, [&](const Element *pair, int count, int block, int half, int n) {
        visit(load_pack<2>(pair, tensor.stride[3], 0, count, false), block, half, n);
      });
    }
  }
  __device__ __forceinline__ void store(const OxiTensor4 &tensor, const Line &line, const Shared &shared, const Span &tile,
                                        const Pairs &pairs) const {
    if (line.dense) {
      each_pair(tensor, line, shared, tile, [&](Element *pair, int, int block, int half, int n) {
        *reinterpret_cast<Pair *>(pair) = pairs[block][half][n];
      });
    } else {
      each_pair(tensor, line, shared, tile, [&](Element *pair, int count, int block, int half, int n) {
        store_pack(pair, tensor.stride[3], 0, count, false, pairs[block][half][n]);
      });
    }
  }

  // dz, and the gradient of Y in its place.
  __device__ __forceinline__ void backpropagate_gates(const OxiSsd &p, const Shared &shared, const Span &tile, Pairs &gates) {
    const auto visit = [&](const Pair &gradients, int block, int half, int n) {
      Pair &pair = gates[block][half][n];
      float dgates[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float &y = value[block][n][2 * half + j];
        dgates[j] = gradients[j] * y * silu_grad(pair[j]);
        y = gradients[j] * silu(pair[j]);
      }
      pair = Pair::of(dgates);
    };
    load(p.dout, shared.dout_line, shared, tile, visit);
    store(p.dz, shared.dz_line, shared, tile, gates);
  }

  __device__ __forceinline__ void store(const OxiSsd &p, const Shared &shared, const Span &tile, const Blocks &x, Pairs &gates) {
    const int column = thread_now() % 4 * 2, first = first_now();
    Pairs results;
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block) {
      if (p.D.data != nullptr) {
        const Block own = x.load(block * kBlock, first);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 D = *reinterpret_cast<const float2 *>(shared.D + first + i / 2 * 8 + column);
          float *y = value[block][i / 2] + i % 2 * 2;
          y[0] = fmaf(D.x, low(own.word[i], Element()), y[0]);
          y[1] = fmaf(D.y, high(own.word[i], Element()), y[1]);
        }
      }
    }
    const bool backward = p.dout.data != nullptr;
    if (backward) backpropagate_gates(p, shared, tile, gates);
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, n = i % 2;
        float y[2] = {value[block][n][2 * half], value[block][n][2 * half + 1]};
        if (p.z.data != nullptr && !backward) {
          y[0] *= silu(gates[block][half][n][0]);
          y[1] *= silu(gates[block][half][n][1]);
        }
        results[block][half][n] = Pair::of(y);
      }
    }
    store(p.out, shared.out_line, shared, tile, results);
  }

  // Call visit(pair, count, block, half, n) for the thread's pairs, of whose elements the first `count` exist.
  template <typename Visit>
  __device__ __forceinline__ void each_pair(const OxiTensor4 &tensor, const Line &line, const Shared &shared,
                                            const Span &tile, Visit visit) const {
    const long long stride = unknown(tensor.stride[1]);
    const int lane = lane_now();
    const int column = first_now() + lane % 4 * 2;
    const int count = shared.columns - column;
    Element *pair = unknown(line.data) + (tile.begin + lane / 4) * stride + column * tensor.stride[3];
#pragma unroll
    for (int i = 0; i < 2 * kTileBlocks; ++i) {
      if (lane / 4 + i * 8 < tile.size) {
        if (count > 0) visit(pair, count, i / 2, i % 2, 0);
        if (count > 8) visit(pair + 8 * tensor.stride[3], count - 8, i / 2, i % 2, 1);
      }
      pair = unknown(pair + 8 * stride);
    }
  }
};

// Everything else of a walk.
__device__ __forceinline__ void compute(const OxiSsd &p, Shared &shared) {
  const Walk &walk = shared.walk;
  prepare(p, shared);
  const bool has_outputs = !p.states_only;
  const bool stores_ended = has_outputs && p.varlen_states.data != nullptr;
  State state;
  state.clear();
  Outputs outputs;
  synchronize_all<kThreads>();
  ask(p, shared, 0);
  if (has_outputs) state.enter_segment(p, walk);
  if (stores_ended && walk.begin == 0) state.store_ended(p, walk, shared, 0);
  for (unsigned i = 0; span_of(shared, i).size > 0; ++i) {
    wait_for_batches<0>();
    synchronize_all<kThreads>();
    if (p.stages > 1) ask(p, shared, i + 1);
    if (span_of(shared, i).starts) {
      state.enter_run(p, walk, shared, span_of(shared, i).begin);
      // What M is made over.
      synchronize_rows();
    }
    if (has_outputs) {
      prefetch_gates(p, shared, i);
      make_M(p, shared, i);
    }
    outputs.clear();
    if (has_outputs) outputs.begin(p, shared, i, state);
    state.advance(p, shared, i);
    synchronize_rows();
    if (p.stages == 1) ask(p, shared, i + 1);
    if (has_outputs) outputs.finish(p, shared, i);
    if (stores_ended && span_of(shared, i).ends) {
      // What the state passes over.
      synchronize_rows();
      state.store_ended(p, walk, shared, span_of(shared, i).begin + span_of(shared, i).size);
    }
  }
  synchronize_rows();
  if (p.states_only) {
    state.store_segment(p);
  } else if (walk.end == p.seqlen && p.final_states.data != nullptr) {
    state.store_final(p, walk, shared);
  }
}

// Blocks that share a multiprocessor at least. On 10.x registers would spill a little, on 12.x there is shared memory for one.
constexpr int kMinBlocks = kDstate > 128 || __CUDA_ARCH__ >= 1000 ? 1 : 2;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) KERNEL(const __grid_constant__ OxiSsd p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared &shared = *reinterpret_cast<Shared *>(memory);
  wait_for_earlier_work();
  if (threadIdx.x < kThreads - kWarp) {
    compute(p, shared);
  } else {
    keep_time(p, shared);
  }
}

}  // namespace oxi
