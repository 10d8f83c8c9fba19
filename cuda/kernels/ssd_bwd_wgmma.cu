// The chunk scan, backward, on Hopper's warpgroup products: gradients of tiles, from the states that ssd_bwd_wgmma_states.cu
// left. Equals the gradients of oxiscan.reference.mamba_chunk_scan_combined.
//
// Per head, in tiles of up to 64 tokens of one run, with H (headdim, dstate) the state that enters the tile, G the gradient of
// the one that leaves it, exponents to base 2, l = cumsum(dt A) within the tile, t and s tokens, t >= s:
//
//   S = C B^T      P[t, s] = S[t, s] 2^(l[t] - l[s])      dM = dY X^T      dCB = sum over heads of dM 2^(l[t] - l[s]) dt[s]
//   I = 2^(l[end] - l) (B G^T)      E = I + P^T dY        dX = dt E + D dY      dD = sum over t of dY X
//   dC = dCB B + sum over heads of 2^l (dY H)             dB = dCB^T C + sum over heads of dt 2^(l[end] - l) (X G)
//   K[t, s] = dM P dt[s], without t = s      r = 2^l sum over p of dY (C H^T)      q = dt sum over p of I X
//   da[t] = sum over t' >= t of (row sum of K - column sum of K + r)[t'] + sum over s < t of q[s] + 2^l[end] <G, H>
//   ddt = (sum over p of E X + A da) (what softplus and limits leave of it)      dA = sum of dt da      ddt_bias = sum of ddt
//
// Grid: a block has the tiles that begin in a window of 64 tokens, for the heads of a group: one tile where a sequence is one
// run. Heads, or slices of kHeaddim rows of their states, are its *units*, in order. With a dstate of 256 two blocks do so,
// each for half of dB's and dC's columns, the first one for all the rest. States come from slots at every other boundary
// (ssd_bwd.cuh): where an odd tile begins, H is found from the slot of the even one before it and that one's X and B; where an
// even tile ends that an odd one follows, G from the slot behind that one and its dY and C, as ssd_bwd_wgmma_states.cu does.
// What the *other* tile has for that is part of a unit, or with B and C.
//
// Warpgroups, whose products are of rows s, but those with C of rows t:
//
//   pairs     S, transposed, to shared memory; of a unit dM^T, P^T, which goes to shared memory, sums of K. dCB^T is in
//             registers and goes, rounded, where P^T was after the last unit.
//   dX        two of them, each with half of the columns: H or G from the other tile; C H^T, r, I, q, E, dX.
//   outer     dC and dB, in registers: of a unit dY 2^l and X dt 2^(l[end] - l), scaled in registers, times the states; after
//             the last unit what dCB adds. <G, H> and dD.
//   others    a warp each: copies; the clock (what dt and A make of a unit); da and ddt.
//
// What bounds it is the time between instructions of a warp, also until more of its code comes: hence many warps, each with a
// part of a unit, and little code.
//
// Barriers: full[stage], empty[stage]: of a unit, its copies and vectors; copies come to `landed` first where a tile's rows
// have to be cleared. states_full[stage]: H and G are those at the tile's ends. P_full, P_empty. group_full, group_empty: a
// tile's B and C. dCB_full, dCB_empty. results_full[stage], results_empty[stage]: a unit's sums. Two warps that have the same
// rows of dX synchronize before they write it and before it is copied.
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros.
//
// Shared memory: Storage below, 182 to 222 KB: slabs of 64 columns (wgmma.cuh). dX goes out by bulk copies.
//
// fp32: dt, l and the powers, S, dM, I, E, all sums. Rounded to Element: H and G in slots, P, dCB, 2^l dY and dt 2^(l[end] -
// l) X as operands, the factors there to 16 bits in bf16 (scale_factors).

#include "mma.cuh"
#include "ssd_bwd.cuh"
#include "ssd_wgmma.cuh"
#include "unknown.cuh"

namespace oxi {

constexpr int kThreads = 5 * kWarpgroup;
// Registers of a thread at first, and later, found by trial.
constexpr int kRegisters = 65536 / kThreads / 8 * 8;
constexpr int kPairsRegisters = 104;
constexpr int kDxRegisters = 80;
constexpr int kOuterRegisters = 176;
constexpr int kOtherRegisters = 5 * kRegisters - kPairsRegisters - 2 * kDxRegisters - kOuterRegisters;

constexpr int kDxGroups = 2;
// Columns of dX that each of them has, at most.
constexpr int kDxColumns = kSlabColumns / kDxGroups;
constexpr int kStages = kDstate == 256 ? 1 : kDstate == 128 ? 2 : 3;
constexpr int kStateBytes = kSlabsOfB * kStateSlabBytes;
// Blocks that share dB's and dC's columns, and how many slabs of them each has.
constexpr int kParts = kDstate / kColumns;
constexpr int kSlabsOfPart = kSlabsOfB / kParts;
constexpr int kHeaddimSteps = kHeaddim / 16;

struct Unit {
  unsigned char x[kSlabBytes];
  unsigned char dy[kSlabBytes];
  unsigned char H[kStateBytes];
  unsigned char G[kStateBytes];
  // Of the other tile: dY where G is to be found, x where H is.
  unsigned char other[kSlabBytes];
};

// A token: l, dt, the decays to the tile's end and from its start; dt's derivative.
struct Token {
  float l;
  float dt;
  float leaving;
  float entering;
  float slope;
};

// What dt and A make of a unit.
struct UnitVectors {
  Token tokens[kTile];
  // l, by columns (by_column).
  alignas(16) float l[kTile];
  // As scale takes them: 2^l, dt 2^(l[end] - l).
  uint2 factors[2][kTile];
  float D[kHeaddim];
  float over_tile;
  // 2^l, or dt 2^(l[end] - l), of the other tile.
  Vectors<false> other;
};

// A unit's sums, by token: rows of K by the warp that has them; without dt, columns of K, the same with the diagonal, and q;
// r, and with them dt and its derivative. By warp, what <G, H> is, then, of one value a head, dD.
struct alignas(8) Results {
  float K_rows[4][kTile];
  float K_columns[kTile];
  float PM[kTile];
  float q[kDxGroups][kTile];
  float r[kDxGroups][kTile];
  float dt[kTile];
  float slope[kTile];
  float by_warp[8];
};

struct Storage {
  Unit units[kStages];
  unsigned char B[kSlabsOfB * kSlabBytes];
  unsigned char C[kSlabsOfB * kSlabBytes];
  // C of the other tile where G is to be found, B where H is.
  unsigned char other[kSlabsOfB * kSlabBytes];
  // P^T, at last dCB^T.
  unsigned char P[kSlabBytes];
  unsigned char dx[kSlabBytes];
  // As the threads for pairs have it, each its own.
  float4 S[kTile / 8][kWarpgroup];
  UnitVectors vectors[kStages];
  Results results[kStages];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier states_full[kStages];
  Barrier P_full;
  Barrier P_empty;
  Barrier landed;
  Barrier group_full;
  Barrier group_empty;
  Barrier dCB_full;
  Barrier dCB_empty;
  Barrier results_full[kStages];
  Barrier results_empty[kStages];

  // By one thread.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i) {
      // Copies and clock.
      full[i].init(2 * kWarp);
      // Those for pairs, dX and outer.
      empty[i].init((2 + kDxGroups) * kWarpgroup);
      states_full[i].init(kDxGroups * kWarpgroup);
      results_full[i].init((2 + kDxGroups) * kWarpgroup);
      results_empty[i].init(kWarp);
    }
    P_full.init(kWarpgroup);
    P_empty.init(kDxGroups * kWarpgroup);
    landed.init(kWarp);
    group_full.init(kWarp);
    group_empty.init((2 + kDxGroups) * kWarpgroup);
    dCB_full.init(kWarpgroup);
    dCB_empty.init(kWarpgroup);
  }
};
static_assert(sizeof(Storage) <= 227 * 1024);

__device__ __forceinline__ int lane_now() { return unknown(threadIdx.x % kWarp); }

// How many units came before, and whether an odd number of tiles did: what stages and parities are made of. In one register.
class UnitPosition {
 public:
  // With one stage nothing that is made of it is kept in registers from unit to unit either.
  __device__ __forceinline__ int stage() const { return kStages == 1 ? unknown(0) : units() % kStages; }
  __device__ __forceinline__ unsigned parity() const { return units() / kStages % 2; }
  // Of barriers that each unit has, that each tile has.
  __device__ __forceinline__ unsigned parity_of_units() const { return count % 2; }
  __device__ __forceinline__ unsigned parity_of_tiles() const { return count / kTileBit; }

  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ void end_tile() { count ^= kTileBit; }

 private:
  static constexpr unsigned kTileBit = 1u << 31;
  unsigned count = 0;

  __device__ __forceinline__ unsigned units() const { return count % kTileBit; }
};

// The part of the work that a block has.
struct Work {
  const OxiSsdBackward &p;
  Cuts cuts;
  long long b;
  int window;
  int group;

  __device__ __forceinline__ static Work of(const OxiSsdBackward &p) {
    int rest = blockIdx.x / kParts;
    const int group = rest % p.ngroups;
    rest /= p.ngroups;
    const long long b = rest / p.windows;
    return {p, Cuts(p, b), b, rest % p.windows, group};
  }

  // The first one of the slabs of columns that this block has, and whether it does more than its part of dB and dC; not kept in
  // a register.
  __device__ __forceinline__ static int first_slab() { return blockIdx.x % kParts * kSlabsOfPart; }
  __device__ __forceinline__ static bool has_all() { return blockIdx.x % kParts == 0; }

  // The first tile, the one after a tile; of no tokens if there is none.
  __device__ __forceinline__ Span first() const { return tile_from(cuts.first_in(window)); }
  __device__ __forceinline__ Span after(const Span &tile) const { return tile_from(tile.begin + tile.size); }

  __device__ __forceinline__ int heads() const { return p.ssd.heads_per_group; }
  __device__ __forceinline__ int first_head() const { return group * p.ssd.heads_per_group; }
  // Call visit(head, slice) for each unit. There is code for one: all roles' code together has to fit in the cache.
  template <typename Visit>
  __device__ __forceinline__ void each_unit(Visit visit) const {
#pragma unroll 1
    for (int i = 0; i < p.ssd.heads_per_group; ++i) {
#pragma unroll 1
      for (int slice = 0; slice < p.ssd.slices; ++slice) visit(first_head() + i, slice);
    }
  }

  // How a tile has its states: both from slots, or one from what the other tile makes of a slot's.
  enum Source { kSlots, kFindsG, kFindsH };
  __device__ __forceinline__ Source source(const Span &tile) const {
    return cuts.is_odd(tile) ? kFindsH : cuts.has_odd_after(tile) ? kFindsG : kSlots;
  }

  // The other tile.
  __device__ __forceinline__ Span other(const Span &tile, Source source) const {
    if (source == kSlots) return {};
    return source == kFindsG ? cuts.from(tile.begin + tile.size) : cuts.before(tile.begin);
  }

  // What this window's tiles add to a parameter's gradient.
  __device__ __forceinline__ float *partial(int column) const {
    const long long columns = p.ssd.nheads * (2ll + p.dD_columns);
    return p.partials + (b * p.windows + window) * columns + column;
  }
  // Add to it, the first tile setting it.
  __device__ __forceinline__ void add(int column, bool is_first, float value) const {
    float *sum = partial(column);
    *sum = is_first ? value : *sum + value;
  }

 private:
  __device__ __forceinline__ Span tile_from(int begin) const {
    const bool inside = begin < p.ssd.seqlen && begin < (window + 1) * OXI_SSD_TILE;
    return inside ? cuts.from(begin) : Span{};
  }
};

// Have ptxas keep what products read in registers from other use until here: it takes no notice of that itself. Gives 0, which
// it does not know, and which something has to depend on.
template <int N>
__device__ __forceinline__ unsigned keep_until_here(const unsigned (&operands)[N][4]) {
  unsigned all = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) all |= operands[k][0] | operands[k][1] | operands[k][2] | operands[k][3];
  return all & blockIdx.y;
}

// The sum over a row's four lanes.
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// The sums over a warp's rows of a thread's 16 columns 8 i + 2 (lane % 4) + {0, 1}: those of columns 2 lane + {0, 1}.
__device__ __forceinline__ float2 sum_of_columns(float (&values)[16], int lane) {
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int count = 8 >> step;
    const bool upper = lane & (2 * count);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      const float given = upper ? values[i] : values[i + count];
      values[i] = (upper ? values[i + count] : values[i]) + __shfl_xor_sync(kAllLanes, given, 2 * count);
    }
  }
  return make_float2(values[0], values[1]);
}

// dM^T becomes P^T, an operand; dCB^T grows. Sums of dM P over the columns of a thread's two rows, without the diagonal and on
// it; of K by column over its rows.
__device__ __forceinline__ void decay_products(const float (&dM)[kTile / 2], const Storage &storage, const UnitVectors &vectors,
                                               int warp, unsigned (&P)[kTile / 16][4], float (&dCB)[kTile / 2],
                                               float (&K_columns)[2], float (&diagonal)[2], float (&K_rows)[16]) {
  const int lane = lane_now();
  const int row = lane / 4;
  const Token *tokens = vectors.tokens + 16 * warp + row;
  const float l_s[2] = {tokens[0].l, tokens[8].l}, dt[2] = {tokens[0].dt, tokens[8].dt};
#pragma unroll
  for (int i = 0; i < 2; ++i) K_columns[i] = diagonal[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    if (k < warp) {
#pragma unroll
      for (int i = 0; i < 4; ++i) P[k][i] = 0, K_rows[4 * k + i] = 0.0f;
      continue;
    }
    const float4 halves[2] = {storage.S[2 * k][threadIdx.x], storage.S[2 * k + 1][threadIdx.x]};
    const float S[8] = {halves[0].x, halves[0].y, halves[0].z, halves[0].w,
                        halves[1].x, halves[1].y, halves[1].z, halves[1].w};
    const float4 four = *reinterpret_cast<const float4 *>(vectors.l + 16 * k + 4 * (lane % 4));
    const float l_t[4] = {four.x, four.y, four.z, four.w};
    // How far t is past s, of the first column and in the upper left and the lower right quarter; elsewhere far enough.
    const bool is_diagonal = k == warp;
    const int past = is_diagonal ? 2 * (lane % 4) - row : kTile;
    float values[8], sums[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 2 % 2, column = i / 4 * 2 + i % 2;
      const bool in_corner = half != column / 2, is_lower_left = in_corner && half == 1;
      const bool is_before = is_lower_left ? is_diagonal : !in_corner && past + i % 2 < 0;
      const bool is_on = !in_corner && past + i % 2 == 0;
      const float decay = fast_exp2(is_before ? -1e30f : l_t[column] - l_s[half]);
      values[i] = S[i] * decay;
      dCB[8 * k + i] = fmaf(dM[8 * k + i] * decay, dt[half], dCB[8 * k + i]);
      const float all = dM[8 * k + i] * values[i], K = is_on ? 0.0f : all;
      if (is_on) diagonal[half] = all;
      K_columns[half] += K;
      sums[column] = fmaf(K, dt[half], sums[column]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      P[k][i] = join(values[2 * i], values[2 * i + 1], Element());
      K_rows[4 * k + i] = sums[i];
    }
  }
}

__device__ __forceinline__ void multiply_pairs(const Work &work, Storage &storage) {
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  UnitPosition at;
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile), at.end_tile()) {
    float dCB[kTile / 2];
    storage.group_full.wait(at.parity_of_tiles());
    const unsigned B = operand(shared_address(storage.B), 0), C = operand(shared_address(storage.C), 0);
    products_begin();
#pragma unroll
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kTile>::of_shared(dCB, B + along_k(k, kSlabBytes), C + along_k(k, kSlabBytes), k > 0);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(dCB);
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      storage.S[j][threadIdx.x] = make_float4(dCB[4 * j], dCB[4 * j + 1], dCB[4 * j + 2], dCB[4 * j + 3]);
    }
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) dCB[i] = 0.0f;
    // What was dCB of the tile before.
    storage.dCB_empty.wait(at.parity_of_tiles() ^ 1);
    const auto store_operand = [&](auto word) __attribute__((always_inline)) {
      const int lane = lane_now();
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = word(k, i);
        store_blocks(shared_address(storage.P) + slab_offset(16 * warp + lane % 16, 2 * k + lane / 16), words);
      }
      publish_to_products();
    };
    work.each_unit([&](int, int) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      const Unit &own = storage.units[at.stage()];
      const UnitVectors &vectors = storage.vectors[at.stage()];
      Results &results = storage.results[at.stage()];
      float dM[kTile / 2], K_columns[2], diagonal[2], K_rows[16];
      const unsigned x = operand(shared_address(own.x), 0), dy = operand(shared_address(own.dy), 0);
      products_begin();
#pragma unroll
      for (int k = 0; k < kHeaddimSteps; ++k) Product<kTile>::of_shared(dM, x + along_k(k, 0), dy + along_k(k, 0), k > 0);
      end_of_products();
      wait_for_products<0>();
      keep_in_place(dM);
      unsigned P[kTile / 16][4];
      decay_products(dM, storage, vectors, warp, P, dCB, K_columns, diagonal, K_rows);
      if (work.has_all()) {
        storage.P_empty.wait(at.parity_of_units() ^ 1);
        store_operand([&](int k, int i) { return P[k][i]; });
        storage.P_full.arrive();
        const int lane = lane_now();
        const float2 sums = sum_of_columns(K_rows, lane);
        storage.results_empty[at.stage()].wait(at.parity() ^ 1);
        *reinterpret_cast<float2 *>(results.K_rows[warp] + 2 * lane) = sums;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = 16 * warp + lane / 4 + 8 * i;
          const float column = sum_of_row(K_columns[i]), with_diagonal = column + sum_of_row(diagonal[i]);
          if (lane % 4 == 0) {
            results.K_columns[t] = column;
            results.PM[t] = with_diagonal;
          }
        }
        storage.results_full[at.stage()].arrive();
      }
      storage.empty[at.stage()].arrive();
      at.advance();
    });
    storage.group_empty.arrive();
    if (work.has_all()) storage.P_empty.wait(at.parity_of_units() ^ 1);
    store_operand([&](int k, int i) { return join(dCB[8 * k + 2 * i], dCB[8 * k + 2 * i + 1], Element()); });
    storage.dCB_full.arrive();
  }
}

// A state at one of a tile's ends, from a slot's and what the other tile has, in place; rounded.
__device__ __forceinline__ void pass_other_tile(unsigned char *state, const Unit &own, const unsigned char *columns,
                                                const UnitVectors &vectors, int warp, int first_slab, int slabs_apart) {
  const int lane = lane_now(), row = 16 * warp + lane % 16;
  const bool has_rows = 16 * warp < kHeaddim;
  Step step;
  // Which of the two takes no more registers than there are was found by trial.
  step.load(own.other, vectors.other, kDstate == 256 ? unknown(threadIdx.x) : threadIdx.x);
#pragma unroll 1
  for (int slab = first_slab; slab < kSlabsOfB; slab += slabs_apart) {
    const unsigned address = shared_address(state) + slab * kStateSlabBytes;
    const unsigned other = operand(shared_address(columns) + slab * kSlabBytes, 0);
    float value[kSlabColumns / 2];
#pragma unroll
    for (int j = 0; j < kSlabColumns / 8; j += 2) {
      unsigned words[4] = {};
      if (has_rows) load_blocks(words, address + slab_offset(row, j + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[4 * j + 2 * i] = step.over_tile * low(words[i], Element());
        value[4 * j + 2 * i + 1] = step.over_tile * high(words[i], Element());
      }
    }
    keep_in_place(value);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kSlabColumns>::of_registers<kAcrossRows>(value, step.leaving[k], other + across_k(k), 1);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(value);
    if (!has_rows) continue;
    const int swizzled_row = row + keep_until_here(step.leaving);
#pragma unroll
    for (int j = 0; j < kSlabColumns / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = join(value[4 * j + 2 * i], value[4 * j + 2 * i + 1], Element());
      store_blocks(address + slab_offset(swizzled_row, j + lane / 16), words);
    }
  }
  publish_to_products();
}

// What a warpgroup for dX has: up to kDxColumns columns from this one on.
struct DxColumns {
  int index;

  __device__ __forceinline__ int first() const { return index * kDxColumns; }

  // visit(j, words) for each block of 16 x 16 elements, columns 8 j on of these, of a warp's rows of a slab: word i has the
  // columns of accumulators 4 j + 2 i + {0, 1}.
  template <typename Visit>
  __device__ __forceinline__ void each_block(const unsigned char *slab, int warp, int lane, Visit visit) const {
#pragma unroll
    for (int j = 0; j < kDxColumns / 8; j += 2) {
      if (first() + 8 * j >= kHeaddim) continue;
      unsigned words[4];
      load_blocks(words, shared_address(slab) + slab_offset(16 * warp + lane % 16, first() / 8 + j + lane / 16));
      visit(j, words);
    }
  }

  // Sums over a thread's columns of values times a slab's elements, of its two rows, over their lanes.
  __device__ __forceinline__ void dot_rows(const float (&values)[kDxColumns / 2], const unsigned char *slab, int warp,
                                           float (&sums)[2]) const {
    sums[0] = sums[1] = 0.0f;
    each_block(slab, warp, lane_now(), [&](int j, const unsigned (&words)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i % 2] = fmaf(values[4 * j + 2 * i], low(words[i], Element()), sums[i % 2]);
        sums[i % 2] = fmaf(values[4 * j + 2 * i + 1], high(words[i], Element()), sums[i % 2]);
      }
    });
    sums[0] = sum_of_row(sums[0]);
    sums[1] = sum_of_row(sums[1]);
  }

  // d = A other^T, of a tile's B or C and these rows of a state. Past kHeaddim they are of no use.
  __device__ __forceinline__ void multiply_state(float (&d)[kDxColumns / 2], const unsigned char *tile,
                                                 const unsigned char *state) const {
    const unsigned a = operand(shared_address(tile), 0);
    const unsigned b = operand(shared_address(state) + first() * kSlabRowBytes, 0);
    products_begin();
#pragma unroll
    for (int k = 0; k < kDstate / 16; ++k) {
      Product<kDxColumns>::of_shared(d, a + along_k(k, kSlabBytes), b + along_k(k, kStateSlabBytes), k > 0);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(d);
  }
};

// visit(i, row) for a thread's two rows, by the first one of their lanes.
template <typename Visit>
__device__ __forceinline__ void each_own_row(int warp, Visit visit) {
  const int lane = lane_now(), row = 16 * warp + lane / 4;
  if (lane % 4 > 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) visit(i, row + 8 * i);
}

__device__ __forceinline__ void find_dX(const OxiSsdBackwardMapped &mapped, const Work &work, Storage &storage, int index) {
  const OxiSsdBackward &p = work.p;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  const DxColumns columns{index};
  // The two warps with the same rows.
  const auto synchronize_rows = [&]() { asm volatile("bar.sync %0, %1;" ::"r"(1 + warp), "n"(kDxGroups * kWarp) : "memory"); };
  UnitPosition at;
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile), at.end_tile()) {
    storage.group_full.wait(at.parity_of_tiles());
    const Work::Source source = work.source(tile);
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      Unit &own = storage.units[at.stage()];
      const UnitVectors &vectors = storage.vectors[at.stage()];
      Results &results = storage.results[at.stage()];
      if (source != Work::kSlots) {
        pass_other_tile(source == Work::kFindsG ? own.G : own.H, own, storage.other, vectors, warp, work.first_slab() + index,
                        kDxGroups);
      }
      storage.states_full[at.stage()].arrive();
      if (!work.has_all()) {
        storage.empty[at.stage()].arrive();
        at.advance();
        return;
      }
      storage.states_full[at.stage()].wait(at.parity());
      // First C H^T, then E.
      float E[kDxColumns / 2], sums[2];
      columns.multiply_state(E, storage.C, own.H);
      columns.dot_rows(E, own.dy, warp, sums);
      storage.results_empty[at.stage()].wait(at.parity() ^ 1);
      each_own_row(warp, [&](int i, int row) {
        const Token &token = vectors.tokens[row];
        results.r[index][row] = token.entering * sums[i];
        results.dt[row] = token.dt;
        results.slope[row] = token.slope;
      });
      columns.multiply_state(E, storage.B, own.G);
      {
        const Token *tokens = vectors.tokens + 16 * warp + lane_now() / 4;
        const float leaving[2] = {tokens[0].leaving, tokens[8].leaving};
#pragma unroll
        for (int i = 0; i < kDxColumns / 2; ++i) E[i] *= leaving[i / 2 % 2];
      }
      columns.dot_rows(E, own.x, warp, sums);
      each_own_row(warp, [&](int i, int row) { results.q[index][row] = sums[i]; });
      storage.results_full[at.stage()].arrive();
      keep_in_place(E);
      storage.P_full.wait(at.parity_of_units());
      {
        const unsigned P = operand(shared_address(storage.P), 0);
        const unsigned dy = operand(shared_address(own.dy) + columns.first() * sizeof(Element), 0);
        products_begin();
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
          Product<kDxColumns>::template of_shared<kAlongRows, kAcrossRows>(E, P + along_k(k, 0), dy + across_k(k), 1);
        }
        end_of_products();
      }
      // Before the rows of dX are written: the copy from there of the unit before.
      if (index == 0 && lane_now() == 0) wait_for_bulk_reads<0>();
      synchronize_rows();
      wait_for_products<0>();
      keep_in_place(E);
      storage.P_empty.arrive();
      const int lane = lane_now();
      const Token *tokens = vectors.tokens + 16 * warp + lane / 4;
      const float dt[2] = {tokens[0].dt, tokens[8].dt};
      columns.each_block(own.dy, warp, lane, [&](int j, unsigned (&words)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *own_D = vectors.D + columns.first() + 8 * (j + i / 2) + 2 * (lane % 4);
          const float2 D = *reinterpret_cast<const float2 *>(own_D);
          const float *own_E = E + 4 * j + 2 * i;
          words[i] = join(fmaf(dt[i % 2], own_E[0], D.x * low(words[i], Element())),
                          fmaf(dt[i % 2], own_E[1], D.y * high(words[i], Element())), Element());
        }
        const int chunk = columns.first() / 8 + j + lane / 16;
        store_blocks(shared_address(storage.dx) + slab_offset(16 * warp + lane % 16, chunk), words);
      });
      storage.empty[at.stage()].arrive();
      at.advance();
      publish_to_products();
      synchronize_rows();
      if (index > 0) return;
      // A tile's rows past its tokens are another's, or lie past the sequence's end, where bulk copies end too.
      const int first = slice * p.ssd.slice_step;
      const bool in_boxes = kHeaddim == kSlabColumns && (tile.size == kTile || tile.begin + tile.size == p.ssd.seqlen);
      if (__builtin_expect(in_boxes, 1)) {
        if (lane_now() == 0) {
          store_box(mapped.dx, first, head, tile.begin + 16 * warp, static_cast<int>(work.b),
                    storage.dx + 16 * warp * kSlabRowBytes);
        }
      } else {
        constexpr int kChunks = kHeaddim / 8;
        const int chunks = min(kHeaddim, p.ssd.headdim - first) / 8;
        Element *dx = static_cast<Element *>(p.dx.data) + unknown(static_cast<int>(work.b)) * p.dx.stride[0] +
                      unknown(tile.begin) * p.dx.stride[1] + head * p.dx.stride[2] + first;
#pragma unroll 1
        for (int i = lane_now(); i < 16 * kChunks; i += kWarp) {
          const int t = 16 * warp + i / kChunks, chunk = i % kChunks;
          const uint4 words = *reinterpret_cast<const uint4 *>(storage.dx + slab_offset(t, chunk));
          if (t < tile.size && chunk < chunks) *reinterpret_cast<uint4 *>(dx + t * p.dx.stride[1] + 8 * chunk) = words;
        }
      }
    });
    storage.group_empty.arrive();
  }
  if (index == 0 && threadIdx.x % kWarp == 0) wait_for_bulk_reads<0>();
}

// Of products of 16 rows and 16 columns, in two accumulators, what a lane has on their diagonal: of row lane / 4, and of the
// one 8 rows on; zeros if it has nothing of it.
__device__ __forceinline__ float2 diagonal_of(const float (&left)[4], const float (&right)[4]) {
  const int lane = lane_now();
  if (lane / 8 != lane % 4) return make_float2(0.0f, 0.0f);
  const bool odd = lane / 4 % 2;
  return make_float2(odd ? left[1] : left[0], odd ? right[3] : right[2]);
}

// dD of a warp's 16 columns, <G, H> of as many rows of the states: diagonals of dY^T X and of G H^T.
__device__ __forceinline__ float2 multiply_inputs(const Unit &own, int warp) {
  const Blocks dy(reinterpret_cast<const Element *>(own.dy), kSlabColumns, Order::ALONG);
  const Blocks x(reinterpret_cast<const Element *>(own.x), kSlabColumns);
  float left[4] = {}, right[4] = {};
#pragma unroll
  for (int t = 0; t < kTile; t += 16) {
    const Block a = dy.load_transposed(t, 16 * warp), b = x.load_transposed(t, 16 * warp);
    mma(left, a.word, b.word[0], b.word[1], Element());
    mma(right, a.word, b.word[2], b.word[3], Element());
  }
  return diagonal_of(left, right);
}
__device__ __forceinline__ float multiply_states(const Unit &own, int warp) {
  float left[4] = {}, right[4] = {};
#pragma unroll
  for (int slab = 0; slab < kSlabsOfB; ++slab) {
    const Blocks G(reinterpret_cast<const Element *>(own.G + slab * kStateSlabBytes), kSlabColumns);
    const Blocks H(reinterpret_cast<const Element *>(own.H + slab * kStateSlabBytes), kSlabColumns, Order::ALONG);
#pragma unroll
    for (int column = 0; column < kSlabColumns; column += 16) {
      const Block a = G.load(16 * warp, column), b = H.load(16 * warp, column);
      mma(left, a.word, b.word[0], b.word[1], Element());
      mma(right, a.word, b.word[2], b.word[3], Element());
    }
  }
  const float2 sums = diagonal_of(left, right);
  float sum[1] = {sums.x + sums.y};
  warp_sum(sum);
  return sum[0];
}

// dC and dB; <G, H> and dD.
__device__ __forceinline__ void sum_outer(const Work &work, Storage &storage) {
  const OxiSsdBackward &p = work.p;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  UnitPosition at;
  bool is_first = true;
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile), at.end_tile(), is_first = false) {
    float dC[kColumns / 2], dB[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dC[i] = dB[i] = 0.0f;
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      const Unit &own = storage.units[at.stage()];
      const UnitVectors &vectors = storage.vectors[at.stage()];
      const auto add = [&](float (&sums)[kColumns / 2], const unsigned char *rows, const uint2 *factors_of_rows,
                           const unsigned char *state) __attribute__((always_inline)) {
        const int lane = lane_now(), row = 16 * warp + lane / 4;
        const uint2 factors[2] = {factors_of_rows[row], factors_of_rows[row + 8]};
        const unsigned other = operand(shared_address(state) + work.first_slab() * kStateSlabBytes, kStateSlabBytes);
        // At a time, as there are registers.
        constexpr int kSteps = kDstate == 256 ? 2 : 4;
#pragma unroll
        for (int first = 0; first < kHeaddimSteps; first += kSteps) {
          unsigned scaled[kSteps][4];
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            if (first + k >= kHeaddimSteps) {
#pragma unroll
              for (int i = 0; i < 4; ++i) scaled[k][i] = 0;
              continue;
            }
            const int chunk = 2 * (first + k) + lane / 16;
            load_blocks(scaled[k], shared_address(rows) + slab_offset(16 * warp + lane % 16, chunk));
#pragma unroll
            for (int i = 0; i < 4; ++i) scaled[k][i] = scale(scaled[k][i], factors[i % 2], Element());
          }
          products_begin();
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            if (first + k >= kHeaddimSteps) break;
            Product<kColumns>::template of_registers<kAcrossRows>(sums, scaled[k], other + across_k(first + k), 1);
          }
          end_of_products();
          wait_for_products<0>();
          keep_in_place(sums);
        }
      };
      storage.states_full[at.stage()].wait(at.parity());
      add(dC, own.dy, vectors.factors[0], own.H);
      add(dB, own.x, vectors.factors[1], own.G);
      if (work.has_all()) {
        float GH = 0.0f, dD = 0.0f;
        if (16 * warp < kHeaddim) {
          GH = vectors.over_tile * multiply_states(own, warp);
          if (p.dD_columns > 0) {
            const float2 sums = multiply_inputs(own, warp);
            if (p.dD_columns == 1) {
              float sum[1] = {sums.x + sums.y};
              warp_sum(sum);
              dD = sum[0];
            } else if (lane_now() / 8 == lane_now() % 4) {
              const int row = slice * p.ssd.slice_step + 16 * warp + lane_now() / 4;
              const int column = 2 * p.ssd.nheads + head * p.dD_columns + row;
              if (row < p.ssd.headdim) work.add(column, is_first, sums.x);
              if (row + 8 < p.ssd.headdim) work.add(column + 8, is_first, sums.y);
            }
          }
        }
        storage.results_empty[at.stage()].wait(at.parity() ^ 1);
        if (lane_now() == 0) {
          storage.results[at.stage()].by_warp[warp] = GH;
          storage.results[at.stage()].by_warp[4 + warp] = dD;
        }
        storage.results_full[at.stage()].arrive();
      }
      storage.empty[at.stage()].arrive();
      at.advance();
    });
    storage.group_full.wait(at.parity_of_tiles());
    storage.dCB_full.wait(at.parity_of_tiles());
    const unsigned dCB = operand(shared_address(storage.P), 0);
    const auto columns = [&](const unsigned char *slabs) {
      return operand(shared_address(slabs) + work.first_slab() * kSlabBytes, kSlabBytes);
    };
    const unsigned B = columns(storage.B), C = columns(storage.C);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kColumns>::template of_shared<kAcrossRows, kAcrossRows>(dC, dCB + across_k(k), B + across_k(k), 1);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(dC);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kColumns>::template of_shared<kAlongRows, kAcrossRows>(dB, dCB + along_k(k, 0), C + across_k(k), 1);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(dB);
    storage.dCB_empty.arrive();
    storage.group_empty.arrive();
    const auto store = [&](const OxiTensor4 &tensor, const float (&sums)[kColumns / 2]) __attribute__((always_inline)) {
      const int lane = lane_now(), row = 16 * warp + lane / 4;
      Element *to = static_cast<Element *>(tensor.data) + unknown(static_cast<int>(work.b)) * tensor.stride[0] +
                    unknown(work.group) * tensor.stride[2] + unknown(tile.begin + row) * tensor.stride[1] +
                    work.first_slab() * kSlabColumns + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half < tile.size) {
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j) {
            const float *pair = sums + 4 * j + 2 * half;
            *reinterpret_cast<unsigned *>(to + 8 * half * tensor.stride[1] + 8 * j) = join(pair[0], pair[1], Element());
          }
        }
      }
    };
    store(p.dC, dC);
    store(p.dB, dB);
  }
}

// By one warp: zeros.
__device__ __forceinline__ void clear(unsigned char *from, int bytes) {
#pragma unroll 1
  for (int at = threadIdx.x % kWarp * 16; at < bytes; at += kWarp * 16) {
    *reinterpret_cast<uint4 *>(from + at) = make_uint4(0, 0, 0, 0);
  }
}

// By one warp: copies.
__device__ __forceinline__ void load_units(const OxiSsdBackwardMapped &mapped, const Work &work, Storage &storage) {
  const OxiSsdBackward &p = work.p;
  const int lane = threadIdx.x % kWarp, b = static_cast<int>(work.b);
  UnitPosition at;
  unsigned landed_parity = 0;
  const auto wait_for_copies = [&]() {
    __syncwarp();
    storage.landed.arrive();
    storage.landed.wait(landed_parity);
    landed_parity ^= 1;
  };
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile), at.end_tile()) {
    const Work::Source source = work.source(tile);
    const Span other = work.other(tile, source);
    const int entry = source == Work::kFindsH ? entry_slot(p, work.b, other) : entry_slot(p, work.b, tile);
    const int exit = source == Work::kFindsG ? exit_slot(p, other) : exit_slot(p, tile);
    const OxiTensorMap &other_rows = source == Work::kFindsG ? mapped.dy : mapped.x;
    const OxiTensorMap &other_columns = source == Work::kFindsG ? mapped.C : mapped.B;
    // Past a sequence's end copies give zeros, past a tile's end what is another's.
    const auto cut = [&](const Span &tile) { return tile.size < kTile && tile.begin + tile.size < p.ssd.seqlen; };
    const bool is_cut = cut(tile) || (source != Work::kSlots && cut(other));
    const auto clear_past = [&](unsigned char *slab, const Span &tile) {
      clear(slab + tile.size * kSlabRowBytes, kSlabBytes - tile.size * kSlabRowBytes);
    };
    const auto load_group = [&]() {
      storage.group_empty.wait(at.parity_of_tiles() ^ 1);
      Barrier &arrived = is_cut ? storage.landed : storage.group_full;
      if (lane == 0) {
        arrived.expect((source == Work::kSlots ? 2 : 3) * kSlabsOfB * kSlabBytes);
#pragma unroll 1
        for (int slab = 0; slab < kSlabsOfB; ++slab) {
          const int at = slab * kSlabBytes, column = slab * kSlabColumns;
          copy_box(storage.B + at, mapped.B, column, work.group, tile.begin, b, arrived);
          copy_box(storage.C + at, mapped.C, column, work.group, tile.begin, b, arrived);
          if (source != Work::kSlots) {
            copy_box(storage.other + at, other_columns, column, work.group, other.begin, b, arrived);
          }
        }
      }
      if (is_cut) {
        wait_for_copies();
        for (int slab = 0; slab < kSlabsOfB; ++slab) {
          clear_past(storage.B + slab * kSlabBytes, tile);
          clear_past(storage.C + slab * kSlabBytes, tile);
          clear_past(storage.other + slab * kSlabBytes, other);
        }
        publish_to_products();
      }
      storage.group_full.arrive();
    };
    load_group();
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      storage.empty[at.stage()].wait(at.parity() ^ 1);
      Unit &own = storage.units[at.stage()];
      Barrier &arrived = is_cut ? storage.landed : storage.full[at.stage()];
      if (lane == 0) {
        const int first = slice * p.ssd.slice_step;
        // Of states no more than what is needed.
        const int begin = work.first_slab() * kStateSlabBytes;
        const int bytes = kStateBytes - begin;
        arrived.expect((source == Work::kSlots ? 2 : 3) * kSlabBytes + ((entry >= 0) + (exit >= 0)) * bytes);
        copy_box(own.x, mapped.x, first, head, tile.begin, b, arrived);
        copy_box(own.dy, mapped.dy, first, head, tile.begin, b, arrived);
        if (source != Work::kSlots) copy_box(own.other, other_rows, first, head, other.begin, b, arrived);
        const auto copy_state = [&](unsigned char *to, bool of_gradients, int slot) {
          if (slot < 0) return;
          const long long index = state_index(p, of_gradients, work.b, slot, head, slice);
          copy_bytes(to + begin, static_cast<const unsigned char *>(p.states) + index * kStateBytes + begin, bytes, arrived);
        };
        copy_state(own.G, true, exit);
        copy_state(own.H, false, entry);
      }
      if (entry < 0) clear(own.H, kStateBytes);
      if (exit < 0) clear(own.G, kStateBytes);
      if (is_cut) {
        wait_for_copies();
        clear_past(own.x, tile);
        clear_past(own.dy, tile);
        clear_past(own.other, other);
      }
      if (is_cut || entry < 0 || exit < 0) publish_to_products();
      storage.full[at.stage()].arrive();
      at.advance();
    });
  }
}

// By one warp: what dt and A make of each unit, from what the walks have left.
__device__ __forceinline__ void keep_time(const Work &work, Storage &storage) {
  const OxiSsd &p = work.p.ssd;
  const int lane = threadIdx.x % kWarp;
  const long long tokens = static_cast<long long>(work.p.batch) * p.nheads * p.seqlen;
  UnitPosition at;
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile)) {
    const Work::Source source = work.source(tile);
    const Span other = source == Work::kSlots ? tile : work.other(tile, source);
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      // While the stage is not free yet. Of a lane's two tokens; past a tile's, dt is 0 and l that of its last one.
      const float *line = work.p.tokens + (work.b * p.nheads + head) * p.seqlen;
      float dt[2], l[2], slope[2], other_dt[2], other_l[2], D[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto load = [&](const Span &tile, float &dt, float &l) {
          const float *own = line + tile.begin + min(2 * lane + i, tile.size - 1);
          dt = 2 * lane + i < tile.size ? own[0] : 0.0f;
          l = own[tokens];
          return own[2 * tokens];
        };
        slope[i] = load(tile, dt[i], l[i]);
        load(other, other_dt[i], other_l[i]);
        const int row = slice * p.slice_step + 2 * lane + i;
        D[i] = p.D.data == nullptr || row >= p.headdim
                   ? 0.0f
                   : load_either<Element>(p.D.data, head * p.D.stride[0] + row * p.D.stride[1], p.wide_D);
      }
      storage.empty[at.stage()].wait(at.parity() ^ 1);
      UnitVectors &vectors = storage.vectors[at.stage()];
      const float total = __shfl_sync(kAllLanes, l[1], kWarp - 1);
      *reinterpret_cast<float2 *>(vectors.l + by_column(2 * lane)) = make_float2(l[0], l[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * lane + i;
        const float entering = fast_exp2(l[i]), leaving = fast_exp2(total - l[i]);
        vectors.tokens[t] = {l[i], dt[i], leaving, entering, slope[i]};
        vectors.factors[0][t] = scale_factors(entering, entering, Element());
        vectors.factors[1][t] = scale_factors(dt[i] * leaving, dt[i] * leaving, Element());
        if (t < kHeaddim) vectors.D[t] = D[i];
      }
      if (lane == 0) vectors.over_tile = fast_exp2(total);
      if (source != Work::kSlots) {
        const float total = __shfl_sync(kAllLanes, other_l[1], kWarp - 1);
        float factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          factors[i] = source == Work::kFindsG ? fast_exp2(other_l[i]) : other_dt[i] * fast_exp2(total - other_l[i]);
        }
        vectors.other.leaving[by_column(2 * lane) / 2] = scale_factors(factors[0], factors[1], Element());
        if (lane == 0) vectors.other.over_tile = fast_exp2(total);
      }
      storage.full[at.stage()].arrive();
      at.advance();
    });
  }
}

// By one warp: da, ddt, and what the tiles add to dA and ddt_bias.
__device__ __forceinline__ void finish_heads(const Work &work, Storage &storage) {
  const OxiSsdBackward &params = work.p;
  const OxiSsd &p = params.ssd;
  const int lane = threadIdx.x % kWarp;
  UnitPosition at;
  bool is_first = true;
  for (Span tile = work.first(); tile.size > 0; tile = work.after(tile), is_first = false) {
#pragma unroll 1
    for (int i = 0; i < work.heads(); ++i) {
      const int head = work.first_head() + i;
      float2 dl = {}, EX = {}, q = {}, dt, slope;
      float by_warp = 0.0f;
      const auto pair = [&](const float *values) { return *reinterpret_cast<const float2 *>(values + 2 * lane); };
      const auto add = [](float2 &sum, float2 value) { sum.x += value.x, sum.y += value.y; };
#pragma unroll 1
      for (int slice = 0; slice < p.slices; ++slice) {
        const int stage = at.stage();
        storage.results_full[stage].wait(at.parity());
        const Results &results = storage.results[stage];
#pragma unroll
        for (int warp = 0; warp < 4; ++warp) add(dl, pair(results.K_rows[warp]));
        const float2 columns = pair(results.K_columns);
        float2 own_q = pair(results.q[0]);
        add(own_q, pair(results.q[1]));
        dt = pair(results.dt);
        slope = pair(results.slope);
        add(dl, make_float2(-dt.x * columns.x, -dt.y * columns.y));
        add(dl, pair(results.r[0]));
        add(dl, pair(results.r[1]));
        add(EX, pair(results.PM));
        add(EX, own_q);
        add(q, make_float2(dt.x * own_q.x, dt.y * own_q.y));
        if (lane < 8) by_warp += results.by_warp[lane];
        storage.results_empty[stage].arrive();
        at.advance();
      }
      // Under way during the sums over lanes.
      const float A = load_either<Element>(p.A.data, head * p.A.step, p.A.dtype == OXI_F32);
      float totals[1] = {by_warp};
      warp_sum(totals, 4);
      const float GH = __shfl_sync(kAllLanes, totals[0], 0), dD = __shfl_sync(kAllLanes, totals[0], 4);
      // Of dl over this lane's tokens and all later lanes', of q over this lane's and all earlier ones'.
      float after = dl.x + dl.y, before = q.x + q.y;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const float later = __shfl_down_sync(kAllLanes, after, step), earlier = __shfl_up_sync(kAllLanes, before, step);
        if (lane + step < kWarp) after += later;
        if (lane >= step) before += earlier;
      }
      after = __shfl_down_sync(kAllLanes, after, 1);
      before = __shfl_up_sync(kAllLanes, before, 1);
      if (lane == kWarp - 1) after = 0.0f;
      if (lane == 0) before = 0.0f;
      const float da[2] = {dl.x + (dl.y + after) + (before + GH), dl.y + after + (before + q.x + GH)};
      float sums[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = 2 * lane + j;
        if (t >= tile.size) continue;
        const float ddt = j == 0 ? (EX.x + A * da[0]) * slope.x : (EX.y + A * da[1]) * slope.y;
        const long long offset = unknown(static_cast<int>(work.b)) * params.ddt.stride[0] +
                                 (tile.begin + t) * params.ddt.stride[1] + head * params.ddt.stride[2];
        store_scalar(params.ddt.data, params.wide_ddt ? OXI_F32 : kDtype<Element>, offset, ddt);
        sums[0] = fmaf(j == 0 ? dt.x : dt.y, da[j], sums[0]);
        sums[1] += ddt;
      }
      warp_sum(sums);
      if (lane == 0) {
        work.add(head, is_first, sums[0]);
        work.add(p.nheads + head, is_first, sums[1]);
        if (params.dD_columns == 1) work.add(2 * p.nheads + head, is_first, dD);
      }
    }
  }
  if (!is_first) return;
  for (int i = lane; i < work.heads(); i += kWarp) {
    const int head = work.first_head() + i;
    *work.partial(head) = *work.partial(p.nheads + head) = 0.0f;
  }
  const int first = 2 * p.nheads + work.first_head() * params.dD_columns;
  for (int i = lane; i < work.heads() * params.dD_columns; i += kWarp) *work.partial(first + i) = 0.0f;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    KERNEL(const __grid_constant__ OxiSsdBackwardMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage &storage = *reinterpret_cast<Storage *>(shared);
  const Work work = Work::of(mapped.bwd);
  if (threadIdx.x == 0) {
    storage.init();
    publish_to_products();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(mapped.x);
    prefetch_map(mapped.dy);
    prefetch_map(mapped.B);
    prefetch_map(mapped.C);
    prefetch_map(mapped.dx);
  }
  wait_for_earlier_work();
  __syncthreads();
  // The same for a warp, which the compiler has to know of products.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp < 4) {
    change_registers<kPairsRegisters, kRegisters>();
    multiply_pairs(work, storage);
  } else if (warp < 12) {
    change_registers<kDxRegisters, kRegisters>();
    find_dX(mapped, work, storage, warp / 4 - 1);
  } else if (warp < 16) {
    change_registers<kOuterRegisters, kRegisters>();
    sum_outer(work, storage);
  } else {
    change_registers<kOtherRegisters, kRegisters>();
    if (warp == 16) load_units(mapped, work, storage);
    if (warp == 17) keep_time(work, storage);
    if (warp == 18 && work.has_all()) finish_heads(work, storage);
  }
}

}  // namespace oxi
