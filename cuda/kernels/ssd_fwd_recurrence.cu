// The chunk scan's forward in fp32, token by token on the CUDA cores. Equals oxiscan.reference.mamba_chunk_scan_combined.
//
// For each token, with dt = clamp(softplus(dt + dt_bias)) (softplus if asked for), a state (headdim, dstate) a head:
//
//   state = exp(dt A) state + (dt x) B          out = (state C + D x) silu(z)
//
// With dout, of a backward: dz = dout y silu'(z), where y is what z multiplies, and out = dout silu(z), the gradient of y.
//
// A run begins with a document's initial state or zeros; final states are what the sequence's last token leaves, varlen
// states what a document's does.
//
// Of a long sequence in segments a first launch (states_only) walks the parts of all segments but the last one, each from
// zeros: it stores the state at the part's end, added, and decay, exp(sum of dt A) over the part or 0 if a run begins in it.
// A segment of the second launch begins with what comes of state = decay state + added over the parts before it.
//
// Grid: a block owns a slice of headdim of a head, and a segment of a sequence or a part of one (Walk); a warp kWarpRows rows
// of the state. 8 lanes share kRows rows: lane l has elements 32 i + 4 l + {0, 1, 2, 3} of each, in registers through all
// tokens, so that what it loads of B and C, by 16 bytes and without bank conflicts, serves kRows rows. Elements past dstate
// and rows past the slice are 0, as B, C and x are there, and not stored, but for elements in segment_states: there a part
// has for each head a matrix (headdim, kColumns).
//
// Phases: ask for the first step, kStep tokens of x, z, B and C; add up the state before the segment. For each step: wait for
// it; once in 32 tokens the first warp makes their dt into decays; a barrier, which publishes both and tells that nobody
// reads the step before any more; ask for the next step, to the place of that one; each warp makes its z into gates; token
// by token it steps its rows and sums state C over each lane's elements. The sum over lanes and the store of out are left
// until the next token, whose arithmetic then fills the time that shuffles take. With states_only there are no C, z, sums
// and out, and no states but those of segments.
//
// Shared memory: two steps (B and C: 1 KB for each of HELD; x and z: 32 KB in all, HELD of 16 or 32 16 or 8 KB) and the
// decays of twice 32 tokens and sums of dt A (1.25 KB), together 37, 41, 33 or 41 KB for HELD of 4, 8, 16 or 32.
//
// fp32: everything but the sum of dt A over a part, in double: thousands of roundings to fp32 would be too many.

#include "async_copy.cuh"
#include "constant.cuh"
#include "ssd.cuh"

using namespace oxi;

namespace {

// Elements of a row that a lane has: 4, 8, 16 or 32 for dstate up to 32, 64, 128 or 256.
constexpr int kHeld = HELD;
constexpr int kLanes = 8;
constexpr int kColumns = kLanes * kHeld;
// As many as make 64 elements a thread, but at most 8, since 8 lanes can have the sums of as many rows.
constexpr int kRows = kHeld < 8 ? 8 : 64 / kHeld;
constexpr int kWarpRows = kWarp / kLanes * kRows;
constexpr int kMaxWarps = 8;
constexpr int kStep = 8;
// Enough for no spills; of 4 warps, which a usual head makes with a dstate of 128, three blocks at a time.
constexpr int kRegisters = kHeld == 16 ? 168 : 216;

struct Step {
  Element B[kStep][kColumns];
  Element C[kStep][kColumns];
  Element x[kMaxWarps][kStep][kWarpRows];
  // First z, then what a row's sum is multiplied with: silu(z), of a backward dout silu'(z).
  Element gates[kMaxWarps][kStep][kWarpRows];
};

// dt of a token, and what Decay makes of it.
struct alignas(16) Token {
  float dt;
  float kept;
  float factor;
};

// Elements of a tensor (batch, seqlen, nheads or ngroups, ·), from token t.
__device__ __forceinline__ Element *line(const OxiTensor4 &tensor, long long b, int t, int head) {
  return static_cast<Element *>(tensor.data) + b * tensor.stride[0] + t * tensor.stride[1] + head * tensor.stride[2];
}

__device__ __forceinline__ bool has_gates(const OxiSsd &p) { return p.z.data != nullptr && !p.states_only; }

// Ask for the step from token t on. All threads share the lines of B and C; of x and z each warp asks for its own rows.
template <int kWidth>
__device__ __forceinline__ void ask(const OxiSsd &p, const Walk &walk, int rows, int t, Step &step) {
  const auto copy = [&](Element *to, const Element *from, const OxiTensor4 &tensor, int i, int column, bool inside) {
    const long long offset = i * tensor.stride[1] + column * (kWidth > 1 ? 1 : tensor.stride[3]);
    copy_async<kWidth * sizeof(Element)>(to, from + offset, inside);
  };
  const Element *B = line(p.B, walk.b, t, walk.group), *C = line(p.C, walk.b, t, walk.group);
  for (int place = threadIdx.x * kWidth; place < kStep * kColumns; place += blockDim.x * kWidth) {
    const int i = place / kColumns, n = place % kColumns;
    const bool inside = t + i < walk.end && n < p.dstate;
    copy(&step.B[i][n], B, p.B, i, n, inside);
    if (!p.states_only) copy(&step.C[i][n], C, p.C, i, n, inside);
  }
  const bool gated = has_gates(p);
  const int warp = threadIdx.x / kWarp;
  const Element *x = line(p.x, walk.b, t, walk.head), *z = line(p.z, walk.b, t, walk.head);
  for (int place = threadIdx.x % kWarp * kWidth; place < kStep * kWarpRows; place += kWarp * kWidth) {
    const int i = place / kWarpRows, row = place % kWarpRows;
    const int row_of_slice = warp * kWarpRows + row;
    const bool inside = t + i < walk.end && row_of_slice < rows;
    copy(&step.x[warp][i][row], x, p.x, i, walk.first + row_of_slice, inside);
    if (gated) copy(&step.gates[warp][i][row], z, p.z, i, walk.first + row_of_slice, inside);
  }
}

// Of a warp's gates, from token t on and `rows` of them at most: the gradient of what they multiply, and what makes of that
// their own.
__device__ __forceinline__ void backpropagate_gates(const OxiSsd &p, const Walk &walk, int rows, int t, Element *gates) {
  const int first = walk.first + threadIdx.x / kWarp * kWarpRows;
  const Element *dout = line(p.dout, walk.b, t, walk.head) + first * p.dout.stride[3];
  Element *out = line(p.out, walk.b, t, walk.head) + first * p.out.stride[3];
#pragma unroll
  for (int place = threadIdx.x % kWarp; place < kStep * kWarpRows; place += kWarp) {
    const int i = place / kWarpRows, row = place % kWarpRows;
    if (t + i >= walk.end || row >= rows) continue;
    const float gate = to_float(gates[place]);
    const float gradient = to_float(dout[i * p.dout.stride[1] + row * p.dout.stride[3]]);
    gates[place] = from_float<Element>(gradient * silu_grad(gate));
    out[i * p.out.stride[1] + row * p.out.stride[3]] = from_float<Element>(gradient * silu(gate));
  }
}

// The sum over 8 lanes of row own = lane % kRows, where value i of a lane is row i ^ own's: then the values that a lane gives
// away are the same ones in all lanes, and nothing has to be selected.
__device__ __forceinline__ float sum_of_own_row(float (&values)[kRows]) {
#pragma unroll
  for (int step = kRows / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i + step], step);
  }
#pragma unroll
  for (int step = kRows; step < kLanes; step *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], step);
  return values[0];
}

}  // namespace

extern "C" __global__ void __maxnreg__(kRegisters) KERNEL(const __grid_constant__ OxiSsd p) {
  __shared__ alignas(16) Step steps[2];
  __shared__ Token decays[2 * kWarp];
  // Of a part: what the first warp's lanes have of the sum of dt A, here for lack of registers.
  __shared__ double log_decays[kWarp];

  const Walk walk(p);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = lane % kLanes, own = lane % kRows;
  // Rows of the slice, and of those the thread's first one; row i of the thread's state.
  const int rows = min(p.slice, p.headdim - walk.first);
  const int first_of_warp = lane / kLanes * kRows;
  const int first_row = warp * kWarpRows + first_of_warp;
  const auto row_of = [&](int i) { return first_row + (i ^ own); };
  // Where element j of a row is in it.
  const auto n_of = [&](int j) { return j / 4 * (4 * kLanes) + column * 4 + j % 4; };
  float state[kRows][kHeld] = {};

  // Visit the thread's rows, as far as there are any. There is code for one row, through which all rotate: code for each
  // would take registers from the loop over tokens.
  const auto each_row = [&](auto visit) __attribute__((always_inline)) {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
      if (row_of(i) < rows) visit(row_of(i), state[0]);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const float value = state[0][j];
#pragma unroll
        for (int r = 0; r + 1 < kRows; ++r) state[r][j] = state[r + 1][j];
        state[kRows - 1][j] = value;
      }
    }
  };
  // Visit the thread's elements with their offsets in states.
  const auto each_element = [&](const OxiTensor4 &states, long long index, auto visit) __attribute__((always_inline)) {
    const long long first = walk.state_offset(states, index);
    each_row([&](int row, float (&elements)[kHeld]) __attribute__((always_inline)) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (n_of(j) < p.dstate) visit(elements[j], first + row * states.stride[2] + n_of(j) * states.stride[3]);
      }
    });
  };
  // Where the thread's elements of a row are in what a part adds, in fours that are kLanes fours apart.
  const auto in_part = [&](int part, int row) __attribute__((always_inline)) {
    const long long row_of_all = walk.of_part(p, part) * p.headdim + walk.first + row;
    return reinterpret_cast<float4 *>(p.segment_states + row_of_all * kColumns) + column;
  };
  const auto store_segment = [&]() __attribute__((always_inline)) {
    each_row([&](int row, const float (&elements)[kHeld]) __attribute__((always_inline)) {
      float4 *to = in_part(walk.segment, row);
#pragma unroll
      for (int j = 0; j < kHeld; j += 4) {
        to[j / 4 * kLanes] = make_float4(elements[j], elements[j + 1], elements[j + 2], elements[j + 3]);
      }
    });
  };
  // From zeros on: what the parts before the segment add, each decayed over those that follow.
  const auto enter_segment = [&]() __attribute__((always_inline)) {
    each_row([&](int row, float (&elements)[kHeld]) __attribute__((always_inline)) {
#pragma unroll 1
      for (int part = 0; part < Walk::parts_before(walk.segment); ++part) {
        const float decay = p.segment_decays[walk.of_part(p, part)];
        const float4 *from = in_part(part, row);
#pragma unroll
        for (int j = 0; j < kHeld; j += 4) {
          const float4 four = from[j / 4 * kLanes];
          const float added[4] = {four.x, four.y, four.z, four.w};
          // A state that another run begins after is not multiplied: it may not be finite.
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            elements[j + k] = decay == 0.0f ? added[k] : fmaf(decay, elements[j + k], added[k]);
          }
        }
      }
    });
  };
  const auto start_run = [&](int t) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) state[i][j] = 0.0f;
    }
    const long long row = entry_row(p, walk.b, t);
    if (row < 0) return;
    each_element(p.initial_states, row, [&](float &value, long long offset) { value = load_initial(p, offset); });
  };
  const auto store_state = [&](const OxiTensor4 &states, int dtype, long long row) __attribute__((always_inline)) {
    each_element(states, row, [&](float value, long long offset) { store_scalar(states.data, dtype, offset, value); });
  };
  // The state of what has no tokens: row `entry` of initial states, zeros for a negative one.
  const auto store_entry = [&](const OxiTensor4 &states, int dtype, long long row, long long entry) {
    const long long to = walk.state_offset(states, row), from = walk.state_offset(p.initial_states, entry);
    for (int place = threadIdx.x; place < rows * p.dstate; place += blockDim.x) {
      const int i = place / p.dstate, n = place % p.dstate;
      const long long *from_stride = p.initial_states.stride, *to_stride = states.stride;
      const float value = entry < 0 ? 0.0f : load_initial(p, from + i * from_stride[2] + n * from_stride[3]);
      store_scalar(states.data, dtype, to + i * to_stride[2] + n * to_stride[3], value);
    }
  };
  const auto end_run = [&](int end) __attribute__((always_inline)) {
    if (end == p.seqlen && p.final_states.data != nullptr) store_state(p.final_states, OXI_F32, walk.b);
    if (p.varlen_states.data == nullptr) return;
    for_documents_ending_at(p, walk.b, end, [&](long long row, long long entry) __attribute__((always_inline)) {
      if (entry == -2) {
        store_state(p.varlen_states, p.varlen_dtype, row);
      } else {
        store_entry(p.varlen_states, p.varlen_dtype, row, entry);
      }
    });
  };

  wait_for_earlier_work();
  const auto ask_from = [&](int t) __attribute__((always_inline)) {
    if (t < walk.end) {
      Step &step = steps[(t - walk.begin) / kStep % 2];
      if (p.width == kVector<Element>) {
        ask<kVector<Element>>(p, walk, rows, t, step);
      } else {
        ask<1>(p, walk, rows, t, step);
      }
    }
    end_of_batch();
  };
  ask_from(walk.begin);
  if (walk.segment > 0 && !p.states_only) enter_segment();
  const bool gated = has_gates(p);
  if (!gated) {
    for (Step &step : steps) {
      Element *gates = &step.gates[warp][0][0];
      for (int i = lane; i < kStep * kWarpRows; i += kWarp) gates[i] = from_float<Element>(1.0f);
    }
  }

  const Discretize discretize(p, walk.head);
  // In natural units, since Decay's are.
  const float A = load_either<Element>(p.A.data, walk.head * p.A.step, p.A.dtype == OXI_F32);
  const auto load_dt = [&](int t) {
    if (t >= walk.end) return 0.0f;
    const long long offset = walk.b * p.dt.stride[0] + t * p.dt.stride[1] + walk.head * p.dt.stride[2];
    return load_either<Element>(p.dt.data, offset, p.wide_dt);
  };
  float raw_dt = load_dt(walk.begin + lane);
  if (warp == 0) log_decays[lane] = 0.0;

  // The row that the lane has the sum of; the first of the lanes that have the same one stores it.
  const long long own_row = walk.first + first_row + own;
  const bool stores = first_row + own < rows && column < kRows;
  float D = 0.0f;
  if (p.D.data != nullptr && stores) {
    D = load_either<Element>(p.D.data, walk.head * p.D.stride[0] + own_row * p.D.stride[1], p.wide_D);
  }

  if (walk.begin == 0 && p.varlen_states.data != nullptr && !p.states_only) {
    for_documents_ending_at(p, walk.b, 0, [&](long long row, long long entry) {
      store_entry(p.varlen_states, p.varlen_dtype, row, entry);
    });
  }
  if (p.seqlen == 0 && p.final_states.data != nullptr) {
    const bool starts = p.initial_states.data != nullptr && p.ndocs > 0;
    store_entry(p.final_states, OXI_F32, walk.b, starts ? initial_row(p, walk.b, 0) : -1);
  }

  // Of the latest token: state C over the lane's elements, x and gate of its own row.
  float sums[kRows] = {}, own_x = 0.0f, own_gate = 0.0f;
  const bool backward = p.dout.data != nullptr;
  const OxiTensor4 &results = backward ? p.dz : p.out;
  Element *out = line(results, walk.b, walk.begin, walk.head) + own_row * results.stride[3] - results.stride[1];
  // To be called before each token with the one before, even before the first one.
  const auto finish = [&](int t) __attribute__((always_inline)) {
    const float y = fmaf(D, own_x, sum_of_own_row(sums)) * own_gate;
    if (stores && t >= walk.begin) *out = from_float<Element>(y);
    out += results.stride[1];
  };

  // Over tokens t to stop - 1 of the step that begins with token `first`.
  const auto advance = [&](const Step &step, const Token *tokens, int first, int t, int stop, auto has_outputs)
      __attribute__((always_inline)) {
#pragma unroll 2
    for (; t < stop; ++t) {
      const int i = t - first;
      const Token token = tokens[i];
      float x[kRows], xdt[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r] = to_float(step.x[warp][i][first_of_warp + (r ^ own)]);
        xdt[r] = x[r] * token.dt;
      }
      if constexpr (has_outputs) {
        const float gate = to_float(step.gates[warp][i][first_of_warp + own]);
        // Behind the loads, which are then under way while it waits for other lanes.
        finish(t - 1);
        own_x = x[0];
        own_gate = gate;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kHeld; j += 4) {
        const auto B = *reinterpret_cast<const Pack<Element, 4> *>(&step.B[i][n_of(j)]);
        Pack<Element, 4> C;
        if constexpr (has_outputs) C = *reinterpret_cast<const Pack<Element, 4> *>(&step.C[i][n_of(j)]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            // Decay's apply.
            float &value = state[r][j + k];
            value = fmaf(token.kept, value, fmaf(token.factor, value, xdt[r] * B[k]));
            if constexpr (has_outputs) sums[r] = fmaf(value, C[k], sums[r]);
          }
        }
      }
    }
  };

  Tiles tiles(p, walk);
  // Whether a run has begun.
  bool restarts = false;
  for (int first = walk.begin; first < walk.end; first += kStep) {
    Step &step = steps[(first - walk.begin) / kStep % 2];
    Token *tokens = &decays[(first - walk.begin) % (2 * kWarp)];
    wait_for_batches<0>();
    if (warp == 0 && (first - walk.begin) % kWarp == 0) {
      const float dt = discretize.dt(p, raw_dt);
      const float log_decay = dt * A;
      const Decay decay(log_decay);
      tokens[lane] = {dt, decay.kept, decay.factor};
      if (p.states_only && first + lane < walk.end) log_decays[lane] += log_decay;
      raw_dt = load_dt(first + kWarp + lane);
    }
    __syncthreads();
    ask_from(first + kStep);
    if (gated) {
      Element *gates = &step.gates[warp][0][0];
      if (backward) {
        backpropagate_gates(p, walk, rows - warp * kWarpRows, first, gates);
      } else {
#pragma unroll
        for (int i = lane; i < kStep * kWarpRows; i += kWarp) gates[i] = from_float<Element>(silu(to_float(gates[i])));
      }
      __syncwarp();
    }

    const int end = min(first + kStep, walk.end);
    for (int t = first; t < end;) {
      if (t == tiles.begin + tiles.size) {
        tiles.next();
        if (tiles.starts) {
          start_run(t);
          restarts = true;
        }
      }
      const int stop = min(end, tiles.begin + tiles.size);
      if (p.states_only) {
        advance(step, tokens, first, t, stop, Constant<false>());
      } else {
        advance(step, tokens, first, t, stop, Constant<true>());
        if (tiles.ends && stop == tiles.begin + tiles.size) end_run(stop);
      }
      t = stop;
    }
  }
  if (!p.states_only) {
    finish(walk.end - 1);
    return;
  }
  store_segment();
  if (walk.slice > 0 || warp > 0) return;
  double sum = log_decays[lane];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) p.segment_decays[walk.of_part(p, walk.segment)] = restarts ? 0.0f : static_cast<float>(exp(sum));
}
