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
// With dout, of a backward: dz = dout Y silu'(z) and out = dout silu(z), the gradient of Y.
//
// For a backward, the H that enter even tiles, counted from where a run or segment begins, go to slots of entry_states as they
// are in shared memory, by bulk copies of the outputs' warpgroups (ssd_bwd.cuh).
//
// Grid: a block has a segment of a sequence, for one head, or for a slice of it (kHeaddim rows of the state).
// Warpgroups, each with a part of the work, a tile or more apart from one another; states and loads are ssd_wgmma.cuh's:
//
//   states    kStateGroups of them. At a tile's start they write H, rounded, to shared memory for the outputs. X^T is scaled in
//             registers, during the products of the tile before.
//   outputs   kOutputGroups of them, each with every kOutputGroups-th tile: S, M, then with H Y and out. C and M are in
//             registers, C as far as it fits; M's diagonal is added with D in full.
//   loads     x, B, C and what dt and A make of a tile, to the ring.
//
// Barriers beside the ring's: state_full[group]: H is there for that group of the outputs, whose x the states have read.
// state_empty[buffer]: their products no longer read it.
//
// Shared memory: Storage below, 140 to 225 KB: a ring of kStages times B, C and kStagesOfX times X in slabs of 64 columns
// (wgmma.cuh), H. Out leaves from where its tile's x was.
//
// fp32: dt, l and the powers, S, Y, H, M's diagonal, all sums. Rounded to Element: the rest of M, H and dt X as operands;
// the factor of X there to 16 bits in bf16 (scale_factors).

#include "ssd_wgmma.cuh"

namespace oxi {

constexpr int kOutputGroups = 4 - kStateGroups;
constexpr int kThreads = (kStateGroups + kOutputGroups + 1) * kWarpgroup;
// Registers of a thread at first, as each warpgroup has a warp on each of a multiprocessor's four parts; and later, found by
// trial.
constexpr int kRegisters = 65536 / kThreads / 8 * 8;
constexpr int kLoadRegisters = 32;
constexpr int kStateRegisters = kDstate == 256 && kHeaddim == 64 ? 128 : 136;
constexpr int kOutputRegisters =
    (kThreads / kWarpgroup * kRegisters - kLoadRegisters - kStateGroups * kStateRegisters) / kOutputGroups / 8 * 8;

constexpr int kStages = kDstate == 256 ? 2 : 4;
constexpr int kStagesOfX = 7;
constexpr int kStateBuffers = kDstate == 256 ? 1 : 2;

struct Storage {
  Ring<kStages, kStagesOfX, true> ring;
  alignas(1024) unsigned char state[kStateBuffers][kSlabsOfB * kStateSlabBytes];
  float D[kHeaddim];
  Barrier state_full[kOutputGroups];
  Barrier state_empty[kStateBuffers];
};
static_assert(sizeof(Storage) <= 227 * 1024);

// Of C, the steps of 16 columns that a warp holds in registers for both of its products, instead of having them read twice from
// shared memory, whose port is what bounds this kernel: as many as there are registers for.
constexpr int kHeldSteps = kDstate == 256 ? 2 : kDstate == 128 ? 7 : 4;
using HeldC = unsigned[kHeldSteps][4];

// Whether out's rows are as wide as a slab and go out by bulk copies.
constexpr bool kStoresBoxes = kHeaddim == kSlabColumns;

__device__ __forceinline__ const Element *rows_of(const OxiTensor4 &tensor, long long b, int head_or_group, int first) {
  return static_cast<const Element *>(tensor.data) + b * tensor.stride[0] + head_or_group * tensor.stride[2] + first;
}

// M of a warp's 16 rows, as an operand: of products over 16 columns each. Its diagonal comes apart, in full, of a thread's two
// rows.
__device__ __forceinline__ void masked_products(const float (&S)[kTile / 2], const Vectors<true> &vectors, int warp, int lane,
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

// d = C other^T, of whose kColumns rows the operand `other` is.
template <int kColumns>
__device__ __forceinline__ void multiply_C(float (&d)[kColumns / 2], const HeldC &held, unsigned C, unsigned other) {
  products_begin();
#pragma unroll
  for (int k = 0; k < kDstate / 16; ++k) {
    const unsigned step_of_other = other + along_k(k, kColumns * kSlabRowBytes);
    if (k < kHeldSteps) {
      Product<kColumns>::template of_registers<kAlongRows>(d, held[k], step_of_other, k > 0);
    } else {
      Product<kColumns>::of_shared(d, C + along_k(k, kSlabBytes), step_of_other, k > 0);
    }
  }
  end_of_products();
}

// Of a thread's pairs of a token, 8 columns apart from `column` on: dz, and the gradient of Y in its place. `y`: the first of
// the pairs, of fours of Y.
__device__ __forceinline__ void backpropagate_gate(const OxiSsd &p, const Walk &walk, int t, int column, const Element *z,
                                                   float *y) {
  const Element *dout = rows_of(p.dout, walk.b, walk.head, walk.first + column) + t * p.dout.stride[1];
  Element *dz = const_cast<Element *>(rows_of(p.dz, walk.b, walk.head, walk.first + column)) + t * p.dz.stride[1];
#pragma unroll
  for (int j = 0; j < kHeaddim / 8; ++j) {
    const unsigned gates = *reinterpret_cast<const unsigned *>(z + 8 * j);
    const unsigned gradients = *reinterpret_cast<const unsigned *>(dout + 8 * j);
    const float gate[2] = {low(gates, Element()), high(gates, Element())};
    const float gradient[2] = {low(gradients, Element()), high(gradients, Element())};
    float dgate[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dgate[i] = gradient[i] * y[4 * j + i] * silu_grad(gate[i]);
      y[4 * j + i] = gradient[i] * silu(gate[i]);
    }
    *reinterpret_cast<unsigned *>(dz + 8 * j) = join(dgate[0], dgate[1], Element());
  }
}

// Of a state as it is kept.
constexpr int kKeptBytes = kSlabsOfB * kStateSlabBytes;

// By one thread: the state that enters a tile, for a backward.
__device__ __forceinline__ void keep_state(const OxiSsd &p, const Walk &walk, const Span &tile, const unsigned char *state) {
  const int slot = entry_slot(p, walk.b, tile);
  if (slot < 0) return;
  store_bytes(in_entry_slot(p, walk.b, slot, walk.head, walk.slice, kKeptBytes), state, kKeptBytes);
}

__device__ __forceinline__ void write_outputs(const OxiSsdMapped &mapped, const Walk &walk, Storage &storage, int group) {
  const OxiSsd &p = mapped.ssd;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  unsigned state_parity = 0;
  RingPosition<kStages> at;
  RingPosition<kStagesOfX> of_x;
  RingPosition<kStateBuffers> buffer;
  for (int i = 0; i < group; ++i) at.advance(), of_x.advance(), buffer.advance();
  // As well where there is no D, and its strides are 0.
  const bool has_one_D = p.D.stride[1] == 0;
  // The stage of x from which the out of the tile before leaves.
  int leaving = -1;
  for (;;) {
    storage.ring.full[at.stage].wait(at.parity);
    const Vectors<true> &vectors = storage.ring.vectors[at.stage];
    const int begin = vectors.tile.begin, size = vectors.tile.size;
    if (size == 0) break;
    // Where a thread's elements are is computed anew for each tile: kept, it would take registers.
    int lane = threadIdx.x % kWarp;
    asm volatile("" : "+r"(lane));
    const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
    // Of blocks of 16 rows, the one that the lane names.
    const int block_row = 16 * warp + lane % 16;
    const Stage<true> &stage = storage.ring.stages[at.stage];
    unsigned char *rows_of_x = storage.ring.x[of_x.stage];
    const unsigned x = operand(shared_address(rows_of_x), kSlabBytes);
    const unsigned B = operand(shared_address(stage.B), 0), C = operand(shared_address(stage.C), 0);
    float S[kTile / 2], Y[kHeaddim / 2];
    HeldC held;
#pragma unroll
    for (int k = 0; k < kHeldSteps; ++k) {
      load_blocks(held[k], shared_address(stage.C) + k / 4 * kSlabBytes + slab_offset(block_row, 2 * (k % 4) + lane / 16));
    }
    multiply_C<kTile>(S, held, C, B);
    if (leaving >= 0) {
      if (kStoresBoxes && lane == 0) wait_for_bulk_reads<0>();
      __syncwarp();
      storage.ring.x_empty[leaving].arrive();
    }
    unsigned M[kTile / 16][4];
    float diagonal[2];
    wait_for_products<0>();
    keep_in_place(S);
    masked_products(S, vectors, warp, lane, M, diagonal);
    const unsigned state = operand(shared_address(storage.state[buffer.stage]), 0);
    storage.state_full[group].wait(state_parity);
    state_parity ^= 1;
    multiply_C<kHeaddim>(Y, held, C, state);
    const bool keeps = p.keeps_entry_states && !vectors.odd && threadIdx.x % kWarpgroup == 0;
    if (keeps) keep_state(p, walk, vectors.tile, storage.state[buffer.stage]);
    const float2 entering = *reinterpret_cast<const float2 *>(vectors.entering + 16 * warp + 2 * (lane / 4));
    wait_for_products<0>();
    keep_in_place(Y);
    if (keeps) wait_for_bulk_reads<0>();
    storage.state_empty[buffer.stage].arrive();
    storage.ring.empty[at.stage].arrive();
    // Y so far decays from the tile's start; D and M's diagonal times x.
    const auto add_x = [&](auto D_of_columns) {
#pragma unroll
      for (int j = 0; j < kHeaddim / 8; j += 2) {
        unsigned words[4];
        load_blocks(words, shared_address(rows_of_x) + slab_offset(block_row, j + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 D = D_of_columns(8 * (j + i / 2) + column);
          const float over_rows = i % 2 == 0 ? entering.x : entering.y;
          float *y = Y + 4 * j + 2 * i;
          y[0] = fmaf(y[0], over_rows, (diagonal[i % 2] + D.x) * low(words[i], Element()));
          y[1] = fmaf(y[1], over_rows, (diagonal[i % 2] + D.y) * high(words[i], Element()));
        }
      }
    };
    if (__builtin_expect(has_one_D, 1)) {
      const float D = storage.D[0];
      add_x([&](int) { return make_float2(D, D); });
    } else {
      add_x([&](int first) { return *reinterpret_cast<const float2 *>(storage.D + first); });
    }
    keep_in_place(Y);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kHeaddim>::of_registers<kAcrossRows>(Y, M[k], x + across_k(k), 1);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(Y);
    if (__builtin_expect(p.z.data != nullptr, 0)) {
      const Element *z = rows_of(p.z, walk.b, walk.head, walk.first + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = row + 8 * half;
        const Element *from = z + (begin + t) * p.z.stride[1];
        if (p.dout.data != nullptr) {
          if (t < size) backpropagate_gate(p, walk, begin + t, column, from, Y + 2 * half);
          continue;
        }
#pragma unroll
        for (int j = 0; j < kHeaddim / 8; ++j) {
          const unsigned word = t < size ? *reinterpret_cast<const unsigned *>(from + 8 * j) : 0;
          float *y = Y + 4 * j + 2 * half;
          y[0] *= silu(low(word, Element()));
          y[1] *= silu(high(word, Element()));
        }
      }
    }

    // In place of x, which the states have read, a warp its own rows.
    synchronize_warpgroup(kStateGroups + group);
#pragma unroll
    for (int j = 0; j < kHeaddim / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = join(Y[4 * j + 2 * i], Y[4 * j + 2 * i + 1], Element());
      store_blocks(shared_address(rows_of_x) + slab_offset(block_row, j + lane / 16), words);
    }
    // A tile's rows past its tokens are another run's, or lie past the sequence's end, where bulk copies end too.
    const bool in_boxes = kStoresBoxes && (size == kTile || begin + size == p.seqlen);
    // The next x comes by a copy too.
    publish_to_products();
    __syncwarp();
    if (__builtin_expect(in_boxes, 1)) {
      const int b = static_cast<int>(walk.b);
      const unsigned char *rows = rows_of_x + 16 * warp * kSlabRowBytes;
      if (lane == 0) store_box(mapped.out, walk.first, walk.head, begin + 16 * warp, b, rows);
    } else {
      constexpr int kChunks = kHeaddim / 8;
      Element *out = const_cast<Element *>(rows_of(p.out, walk.b, walk.head, walk.first)) + begin * p.out.stride[1];
#pragma unroll
      for (int i = 0; i < 16 * kChunks / kWarp; ++i) {
        const int t = 16 * warp + (i * kWarp + lane) / kChunks, chunk = (i * kWarp + lane) % kChunks;
        const uint4 words = *reinterpret_cast<const uint4 *>(rows_of_x + slab_offset(t, chunk));
        if (t < size) *reinterpret_cast<uint4 *>(out + t * p.out.stride[1] + 8 * chunk) = words;
      }
    }
    leaving = of_x.stage;
    for (int i = 0; i < kOutputGroups; ++i) at.advance(), of_x.advance(), buffer.advance();
  }
  if (kStoresBoxes && threadIdx.x % kWarp == 0) wait_for_bulk_reads<0>();
}

__device__ __forceinline__ void walk_states(const OxiSsd &p, const Walk &walk, Storage &storage) {
  State state;
  state.clear();
  const bool has_states = p.entry_states != nullptr && !p.keeps_entry_states;
#pragma unroll 1
  for (int part = 0; part < (has_states ? 0 : Walk::parts_before(walk.segment)); ++part) {
    const long long added = walk.of_part(p, part);
    state.pass_segment(p, added * p.slices + walk.slice, p.segment_decays[added]);
  }
  if (has_states && walk.begin > 0) {
    // Of no use, if a run begins there.
    state.load_rounded(in_entry_slot(p, walk.b, walk.begin / p.slot_tokens, walk.head, walk.slice, kKeptBytes));
  }
  if (walk.begin == 0) state.store_ended(p, walk, 0);
  RingPosition<kOutputGroups> output;
  RingPosition<kStateBuffers> buffer;
  for (StateWalk tiles(storage.ring); tiles.tile.size > 0;) {
    const Span tile = tiles.tile;
    if (tile.starts) state.load_initial(p, walk, entry_row(p, walk.b, tile.begin));
    storage.state_empty[buffer.stage].wait(buffer.parity ^ 1);
    state.publish(storage.state[buffer.stage]);
    state.begin_step(tiles.step, tiles.stage());
    publish_to_products();
    storage.state_full[output.stage].arrive();
    output.advance();
    buffer.advance();
    tiles.advance(state);
    if (tile.ends) state.store_ended(p, walk, tile.begin + tile.size);
  }
  if (walk.end < p.seqlen || p.final_states.data == nullptr) return;
  state.store<float>(p.final_states, walk, walk.b);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    KERNEL(const __grid_constant__ OxiSsdMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage &storage = *reinterpret_cast<Storage *>(shared);
  const OxiSsd &p = mapped.ssd;
  const Walk walk(p);
  if (threadIdx.x == 0) {
    storage.ring.init();
    for (Barrier &barrier : storage.state_full) barrier.init(kStateGroups * kWarpgroup);
    for (Barrier &barrier : storage.state_empty) barrier.init(kWarpgroup);
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
  if (group < kStateGroups) {
    change_registers<kStateRegisters, kRegisters>();
    walk_states(p, walk, storage);
  } else if (group < kStateGroups + kOutputGroups) {
    change_registers<kOutputRegisters, kRegisters>();
    write_outputs(mapped, walk, storage, group - kStateGroups);
  } else {
    change_registers<kLoadRegisters, kRegisters>();
    load_tiles(mapped, walk, storage.ring, warp % 4, kOutputGroups);
  }
}

}  // namespace oxi
