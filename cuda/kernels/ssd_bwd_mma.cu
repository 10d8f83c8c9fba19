// The chunk scan, backward, within tiles, on a warp's products: any headdim up to 256 and dstate up to DSTATE, tensors of any
// strides. What walks along the states left (ssd_bwd_mma_states.cu) is H, the state that enters a tile, and G, the gradient of
// the one that leaves it. Per head, with exponents to base 2 and l = cumsum(dt A) within the tile:
//
//   S = C B^T        L[t, s] = 2^(l[t] - l[s]) for t >= s, else 0        u = 2^l        w = 2^(l[end] - l)
//   P = S o L        dM = dY X^T        J = dM o P        K = J dt
//   dCB = sum over heads of dM o L dt       dC = dCB B + sum over heads of u (dY H)
//   E = w (B G^T) + P^T dY                  dB = dCB^T C + sum over heads of dt w (X G)
//   dX = dt E + D dY                        dD = sum over t of dY X
//   r = u sum over n of C (dY H)            q = dt v        v = w sum over p of (B G^T) X
//   da[t] = sum over t' >= t > s of K[t', s] + sum over t' >= t of r[t'] + sum over s < t of q[s] + 2^l[end] <G, H>
//   ddt = (v + columns of J + A da) slope of dt         dA = sum of dt da         ddt_bias = sum of ddt
//
// None of da's terms is a difference of others, as sums over K's rows less those over its columns would be: where the decay is
// strong da is far smaller than those, and keeps its digits.
//
// A head of more than 64 rows of the state goes in slices, as if each were a head: the sums that da and ddt are made of are
// linear in them, and ddt is made after the last one.
//
// Grid: a block has the tiles that begin in a window of a sequence, one after another, for all heads of a group in their order:
// what it writes nobody else does, and its sums have a fixed order. Of 64 x 64 products warp w of eight has rows 16 (w / 2) on
// and columns 32 (w % 2) on; of those along dstate the same rows, and half w % 2 of the columns of each piece. dB, dC, dCB and
// S stay in its accumulators.
//
// H, G, B and C come in pieces of 64 columns, of fp32 of 32, of two matrices at once: H and C, then G and B; B and C where S is
// made and where dCB is multiplied. There is room for two such pairs. A barrier publishes one; what was read before it then
// makes room for the next one. x and dY are asked for a slice ahead, of fp32 when the slice before is done.
//
// Phases of a slice, one barrier before each:
//   1    dM, P, dCB, the sums of J and K. Two warps above the diagonal have time for others: one makes what dt and A make of
//        the next head, one finishes the slice before. Then the first pieces of H and C.
//   2    The first pieces of G and B; then the next pieces of H and C, of G and B, and so on, a barrier before each.
//   End  With what is published then: E, dX, dD, sums along rows, which the next barrier publishes.
//
// Rows past the tile's tokens are zeros in x, dY, B and C, and their dt is 0.
//
// Shared memory: Shared below, 86 KB, of fp32 94 KB.
//
// fp32: dt, l (of fp32 elements two floats, from fp64), the powers, S, dM, K, all sums and accumulators. Rounded to Element: P
// and dCB, as operands, and H and G.

#include "ssd_bwd_mma.cuh"

namespace oxi {

constexpr int kAcross = 2;
constexpr int kWarps = kTileBlocks * kAcross;
constexpr int kThreads = kWarps * kWarp;
// Columns of a 64 x 64 product that a warp has.
constexpr int kHalf = kTile / kAcross;
// Of a piece along dstate, and those of them that a warp has.
constexpr int kColumns = 128 / sizeof(Element);
constexpr int kOwn = kColumns / kAcross;
constexpr int kPieces = kDstate / kColumns;
// Pairs of x and dY.
constexpr int kInputs = kNarrow ? 2 : 1;
// Warps that have nothing of the first phase.
constexpr int kDiscretizer = 1;
constexpr int kFinisher = 3;

// What dt and A make of a tile's tokens. Past its size dt is 0 and l that of the last token.
struct Vectors {
  // log2 of the decay from the tile's start, of fp32 elements in two parts; the decay; that to the tile's end.
  float l[kTile];
  float l_rest[kTile];
  float entering[kTile];
  float leaving[kTile];
  float dt[kTile];
  // Of dt in what it is made of.
  float slope[kTile];
  float decay;
  float A;
};

// Sums over the slices of a head, by token. Each thread adds to the same all the time.
struct Sums {
  // By warps that share columns: of J; of K's rows from their half's first column up to before this one, from its row on.
  float columns_J[kTileBlocks][kTile];
  float before_K[kTileBlocks][kTile];
  // Of K's rows, their first halves.
  float rows_K[kTile];
  // r, and v.
  float entering[kAcross][kTile];
  float leaving[kAcross][kTile];
  // <G, H>, by warps.
  float states[kWarps];
};

struct alignas(1024) Shared {
  // x and dY.
  Element inputs[kInputs][2][kTile * kSlice];
  // Later dCB.
  Element P[kTile * kTile];
  Element pieces[2][2][kTile * kColumns];
  // Of this head, the one before, the next one.
  Vectors vectors[3];
  Sums sums[2];
  // By warps that share columns, of two slices in turn.
  float dD[2][kTileBlocks][kSlice];
  float D[kSlice];
  // Here for lack of registers.
  long long b;
  int window;
  int group;
  Span tile;
  int entry_slot;
  int exit_slot;
};
static_assert(sizeof(Shared) <= 99 * 1024);

// The thread's part of one tile.
struct Work {
  const OxiSsdBackward &params;
  const OxiSsd &p;
  Shared &shared;
  float S[kHalf / 8][4];
  float dCB[kHalf / 8][4];
  float dC[kPieces][kOwn / 8][4];
  float dB[kPieces][kOwn / 8][4];
  // Of this slice: B G^T, then E.
  float E[kHalf / 8][4];
  // Its rows' r.
  float entering[2];
  // Its part of <G, H>.
  float states;

  __device__ __forceinline__ Work(const OxiSsdBackward &params, Shared &shared)
      : params(params), p(params.ssd), shared(shared) {}

  __device__ __forceinline__ void run() {
    clear(S);
    clear(dCB);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      clear(dC[j]);
      clear(dB[j]);
    }
    ask_inputs(0);
    // So that the last pair is the second one.
    ask_both(0, kPieces % 2);
    end_of_batch();
    if (warp_now() == kDiscretizer) make_vectors(0);
    make_S();
    const int slices = p.heads_per_group * p.slices;
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      publish();
      ask_state(true, 0, i);
      if (kInputs > 1 && i + 1 < slices) ask_inputs(i + 1);
      end_of_batch();
      begin_slice(i);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (j > 0) {
          publish();
          ask_state(true, j, i);
          end_of_batch();
        }
        if (shared.entry_slot >= 0) enter(i, j);
        publish();
        if (shared.entry_slot >= 0 && shared.exit_slot >= 0) add_states();
        if (j + 1 < kPieces || i + 1 < slices) {
          ask_state(false, (j + 1) % kPieces, j + 1 < kPieces ? i : i + 1);
        } else {
          ask_both(0, 0);
        }
        end_of_batch();
        if (shared.exit_slot >= 0) leave(i, j);
      }
      end_slice(i);
      if (kInputs == 1 && i + 1 < slices) {
        __syncthreads();
        ask_inputs(i + 1);
        end_of_batch();
      }
    }
    // Until then P is read.
    __syncthreads();
    if (warp_now() == kFinisher) finish_slice(slices - 1);
    store_dCB();
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      publish();
      if (j + 1 < kPieces) ask_both(j + 1, (j + 1) % 2);
      end_of_batch();
      multiply_dCB(j);
      store(params.dC, j, dC[j]);
      store(params.dB, j, dB[j]);
    }
  }

 private:
  template <int N>
  __device__ static __forceinline__ void clear(float (&values)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] = 0.0f;
    }
  }

  __device__ static __forceinline__ int warp_now() { return thread_now() / kWarp; }
  // The warp's first row of every product; which part of its columns it has; the row of the thread's first accumulators.
  __device__ static __forceinline__ int row_now() { return warp_now() / kAcross * kBlock; }
  __device__ static __forceinline__ int part_now() { return warp_now() % kAcross; }
  __device__ static __forceinline__ int own_row() { return row_now() + lane_now() / 4; }

  __device__ __forceinline__ int head_of(int i) const { return shared.group * p.heads_per_group + i / p.slices; }
  __device__ __forceinline__ Vectors &vectors_of(int i) const { return shared.vectors[i / p.slices % 3]; }
  __device__ __forceinline__ Sums &sums_of(int i) const { return shared.sums[i / p.slices % 2]; }
  __device__ __forceinline__ const Element *x(int i) const { return shared.inputs[i % kInputs][0]; }
  __device__ __forceinline__ const Element *dY(int i) const { return shared.inputs[i % kInputs][1]; }

  // What this thread asked for, and what all did before.
  __device__ static __forceinline__ void publish() {
    wait_for_batches<0>();
    __syncthreads();
  }

  __device__ __forceinline__ Lines lines_of(const OxiTensor4 &tensor, int i) const {
    const int first = i % p.slices * p.slice_step;
    return Lines::of(tensor, shared.b, shared.tile.begin, head_of(i), first, min(p.slice, p.headdim - first));
  }

  __device__ __forceinline__ void ask_inputs(int i) {
    Element(&to)[2][kTile * kSlice] = shared.inputs[i % kInputs];
    copy<kTile, kSlice, kThreads>(to[0], lines_of(p.x, i), shared.tile.size, p.width > 1);
    copy<kTile, kSlice, kThreads>(to[1], lines_of(params.dy, i), shared.tile.size, p.width > 1);
  }
  // A piece of B or C.
  __device__ __forceinline__ void ask_piece(Element *to, const OxiTensor4 &tensor, int j) {
    const int first = j * kColumns;
    const Lines lines = Lines::of(tensor, shared.b, shared.tile.begin, shared.group, first, p.dstate - first);
    copy<kTile, kColumns, kThreads>(to, lines, shared.tile.size, p.width > 1);
  }
  __device__ __forceinline__ void ask_both(int j, int pair) {
    ask_piece(shared.pieces[pair][0], p.B, j);
    ask_piece(shared.pieces[pair][1], p.C, j);
  }
  // Of H and C, or G and B, if there is a state.
  __device__ __forceinline__ void ask_state(bool of_gradients, int j, int i) {
    const int slot = of_gradients ? shared.exit_slot : shared.entry_slot;
    if (slot < 0) return;
    constexpr int kBytes = kSlice * kDstate * sizeof(Element);
    unsigned char *from = in_slot(params, of_gradients, shared.b, slot, head_of(i), i % p.slices, kBytes);
    Element *state = reinterpret_cast<Element *>(from) + j * kColumns;
    copy<kSlice, kColumns, kThreads>(shared.pieces[of_gradients][0], Lines{state, kDstate, 1, kColumns}, kSlice, true);
    ask_piece(shared.pieces[of_gradients][1], of_gradients ? p.B : p.C, j);
  }

  // By a warp, for a head.
  __device__ __forceinline__ void make_vectors(int i) {
    const int h = head_of(i), lane = lane_now(), size = shared.tile.size;
    const long long line = shared.b * p.dt.stride[0] + shared.tile.begin * p.dt.stride[1] + h * p.dt.stride[2];
    float raw[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      if (t < size) raw[j] = load_either<Element>(p.dt.data, line + t * p.dt.stride[1], p.wide_dt);
    }
    const Discretize head(p, h);
    const float A = load_either<Element>(p.A.data, h * p.A.step, p.A.dtype == OXI_F32);
    float dt[2];
    Log l[2];
    sum_log_decays(p, head, A, size, [&](int j) { return raw[j]; }, dt, l);
    const Log total = __shfl_sync(kAllLanes, l[1], kWarp - 1);
    Vectors &vectors = vectors_of(i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      const float upper = l[j];
      vectors.l[t] = upper;
      if constexpr (!kNarrow) vectors.l_rest[t] = l[j] - upper;
      vectors.entering[t] = fast_exp2(upper);
      vectors.leaving[t] = fast_exp2(total - l[j]);
      vectors.dt[t] = dt[j];
      const float biased = raw[j] + head.bias;
      const float unclamped = p.dt_softplus ? softplus(biased) : biased;
      const float slope = p.dt_softplus && !(biased > 20.0f) ? sigmoid(biased) : 1.0f;
      vectors.slope[t] = unclamped < p.dt_min || unclamped > p.dt_max ? 0.0f : slope;
    }
    if (lane == 0) {
      vectors.decay = fast_exp2(total);
      vectors.A = A;
    }
  }

  // Blocks up to the diagonal.
  __device__ __forceinline__ void make_S() {
#pragma unroll 1
    for (int j = 0; j < kPieces; ++j) {
      publish();
      if (j + 1 < kPieces) {
        ask_both(j + 1, (j + 1 + kPieces) % 2);
      } else {
        ask_state(false, 0, 0);
      }
      end_of_batch();
      const Element(&pair)[2][kTile * kColumns] = shared.pieces[(j + kPieces) % 2];
      const RowsOfA C(pair[1], kColumns);
      const ColumnsOfB B(pair[0], kColumns);
      const int row = row_now(), column = part_now() * kHalf;
#pragma unroll
      for (int k = 0; k < kColumns; k += kBlock) {
        const auto a = C.load(row, k);
#pragma unroll
        for (int n = 0; n < kHalf; n += kBlock) {
          if (column + n <= row) multiply(S + n / 8, a, B.load(column + n, k));
        }
      }
    }
  }

  __device__ static __forceinline__ void put(float &sum, float value, bool first) { sum = first ? value : sum + value; }

  // The first phase.
  __device__ __forceinline__ void begin_slice(int i) {
    const int row = row_now(), part = part_now(), column = part * kHalf, lane = lane_now();
    const bool first_slice = i % p.slices == 0;
    if (warp_now() == kDiscretizer && first_slice && i / p.slices + 1 < p.heads_per_group) make_vectors(i + p.slices);
    if (warp_now() == kFinisher) {
      if (i > 0) finish_slice(i - 1);
      load_D(i);
    }

    float dM[kHalf / 8][4];
    clear(dM);
    {
      const RowsOfA a_source(dY(i), kSlice);
      const ColumnsOfB b_source(x(i), kSlice);
      if (column <= row) {
#pragma unroll
        for (int k = 0; k < kSlice; k += kBlock) {
          const auto a = a_source.load(row, k);
#pragma unroll
          for (int n = 0; n < kHalf; n += kBlock) {
            if (column + n <= row) multiply(dM + n / 8, a, b_source.load(column + n, k));
          }
        }
      }
    }

    const Vectors &vectors = vectors_of(i);
    Sums &sums = sums_of(i);
    const int t = row + lane / 4;
    // Of J, then of K's rows before a column.
    float columns[kHalf / 2] = {};
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
      if (column + n / 2 * kBlock > row) continue;
      const int s = column + 8 * n + lane % 4 * 2;
      const float2 l = *reinterpret_cast<const float2 *>(vectors.l + s);
      const float2 dt = *reinterpret_cast<const float2 *>(vectors.dt + s);
      float2 l_rest = make_float2(0.0f, 0.0f);
      if constexpr (!kNarrow) l_rest = *reinterpret_cast<const float2 *>(vectors.l_rest + s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = t + 8 * half;
        float P[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float dt_s = j == 0 ? dt.x : dt.y;
          float difference = vectors.l[own] - (j == 0 ? l.x : l.y);
          if constexpr (!kNarrow) difference += vectors.l_rest[own] - (j == 0 ? l_rest.x : l_rest.y);
          // Above the diagonal nothing is multiplied, since it may not be finite.
          const bool inside = own >= s + j;
          const float L = fast_exp2(inside ? difference : 0.0f);
          float &product = dM[n][2 * half + j];
          P[j] = inside ? S[n][2 * half + j] * L : 0.0f;
          if (inside) dCB[n][2 * half + j] += product * (L * dt_s);
          const float J = inside ? product * P[j] : 0.0f;
          columns[2 * n + j] += J;
          // K from here on.
          product = J * dt_s;
        }
        store_pair(shared.P, own, s, kTile, P[0], P[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = t + 8 * half;
      float before = 0.0f;
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
        // Over four lanes.
        const float first = dM[n][2 * half];
        float sum = first + dM[n][2 * half + 1];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_up_sync(kAllLanes, sum, step);
          if (lane % 4 >= step) sum += other;
        }
        const float of_others = __shfl_up_sync(kAllLanes, sum, 1);
        const float own_before = lane % 4 == 0 ? before : before + of_others;
        const int s = column + 8 * n + lane % 4 * 2;
        if (own >= s) columns[kHalf / 4 + 2 * n] += own_before;
        if (own > s) columns[kHalf / 4 + 2 * n + 1] += own_before + first;
        before += __shfl_sync(kAllLanes, sum, lane | 3);
      }
      if (part == 0 && lane % 4 == 0) put(sums.rows_K[own], before, first_slice);
    }
    sum_over_rows(columns);
    float(&to)[kTile] = (lane < kWarp / 2 ? sums.columns_J : sums.before_K)[row / kBlock];
#pragma unroll
    for (int j = 0; j < 2; ++j) put(to[column + lane / 4 % 4 * 8 + lane % 4 * 2 + j], columns[j], first_slice);

    clear(E);
    entering[0] = entering[1] = 0.0f;
    states = 0.0f;
  }

  // Over a warp's rows, of which lanes 4 apart have their own. The first N / 8 are then the sums of those from N / 8 (lane / 4)
  // on.
  template <int N>
  __device__ static __forceinline__ void sum_over_rows(float (&values)[N]) {
    const int lane = lane_now();
#pragma unroll
    for (int parts = 2; parts <= 8; parts *= 2) {
      const int step = kWarp / parts;
      const bool second = lane & step;
#pragma unroll
      for (int i = 0; i < N / parts; ++i) {
        const float own[2] = {values[i], values[i + N / parts]};
        values[i] = (second ? own[1] : own[0]) + __shfl_xor_sync(kAllLanes, second ? own[0] : own[1], step);
      }
    }
  }

  // Rows of x or dY times a piece of G or H.
  __device__ static __forceinline__ void multiply_state(float (&product)[kOwn / 8][4], const Element *input,
                                                        const Element *piece) {
    const RowsOfA a_source(input, kSlice);
    const RowsOfB b_source(piece, kColumns);
    const int row = row_now(), column = part_now() * kOwn;
    clear(product);
#pragma unroll
    for (int k = 0; k < kSlice; k += kBlock) {
      const auto a = a_source.load(row, k);
#pragma unroll
      for (int n = 0; n < kOwn; n += kBlock) multiply(product + n / 8, a, b_source.load_transposed(k, column + n));
    }
  }

  // What a piece of H makes.
  __device__ __forceinline__ void enter(int i, int j) {
    const Element *H = shared.pieces[0][0], *C = shared.pieces[0][1];
    float product[kOwn / 8][4];
    multiply_state(product, dY(i), H);
    const int row = own_row(), column = part_now() * kOwn + lane_now() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float u = vectors_of(i).entering[row + 8 * half];
#pragma unroll
      for (int n = 0; n < kOwn / 8; ++n) {
        const float2 pair = load_pair(C, row + 8 * half, column + 8 * n, kColumns);
        const float x = product[n][2 * half], y = product[n][2 * half + 1];
        entering[half] = fmaf(pair.x, x, fmaf(pair.y, y, entering[half]));
        dC[j][n][2 * half] = fmaf(u, x, dC[j][n][2 * half]);
        dC[j][n][2 * half + 1] = fmaf(u, y, dC[j][n][2 * half + 1]);
      }
    }
  }

  // What a piece of G makes.
  __device__ __forceinline__ void leave(int i, int j) {
    const Element *G = shared.pieces[1][0], *B = shared.pieces[1][1];
    {
      float product[kOwn / 8][4];
      multiply_state(product, x(i), G);
      const int row = own_row();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = vectors_of(i).dt[row + 8 * half] * vectors_of(i).leaving[row + 8 * half];
#pragma unroll
        for (int n = 0; n < kOwn / 8; ++n) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            dB[j][n][2 * half + k] = fmaf(factor, product[n][2 * half + k], dB[j][n][2 * half + k]);
          }
        }
      }
    }
    const RowsOfA a_source(B, kColumns);
    const ColumnsOfB b_source(G, kColumns);
    const int row = row_now(), column = part_now() * kHalf;
#pragma unroll
    for (int k = 0; k < kColumns; k += kBlock) {
      const auto a = a_source.load(row, k);
#pragma unroll
      for (int n = 0; n < kHalf; n += kBlock) multiply(E + n / 8, a, b_source.load(column + n, k));
    }
  }

  // What a piece of G and H make. Of H a thread reads what it asked for: what it asks for next lies there, and nowhere else.
  __device__ __forceinline__ void add_states() {
    constexpr int kPiece = kVector<Element>;
    const int thread = thread_now();
#pragma unroll
    for (int first = 0; first < kSlice * kColumns; first += kThreads * kPiece) {
      const int at = first + thread * kPiece, offset = place(at / kColumns, at % kColumns, kColumns);
      using Own = Pack<Element, kPiece>;
      const Own H = *reinterpret_cast<const Own *>(shared.pieces[0][0] + offset);
      const Own G = *reinterpret_cast<const Own *>(shared.pieces[1][0] + offset);
#pragma unroll
      for (int n = 0; n < kPiece; ++n) states = fmaf(G[n], H[n], states);
    }
  }

  // The last phase.
  __device__ __forceinline__ void end_slice(int i) {
    const Vectors &vectors = vectors_of(i);
    Sums &sums = sums_of(i);
    const bool first_slice = i % p.slices == 0;
    const int row = own_row(), part = part_now(), column = part * kHalf + lane_now() % 4 * 2;
    // v.
    float leaving[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float w = vectors.leaving[row + 8 * half];
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
        const float2 own = load_pair(x(i), row + 8 * half, column + 8 * n, kSlice);
        float *pair = E[n] + 2 * half;
        pair[0] *= w;
        pair[1] *= w;
        leaving[half] = fmaf(pair[0], own.x, fmaf(pair[1], own.y, leaving[half]));
      }
    }
    warp_sum(leaving, 4);
    warp_sum(entering, 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (lane_now() % 4 == 0) {
        put(sums.leaving[part][row + 8 * half], leaving[half], first_slice);
        put(sums.entering[part][row + 8 * half], vectors.entering[row + 8 * half] * entering[half], first_slice);
      }
    }
    float total[1] = {states};
    warp_sum(total);
    if (lane_now() == 0) put(sums.states[warp_now()], total[0], first_slice);

    {
      const ColumnsOfA a_source(shared.P, kTile);
      const RowsOfB b_source(dY(i), kSlice);
      const int first = row_now();
#pragma unroll
      for (int k = 0; k < kTile; k += kBlock) {
        if (k < first) continue;
        const auto a = a_source.load_transposed(k, first);
#pragma unroll
        for (int n = 0; n < kHalf; n += kBlock) multiply(E + n / 8, a, b_source.load_transposed(k, part_now() * kHalf + n));
      }
    }

    // E becomes dX.
    float dD[kHalf / 4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float dt = vectors.dt[row + 8 * half];
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
        const float2 own_x = load_pair(x(i), row + 8 * half, column + 8 * n, kSlice);
        const float2 own_dY = load_pair(dY(i), row + 8 * half, column + 8 * n, kSlice);
        const float2 D = *reinterpret_cast<const float2 *>(shared.D + column + 8 * n);
        dD[2 * n] = fmaf(own_dY.x, own_x.x, dD[2 * n]);
        dD[2 * n + 1] = fmaf(own_dY.y, own_x.y, dD[2 * n + 1]);
        float *pair = E[n] + 2 * half;
        pair[0] = fmaf(D.x, own_dY.x, dt * pair[0]);
        pair[1] = fmaf(D.y, own_dY.y, dt * pair[1]);
      }
    }
    if (params.dD_columns > 0) {
      sum_over_rows(dD);
      const int lane = lane_now();
      shared.dD[i % 2][row_now() / kBlock][part * kHalf + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2] = dD[0];
    }
    const Lines dx = lines_of(params.dx, i);
    const int first = part * kHalf;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = row + 8 * half;
      store_row<kHalf>(dx.data + t * dx.stride + first * dx.step, dx.step, dx.columns - first, dx.dense(),
                       t < shared.tile.size, half, E);
    }
  }

  // By the finisher: D of a slice, zeros where there is none.
  __device__ __forceinline__ void load_D(int i) {
    const int first = i % p.slices * p.slice_step, columns = min(p.slice, p.headdim - first);
#pragma unroll
    for (int column = lane_now(); column < kSlice; column += kWarp) {
      const long long offset = head_of(i) * p.D.stride[0] + (first + column) * p.D.stride[1];
      const bool inside = p.D.data != nullptr && column < columns;
      shared.D[column] = inside ? load_either<Element>(p.D.data, offset, p.wide_D) : 0.0f;
    }
  }

  // By the finisher: what the sums of a slice make, and after a head's last slice those of the head.
  __device__ __forceinline__ void finish_slice(int i) {
    const int slice = i % p.slices, lane = lane_now(), h = head_of(i);
    float *partials = partials_of(params, shared);
    if (params.dD_columns > 0) {
      const int first = slice * p.slice_step, columns = min(p.slice, p.headdim - first);
      float *dD = partials + 2 * p.nheads + static_cast<long long>(h) * params.dD_columns;
      float total[1] = {};
#pragma unroll
      for (int column = lane; column < kSlice; column += kWarp) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kTileBlocks; ++k) sum += shared.dD[i % 2][k][column];
        total[0] += sum;
        if (params.dD_columns > 1 && column < columns) dD[first + column] += sum;
      }
      warp_sum(total);
      if (params.dD_columns == 1 && lane == 0) dD[0] += total[0];
    }
    if (slice + 1 == p.slices) finish_head(i, partials);
  }

  __device__ __forceinline__ void finish_head(int i, float *partials) {
    const Vectors &vectors = vectors_of(i);
    const Sums &sums = sums_of(i);
    const int lane = lane_now(), h = head_of(i);
    // r and K's rows, which are summed up to the tile's end, and q, from its start; sum E X.
    float r[2], rows[2], q[2], E_X[2], before_K[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      float columns = 0.0f;
      before_K[j] = 0.0f;
#pragma unroll
      for (int k = 0; k < kTileBlocks; ++k) {
        columns += sums.columns_J[k][t];
        before_K[j] += sums.before_K[k][t];
      }
      const float leaving = sums.leaving[0][t] + sums.leaving[1][t];
      const bool inside = t < shared.tile.size;
      r[j] = inside ? sums.entering[0][t] + sums.entering[1][t] : 0.0f;
      rows[j] = inside ? sums.rows_K[t] : 0.0f;
      q[j] = inside ? vectors.dt[t] * leaving : 0.0f;
      E_X[j] = leaving + columns;
    }
    // Of the lane's tokens and those after, or before; then without its own, which taking away again would round.
    float r_after = r[0] + r[1], rows_after = rows[0] + rows[1], q_before = q[0] + q[1];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const float other_r = __shfl_down_sync(kAllLanes, r_after, step);
      const float other_rows = __shfl_down_sync(kAllLanes, rows_after, step);
      const float other_q = __shfl_up_sync(kAllLanes, q_before, step);
      if (lane + step < kWarp) r_after += other_r, rows_after += other_rows;
      if (lane >= step) q_before += other_q;
    }
    r_after = __shfl_down_sync(kAllLanes, r_after, 1);
    rows_after = __shfl_down_sync(kAllLanes, rows_after, 1);
    q_before = __shfl_up_sync(kAllLanes, q_before, 1);
    if (lane == kWarp - 1) r_after = rows_after = 0.0f;
    if (lane == 0) q_before = 0.0f;
    float states = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) states += sums.states[k];
    states *= vectors.decay;
    r[1] += r_after;
    r[0] += r[1];
    rows[1] += rows_after;
    rows[0] += rows[1];
    float da[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      da[j] = before_K[j] + r[j] + (j == 0 ? q_before : q_before + q[0]) + states;
      if (2 * lane >= kHalf) da[j] += rows[j];
    }

    float of_head[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * lane + j;
      if (t >= shared.tile.size) continue;
      const float ddt = (E_X[j] + vectors.A * da[j]) * vectors.slope[t];
      of_head[0] += vectors.dt[t] * da[j];
      of_head[1] += ddt;
      const OxiTensor3 &to = params.ddt;
      const long long offset = shared.b * to.stride[0] + (shared.tile.begin + t) * to.stride[1] + h * to.stride[2];
      store_scalar(to.data, params.wide_ddt ? OXI_F32 : kDtype<Element>, offset, ddt);
    }
    warp_sum(of_head);
    if (lane == 0) {
      partials[h] += of_head[0];
      partials[p.nheads + h] += of_head[1];
    }
  }

  // The blocks of dCB up to the diagonal, in place of P.
  __device__ __forceinline__ void store_dCB() {
    const int row = row_now(), column = part_now() * kHalf, lane = lane_now();
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
      if (column + n / 2 * kBlock > row) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_pair(shared.P, row + lane / 4 + 8 * half, column + 8 * n + lane % 4 * 2, kTile, dCB[n][2 * half],
                   dCB[n][2 * half + 1]);
      }
    }
  }

  // What dCB and a piece of B and C make.
  __device__ __forceinline__ void multiply_dCB(int j) {
    const Element *B = shared.pieces[j % 2][0], *C = shared.pieces[j % 2][1];
    const int row = row_now(), column = part_now() * kOwn;
    const RowsOfA own_rows(shared.P, kTile);
    const ColumnsOfA own_columns(shared.P, kTile);
    const RowsOfB of_B(B, kColumns), of_C(C, kColumns);
#pragma unroll
    for (int k = 0; k < kTile; k += kBlock) {
      if (k <= row) {
        const auto a = own_rows.load(row, k);
#pragma unroll
        for (int n = 0; n < kOwn; n += kBlock) multiply(dC[j] + n / 8, a, of_B.load_transposed(k, column + n));
      }
      if (k >= row) {
        const auto a = own_columns.load_transposed(k, row);
#pragma unroll
        for (int n = 0; n < kOwn; n += kBlock) multiply(dB[j] + n / 8, a, of_C.load_transposed(k, column + n));
      }
    }
  }

  // A piece of dB or dC.
  __device__ __forceinline__ void store(const OxiTensor4 &tensor, int j, const float (&value)[kOwn / 8][4]) const {
    const Lines lines = Lines::of(tensor, shared.b, shared.tile.begin, shared.group, 0, p.dstate);
    const int first = j * kColumns + part_now() * kOwn;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = own_row() + 8 * half;
      store_row<kOwn>(lines.data + t * lines.stride + first * lines.step, lines.step, lines.columns - first, lines.dense(),
                      t < shared.tile.size, half, value);
    }
  }

 public:
  // The block's row of partials.
  __device__ static __forceinline__ float *partials_of(const OxiSsdBackward &params, const Shared &shared) {
    const long long columns = static_cast<long long>(params.ssd.nheads) * (2 + params.dD_columns);
    return params.partials + (shared.b * params.windows + shared.window) * columns;
  }
};

// By the finisher: nothing yet in its columns of partials.
__device__ __forceinline__ void clear_partials(const OxiSsdBackward &params, const Shared &shared) {
  const OxiSsd &p = params.ssd;
  const int lane = lane_now();
  float *partials = Work::partials_of(params, shared);
#pragma unroll 1
  for (int h = shared.group * p.heads_per_group; h < (shared.group + 1) * p.heads_per_group; ++h) {
    if (lane == 0) partials[h] = partials[p.nheads + h] = 0.0f;
    float *dD = partials + 2 * p.nheads + static_cast<long long>(h) * params.dD_columns;
    // By those that add to them: lane i % 32 of a slice's.
    for (int i = lane; i < params.dD_columns; i += kWarp) dD[i] = 0.0f;
  }
}

// One block a multiprocessor is enough: unless it is said, the compiler takes registers for two, and spills.
extern "C" __global__ void __launch_bounds__(kThreads, 1) KERNEL(const __grid_constant__ OxiSsdBackward params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared &shared = *reinterpret_cast<Shared *>(memory);
  wait_for_earlier_work();
  if (threadIdx.x == 0) {
    const int window = blockIdx.x / params.ngroups % params.windows;
    shared.b = blockIdx.x / params.ngroups / params.windows;
    shared.window = window;
    shared.group = blockIdx.x % params.ngroups;
    shared.tile = Span{Cuts(params, shared.b).first_in(window), 0, 0, 0};
  }
  __syncthreads();
  if (threadIdx.x / kWarp == kFinisher) clear_partials(params, shared);
  Work work(params, shared);
#pragma unroll 1
  while (true) {
    if (threadIdx.x == 0) {
      const int begin = shared.tile.begin + shared.tile.size;
      const bool is_own = begin < min(params.ssd.seqlen, (shared.window + 1) * OXI_SSD_TILE);
      const Span tile = is_own ? Cuts(params, shared.b).from(begin) : Span{};
      shared.tile = tile;
      if (is_own) {
        shared.entry_slot = entry_slot(params.ssd, shared.b, tile);
        shared.exit_slot = exit_slot(params, tile);
      }
    }
    __syncthreads();
    if (shared.tile.size == 0) break;
    work.run();
    __syncthreads();
  }
}

}  // namespace oxi
