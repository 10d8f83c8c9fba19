// Decode steps of the state-space recurrence. Equals oxiscan.reference.selective_state_update.
//
// For each token of the call, with dt = softplus(dt + dt_bias) (softplus if asked for):
//
//   state = exp(dt A) state + dt x B          out = (state C + D x) silu(z)
//
// Grid: (batch, nheads, blocks that share the rows of a head). Who owns what: 2^lanes_log2 lanes of a warp own a row of the
// state (dstate elements), 8 elements each: with V elements in 16 bytes, lane l has vectors l, l + lanes, ... of V elements.
// A thread has kRows rows: one, in registers through all tokens of the call, or several for one token. Their loads are then
// under way together, those of four as copies to shared memory, which take no registers, and B, C and, where A and dt do
// not differ within a head, the decay serve all of them.
//
// Phases, without barriers: while earlier work still runs, have the rows of the state brought to the L2 cache; load them;
// for each token load B, C, x, dt, step, sum state C over a row's lanes by shuffles, store; store the rows, each of several
// as soon as it has its token. Nothing is read on the host: a sequence of index -1 gets zeros, one of any other index
// outside the slots NaN, and neither touches a state.
//
// Shared memory: with four rows a thread its elements of them, 8 or 16 KB a block, and where A differs along a row and is
// fp32, 4 KB of it for each row of a thread. Each thread reads its own alone.
// fp32: everything between loads and stores; the state is rounded once a call.

#include "async_copy.cuh"
#include "dependent_launch.cuh"
#include "dtype.cuh"
#include "math.cuh"
#include "params.h"
#include "reduce.cuh"

using namespace oxi;

using Element = oxi::ELEMENT;
using State = oxi::STATE;

// Dense: rows move in 16-byte accesses, fill their lanes and are a multiple of what a warp has of them. Several rows a
// thread only for one token: what stays the same from token to token would take too many registers.
constexpr bool kDense = ROWS > 0;
constexpr int kRows = kDense ? ROWS : 1;
constexpr bool kOneToken = kRows > 1;
// Through shared memory, with fewer registers and so more blocks at a time, where that counts more than how soon a thread
// is done.
constexpr bool kThroughShared = kRows > 2;
constexpr int kMaxWarps = 4;
// For enough loads under way on a multiprocessor: as many blocks as all instances have registers for without spills.
#if __CUDA_ARCH__ < 1000
constexpr int kOneTokenBlocks = sizeof(State) < 4 ? 5 : 4;
#else
constexpr int kOneTokenBlocks = 4;
#endif
constexpr int kBlocks = kOneToken ? kOneTokenBlocks : 1;
// Elements that a thread has of a row, in packs of 16 bytes of the state.
constexpr int kHeld = 8;
constexpr int kWidth = kVector<State>;
constexpr int kPacks = kHeld / kWidth;

namespace {

// A thread's share of a line of dstate elements: B, C, A or a row of a state.
template <typename T>
struct Share {
  Pack<T, kWidth> packs[kPacks];

  __device__ float operator[](int i) const { return packs[i / kWidth][i % kWidth]; }
};

// Where a thread's pack is in a line.
__device__ int first_of(int pack, int lane, const OxiStateUpdate &p) { return ((pack << p.lanes_log2) + lane) * kWidth; }

template <typename T>
__device__ Share<T> load_share(const T *line, long long step, int lane, const OxiStateUpdate &p) {
  Share<T> share;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int first = first_of(i, lane, p);
    // Lanes are filled, so nothing is past the end.
    if constexpr (kDense) {
      share.packs[i] = *reinterpret_cast<const Pack<T, kWidth> *>(line + first);
    } else {
      share.packs[i] = load_pack<kWidth>(line, step, first, p.dstate, false);
    }
  }
  return share;
}

template <typename T>
__device__ void store_share(T *line, long long step, int lane, const OxiStateUpdate &p, const float (&values)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float part[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) part[j] = values[i * kWidth + j];
    const auto pack = Pack<T, kWidth>::of(part);
    const int first = first_of(i, lane, p);
    if constexpr (kDense) {
      *reinterpret_cast<Pack<T, kWidth> *>(line + first) = pack;
    } else {
      store_pack(line, step, first, p.dstate, false, pack);
    }
  }
}

// A thread's share of a row of the states after token t.
__device__ void store_intermediate(const OxiStateUpdate &p, long long slot, int t, int head, int row, int lane,
                                   const float (&state)[kHeld]) {
  const OxiTensor5 &all = p.intermediate;
  const long long offset = slot * all.stride[0] + t * all.stride[1] + head * all.stride[2] + row * all.stride[3];
  const auto store = [&](auto *data) { store_share(data + offset, all.stride[4], lane, p, state); };
  if (p.intermediate_dtype == OXI_F32) {
    store(static_cast<f32 *>(all.data));
  } else if (p.intermediate_dtype == OXI_BF16) {
    store(static_cast<bf16 *>(all.data));
  } else {
    store(static_cast<f16 *>(all.data));
  }
}

// Where a thread's rows are in a tensor: the offset of its first row (of token 0), and from one of its rows to the next.
struct Rows {
  long long first;
  long long step;

  __device__ long long operator[](int i) const { return first + i * step; }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kMaxWarps *kWarp, kBlocks) KERNEL(const __grid_constant__ OxiStateUpdate p) {
  const int lane = threadIdx.x & ((1 << p.lanes_log2) - 1);
  const int rows_at_once = kWarp >> p.lanes_log2;
  const long long b = blockIdx.x;
  const unsigned head = blockIdx.y;
  const unsigned group = head / p.heads_per_group;
  const int first_row = (blockIdx.z * blockDim.x + threadIdx.x) / kWarp * kRows * rows_at_once +
                        (threadIdx.x % kWarp >> p.lanes_log2);
  // Where rows do not fill a warp, lanes past the last one go along on a copy of it that they do not store: shuffles need
  // all of them.
  const int row = kDense ? first_row : min(first_row, p.dim - 1);
  const bool stores = first_row < p.dim;

  const auto of_token = [&](const OxiTensor4 &tensor) {
    return Rows{b * tensor.stride[0] + head * tensor.stride[2] + row * tensor.stride[3], rows_at_once * tensor.stride[3]};
  };
  const auto of_head = [&](const auto &tensor) {
    return Rows{head * tensor.stride[0] + row * tensor.stride[1], rows_at_once * tensor.stride[1]};
  };
  const auto of_group = [&](const OxiTensor4 &tensor) { return b * tensor.stride[0] + group * tensor.stride[2]; };
  const Rows x_rows = of_token(p.x), z_rows = of_token(p.z), out_rows = of_token(p.out), dt_rows = of_token(p.dt);
  const Rows A_rows = of_head(p.A), D_rows = of_head(p.D), dt_bias_rows = of_head(p.dt_bias);
  const long long B_line = of_group(p.B), C_line = of_group(p.C);
  // Without the slot, which may have to be read.
  const Rows slot_rows{head * p.state.stride[1] + row * p.state.stride[2], rows_at_once * p.state.stride[2]};
  const auto element = [](const OxiTensor4 &tensor, long long offset) -> Element & {
    return static_cast<Element *>(tensor.data)[offset];
  };

  const auto read_slot = [&] {
    const long long at = b * p.indices_step;
    return p.indices == nullptr ? b : load_integer_anew(p.indices, at, p.indices_are_64_bit);
  };
  const auto states_of = [&](long long slot) { return static_cast<State *>(p.state.data) + slot * p.state.stride[0]; };

  if constexpr (kDense && kStartsEarly) {
    // An index that earlier work is yet to write costs no more than the wrong lines.
    const long long slot = read_slot();
    if (stores && slot >= 0 && slot < p.slots) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int pack = 0; pack < kPacks; ++pack) {
          prefetch_early(states_of(slot) + slot_rows[i] + first_of(pack, lane, p));
        }
      }
    }
  }
  wait_for_earlier_work();
  let_next_kernel_start();
  if (kDense && !stores) return;

  const long long slot = read_slot();
  if (slot < 0 || slot >= p.slots) {
    const Element nothing = from_float<Element>(slot == -1 ? 0.0f : __int_as_float(0x7fffffff));
    for (int t = 0; t < p.seqlen; ++t) {
      for (int i = 0; i < kRows; ++i) {
        if (lane == 0 && stores) element(p.out, out_rows[i] + t * p.out.stride[1]) = nothing;
      }
    }
    return;
  }

  State *states = states_of(slot);
  // By row, pack, thread: each thread reads what it asked for, and waits for no other.
  __shared__ uint4 arriving[kThroughShared ? kRows * kPacks : 1][kMaxWarps * kWarp];
  const auto place = [&](int i, int pack) -> uint4 & { return arriving[i * kPacks + pack][threadIdx.x]; };
  float state[kRows][kHeld];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kThroughShared) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        copy_async<16>(&place(i, pack), states + slot_rows[i] + first_of(pack, lane, p), true);
      }
    } else {
      const auto loaded = load_share(states + slot_rows[i], p.state.stride[3], lane, p);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) state[i][j] = loaded[j];
    }
  }
  if constexpr (kThroughShared) end_of_batch();
  const auto receive = [&](int i) {
    Share<State> loaded;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) loaded.packs[pack] = reinterpret_cast<Pack<State, kWidth> &>(place(i, pack));
#pragma unroll
    for (int j = 0; j < kHeld; ++j) state[i][j] = loaded[j];
  };
  const auto store = [&](int i) {
    if (stores) store_share(states + slot_rows[i], p.state.stride[3], lane, p, state[i]);
  };
  // Whether all of a row has one A.
  const bool one_A = p.A.stride[2] == 0;

  const int seqlen = kOneToken ? 1 : p.seqlen;
  for (int t = 0; t < seqlen; ++t) {
    // All loads first, and nothing that waits for one of them.
    using Scalar = Either<Element>;
    Scalar dt_scalar[kRows], dt_bias[kRows], A_scalar[kRows], D[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i > 0 && p.one_decay) continue;
      dt_scalar[i] = Scalar(p.dt.data, dt_rows[i] + t * p.dt.stride[1], p.wide_dt);
      if (p.dt_bias.data != nullptr) dt_bias[i] = Scalar(p.dt_bias.data, dt_bias_rows[i], p.wide_dt_bias);
      if (one_A) A_scalar[i] = Scalar(p.A.data, A_rows[i], p.wide_A);
    }
    const auto B = load_share(&element(p.B, B_line + t * p.B.stride[1]), p.B.stride[3], lane, p);
    const auto C = load_share(&element(p.C, C_line + t * p.C.stride[1]), p.C.stride[3], lane, p);
    Element x_element[kRows], z_element[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x_element[i] = element(p.x, x_rows[i] + t * p.x.stride[1]);
    if (p.D.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) D[i] = Scalar(p.D.data, D_rows[i], p.wide_D);
    }
    if (p.z.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) z_element[i] = element(p.z, z_rows[i] + t * p.z.stride[1]);
    }

    float x[kRows], dt[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = to_float(x_element[i]);
      if (i > 0 && p.one_decay) {
        dt[i] = dt[0];
      } else {
        dt[i] = dt_scalar[i] + dt_bias[i];
        if (p.dt_softplus) dt[i] = softplus(dt[i]);
      }
    }

    float y[kRows];
    // What is left to do with a row once it has this token.
    const auto finish = [&](int i) {
      y[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) y[i] = fmaf(state[i][j], C[j], y[i]);
      if (p.intermediate.data != nullptr && stores) {
        store_intermediate(p, slot, t, head, row + i * rows_at_once, lane, state[i]);
      }
      if constexpr (kOneToken) store(i);
    };
    const auto wait_for_state = [] {
      if constexpr (kThroughShared) wait_for_batches<0>();
    };

    if (one_A) {
      wait_for_state();
      Decay decay(0.0f);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if constexpr (kThroughShared) receive(i);
        if (i == 0 || !p.one_decay) decay = Decay(dt[i] * A_scalar[i]);
        const float dtx = dt[i] * x[i];
#pragma unroll
        for (int j = 0; j < kHeld; ++j) state[i][j] = decay.apply(state[i][j], dtx * B[j]);
        finish(i);
      }
    } else {
      // A is asked for one row ahead, since a load stays behind the stores of the rows before it.
      const auto step = [&](auto *data) {
        const auto load_A = [&](int i) { return load_share(data + A_rows[i], p.A.stride[2], lane, p); };
        auto A = load_A(0);
        wait_for_state();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if constexpr (kThroughShared) receive(i);
          const auto next_A = load_A(i + 1 < kRows ? i + 1 : i);
          const float dtx = dt[i] * x[i];
#pragma unroll
          for (int j = 0; j < kHeld; ++j) state[i][j] = Decay(dt[i] * A[j]).apply(state[i][j], dtx * B[j]);
          finish(i);
          A = next_A;
        }
      };
      // Parameters have the activations' dtype or fp32.
      if (p.wide_A) {
        step(static_cast<const float *>(p.A.data));
      } else {
        step(static_cast<const Element *>(p.A.data));
      }
    }

    warp_sum(y, 1 << p.lanes_log2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (p.D.data != nullptr) y[i] = fmaf(D[i], x[i], y[i]);
      if (p.z.data != nullptr) y[i] *= silu(to_float(z_element[i]));
      if (lane == 0 && stores) element(p.out, out_rows[i] + t * p.out.stride[1]) = from_float<Element>(y[i]);
    }
  }

  if constexpr (!kOneToken) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) store(i);
  }
}
