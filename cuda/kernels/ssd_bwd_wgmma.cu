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
// Grid: as many blocks as multiprocessors, each with one *window* of 64 tokens after another, for the heads of a group: with
// the tiles that begin there, one where a sequence is one run. Heads, or slices of kHeaddim rows of their states, are its
// *units*, in order. With a dstate of 256 two blocks do so, a cluster, each with its part of dstate, that is of the columns of
// B, C, H, G, dB and dC, and with half of dX's columns; both find P and dCB.
//
// States come from slots at every other boundary (ssd_bwd.cuh): where an odd tile begins, H is found from the slot of the even
// one before it and that one's X and B; where an even tile ends that an odd one follows, G from the slot behind that one and
// its dY and C, as ssd_bwd_wgmma_states.cu does. What the *other* tile has for that is part of a unit, or with B and C.
//
// Warpgroups, whose products are of rows s, but those with C of rows t:
//
//   pairs     S, transposed, to shared memory; of a unit dM^T, P^T, which goes to shared memory, sums of K; dM's diagonal,
//             for dD. dCB^T is in registers and goes, rounded, where S was after the last unit.
//   dX        two of them, each with every other unit: H or G from the other tile; C H^T, r, I, q, E, dX.
//   outer     dC and dB, in registers: of a unit dY 2^l and X dt 2^(l[end] - l), scaled in registers, times the states; after
//             the last unit what dCB adds. <G, H>.
//   others    a warp each: copies; the clock (what dt and A make of a unit); dD, if a head has more than one; da and ddt.
//
// What bounds it is the way of a unit's stage: copies, the state from the other tile, then dX's and outer's products with
// states, until it is free for the next copies. On that way warps wait for one another's accesses to shared memory, which is
// busy two thirds of the time, and for more of their code: hence many warps, each with a part of a unit or with every other
// one, little code, and no access that can be done without.
//
// Sums over dstate of a cluster's blocks, which are in step but for what stages allow: of S each sends all of its part to the
// other, so that both have the whole; of I what is of the other's columns of dX, from where E and dX are of a block's own
// columns alone. The sums r, q and <G, H> are linear in those over dstate: both blocks' go to the first one, which also has
// what is not of a part: K, dD, da and ddt.
//
// Barriers: other_full[stage]: what the state at one of a unit's ends is found from; full[stage]: its other copies; of both
// the vectors. empty[stage]: a unit has left. Copies come to `landed` first where a tile's rows have to be cleared.
// kept_empty[kept stage]: dY and the vectors, which dX needs to its end; the rest of a unit it leaves before.
// states_full[stage]: H and G are those at the tile's ends. P_full by the warpgroup for dX whose unit it is, P_empty. dCB_full:
// dCB is where S was; dCB_empty: dC and dB, which come there after it, have left. group_full, group_empty: a tile's B and C.
// results_full[stage], results_empty[stage]: a unit's sums, in the first block; a second one has the latter too, of the first
// one's. From the other block, S_full, S_empty: a tile's S; received_full[stage]: a unit's I.
//
// A document's tokens are multiplied with nothing of another's: a tile is of one run, rows past its tokens are zeros.
//
// Shared memory: Storage below, 205 to 227 KB: slabs of 64 columns (wgmma.cuh). dX goes out by bulk copies, but from two blocks
// by each warp's stores.
//
// fp32: dt, l and the powers, S, dM, I, E, all sums. Rounded to Element: H and G in slots, P, dCB, 2^l dY and dt 2^(l[end] -
// l) X as operands, the factors there to 16 bits in bf16 (scale_factors).

#include "cluster.cuh"
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

// Each with every other unit: a unit takes it longer than any other warpgroup.
constexpr int kDxGroups = 2;
constexpr int kStages = kDstate == 64 ? 3 : 2;
// Of what dX needs to its end, dY and the vectors.
constexpr int kKeptStages = kStages + 1;
// Blocks that share a window, each with a part of dstate, and how many slabs of columns that is.
constexpr int kParts = kDstate / kColumns;
constexpr int kSlabsOfPart = kSlabsOfB / kParts;
constexpr int kStateBytes = kSlabsOfPart * kStateSlabBytes;
// Columns of dX of which a block finds sums over its part of dstate, and those that it then finds dX of.
constexpr int kDxColumns = kParts == 1 ? kHeaddim : kSlabColumns;
constexpr int kOwnColumns = kDxColumns / kParts;
constexpr int kHeaddimSteps = kHeaddim / 16;

// Which part of a window's blocks this one is; not kept in a register.
__device__ __forceinline__ int part_now() { return blockIdx.x % kParts; }

struct Unit {
  unsigned char x[kSlabBytes];
  unsigned char H[kStateBytes];
  unsigned char G[kStateBytes];
  // Of the other tile: dY where G is to be found, x where H is.
  unsigned char other[kSlabBytes];
};

// A token: l, dt, the decays to the tile's end and from its start.
struct alignas(16) Token {
  float l;
  float dt;
  float leaving;
  float entering;
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
// r; the diagonal of dM, whose sum is dD where a head has one. Parts of <G, H>.
struct alignas(8) Results {
  float K_rows[4][kTile];
  float K_columns[kTile];
  float PM[kTile];
  // r, then q.
  float of_states[2][kParts][kTile];
  float dM_diagonal[kTile];
  float GH[kParts][kWarp];

  // What of it a window's blocks send.
  static constexpr int kSentBytes = sizeof(of_states) + sizeof(GH);
};

// S, transposed, of the columns t from the diagonal's 16 on, as the threads for pairs have it, each its own: in each step of 16
// columns two fours.
struct Products {
  float4 value[4 + 3 + 2 + 1][2][kWarp];

  __device__ __forceinline__ float4 &at(int warp, int step, int half) {
    return value[warp * (7 - warp) / 2 + step][half][threadIdx.x % kWarp];
  }
  __device__ __forceinline__ const float4 &at(int warp, int step, int half) const {
    return const_cast<Products *>(this)->at(warp, step, half);
  }
};

// What a window's two blocks send each other of sums over dstate, of which each has its part.
template <int kBlocks>
struct Exchange {
  static_assert(kBlocks == 2);
  // B G^T in this block's columns of dX, as the threads have it, from the other block.
  float4 received[kStages][kOwnColumns / 8][kWarpgroup];
  Barrier received_full[kStages];
  Barrier S_full;
  Barrier S_empty;

  __device__ __forceinline__ void init() {
    for (Barrier &barrier : received_full) barrier.init(kWarpgroup);
    S_full.init(kWarpgroup);
    // The other block's warps for outer.
    S_empty.init(kWarpgroup / kWarp);
  }

  // By the threads for pairs: a tile's S, by way of where the other block keeps it.
  __device__ __forceinline__ void complete_S(float (&S)[kTile / 2], Products &kept, int warp, unsigned parity) {
    S_empty.wait_for_cluster(parity ^ 1);
    const unsigned to = address_in(1 - part_now(), &kept.at(warp, 0, 0)), full = address_in(1 - part_now(), &S_full);
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      if (i / 2 < warp) continue;
      send(to + i * sizeof(kept.value[0][0]), make_float4(S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]), full);
    }
    if (threadIdx.x == 0) S_full.expect(sizeof(kept));
    S_full.arrive();
    S_full.wait_for_cluster(parity);
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      if (i / 2 >= warp) add(&S[4 * i], kept.at(warp, i / 2, i % 2));
    }
  }
  // By the threads for outer, when nothing is left where it was.
  __device__ __forceinline__ void release_S() {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) S_empty.arrive_in(1 - part_now());
  }

  // By the threads for dX: of B G^T the own columns' sums stay, the others are sent. By then the other block has read what was
  // sent to this stage before.
  __device__ __forceinline__ void share(const float (&sums)[kDxColumns / 2], float (&own)[kOwnColumns / 2], int stage) {
    const int thread = unknown(threadIdx.x % kWarpgroup), part = part_now();
    const unsigned to = address_in(1 - part, &received[stage][0][thread]);
    const unsigned full = address_in(1 - part, &received_full[stage]);
#pragma unroll
    for (int j = 0; j < kOwnColumns / 8; ++j) {
      float others[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = sums[4 * j + i], second = sums[kOwnColumns / 2 + 4 * j + i];
        own[4 * j + i] = part == 0 ? first : second;
        others[i] = part == 0 ? second : first;
      }
      send(to + j * sizeof(received[0][0]), make_float4(others[0], others[1], others[2], others[3]), full);
    }
    if (thread == 0) received_full[stage].expect(sizeof(received[0]));
    received_full[stage].arrive();
  }
  __device__ __forceinline__ void complete(float (&own)[kOwnColumns / 2], int stage, unsigned parity) {
    received_full[stage].wait_for_cluster(parity);
#pragma unroll
    for (int j = 0; j < kOwnColumns / 8; ++j) add(&own[4 * j], received[stage][j][unknown(threadIdx.x % kWarpgroup)]);
  }

 private:
  __device__ __forceinline__ static void add(float *sums, const float4 &others) {
    sums[0] += others.x, sums[1] += others.y, sums[2] += others.z, sums[3] += others.w;
  }
};

// One block has all of the sums.
template <>
struct Exchange<1> {
  __device__ __forceinline__ void init() {}
  __device__ __forceinline__ void complete_S(float (&)[kTile / 2], Products &, int, unsigned) {}
  __device__ __forceinline__ void release_S() {}
  __device__ __forceinline__ void share(const float (&sums)[kDxColumns / 2], float (&own)[kOwnColumns / 2], int) {
#pragma unroll
    for (int i = 0; i < kOwnColumns / 2; ++i) own[i] = sums[i];
  }
  __device__ __forceinline__ void complete(float (&)[kOwnColumns / 2], int, unsigned) {}
};

struct Storage {
  Unit units[kStages];
  unsigned char dy[kKeptStages][kSlabBytes];
  unsigned char B[kSlabsOfPart * kSlabBytes];
  unsigned char C[kSlabsOfPart * kSlabBytes];
  // C of the other tile where G is to be found, B where H is.
  unsigned char other[kSlabsOfPart * kSlabBytes];
  // P^T.
  unsigned char P[kSlabBytes];
  // A slab for each warpgroup or, of two blocks' halves of the columns, one for both.
  unsigned char dx[kDxGroups / kParts][kSlabBytes];
  // After a tile's last unit dCB^T is where S was, then dC and dB on their way out.
  union alignas(1024) {
    Products S;
    unsigned char dCB[kSlabBytes];
  };
  UnitVectors vectors[kKeptStages];
  Results results[kStages];
  Barrier other_full[kStages];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier kept_empty[kKeptStages];
  Barrier states_full[kStages];
  Barrier P_full[kDxGroups];
  Barrier P_empty;
  Barrier landed;
  Barrier group_full;
  Barrier group_empty;
  Barrier dCB_full;
  Barrier dCB_empty;
  Barrier results_full[kStages];
  Barrier results_empty[kStages];
  Exchange<kParts> exchange;

  // By one thread.
  __device__ __forceinline__ void init(bool sums_dD) {
    for (int i = 0; i < kStages; ++i) {
      // Copies and clock.
      other_full[i].init(2 * kWarp);
      full[i].init(2 * kWarp);
      // Those for pairs, dX, of which one has the unit, and outer; dD's warp, if it has work.
      empty[i].init(3 * kWarpgroup + (sums_dD ? kWarp : 0));
      states_full[i].init(kWarpgroup);
      results_full[i].init(3 * kWarpgroup);
      // All lanes that read them, or one for them from another block.
      results_empty[i].init(part_now() == 0 ? kWarp : 1);
    }
    for (Barrier &barrier : kept_empty) barrier.init(kWarpgroup);
    for (Barrier &barrier : P_full) barrier.init(kWarpgroup);
    P_empty.init(kWarpgroup);
    landed.init(kWarp);
    group_full.init(kWarp);
    group_empty.init((2 + kDxGroups) * kWarpgroup);
    dCB_full.init(kWarpgroup);
    dCB_empty.init(kWarpgroup);
    exchange.init();
  }
};
static_assert(sizeof(Storage) <= 227 * 1024);

// Of an operand from here on. Where there are clusters an address in shared memory has a block's rank in its highest byte, for
// which an operand has no room.
__device__ __forceinline__ unsigned operand_at(const unsigned char *at, int slab_bytes) {
  const unsigned address = shared_address(at);
  return operand(kParts == 1 ? address : address & 0xffffff, slab_bytes);
}

// Wait for what blocks of the same window do.
__device__ __forceinline__ void wait_for_parts(Barrier &barrier, unsigned parity) {
  if constexpr (kParts == 1) {
    barrier.wait(parity);
  } else {
    barrier.wait_for_cluster(parity);
  }
}

// One of a unit's sums, to where the window's first block has it: of two blocks, both send what either has, and the barrier
// there counts it.
__device__ __forceinline__ void put(float &to, float value, Barrier &full) {
  if constexpr (kParts == 1) {
    to = value;
  } else {
    send(address_in(0, &to), value, address_in(0, &full));
  }
}

__device__ __forceinline__ int lane_now() {
  const int lane = unknown(threadIdx.x % kWarp);
  // What is made of an unsigned number by shifts and masks takes three times as many instructions of a signed one.
  __builtin_assume(lane >= 0 && lane < kWarp);
  return lane;
}

// How many units came before, and whether an odd number of tiles did: what stages and parities are made of. In one register.
class UnitPosition {
 public:
  __device__ __forceinline__ int stage() const { return units() % kStages; }
  __device__ __forceinline__ unsigned parity() const { return units() / kStages % 2; }
  __device__ __forceinline__ int kept_stage() const { return units() % kKeptStages; }
  __device__ __forceinline__ unsigned kept_parity() const { return units() / kKeptStages % 2; }
  // Which warpgroup for dX has the unit, and the parity of barriers that each of them has.
  __device__ __forceinline__ int dx_group() const { return units() % kDxGroups; }
  __device__ __forceinline__ unsigned parity_of_dx_group() const { return units() / kDxGroups % 2; }
  // Of barriers that each tile has, and that each unit has.
  __device__ __forceinline__ unsigned parity_of_tiles() const { return count / kTileBit; }
  __device__ __forceinline__ unsigned parity_of_units() const { return count % 2; }

  __device__ __forceinline__ unsigned units() const { return count % kTileBit; }
  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ void end_tile() { count ^= kTileBit; }

 private:
  static constexpr unsigned kTileBit = 1u << 31;
  unsigned count = 0;
};

// The part of the work that a block has: the tiles of one window after another, each for one group.
class Work {
 public:
  const OxiSsdBackward &p;
  int b;
  int group;

  __device__ __forceinline__ explicit Work(const OxiSsdBackward &p) : p(p) {}

  // The first one of the slabs of columns that this block has of B, C and states; whether what is not of a part is its.
  __device__ __forceinline__ static int first_slab() { return part_now() * kSlabsOfPart; }
  __device__ __forceinline__ static bool has_whole() { return part_now() == 0; }
  // Whether this block has a sum for each row of dD to find.
  __device__ __forceinline__ bool sums_dD() const { return p.dD_columns > 1 && has_whole(); }

  // Call visit(tile) for each tile, without_tiles() for each window in which none begins.
  template <typename Visit, typename Otherwise>
  __device__ __forceinline__ void each_tile(Visit visit, Otherwise without_tiles) {
#pragma unroll 1
    for (int index = blockIdx.x / kParts; index < unknown(p.batch) * p.windows * p.ngroups; index = next()) {
      group = index % p.ngroups;
      row = index / p.ngroups;
      b = row / p.windows;
      is_first = true;
#pragma unroll 1
      for (Span tile = tile_from(cuts().first_in(window())); tile.size > 0; tile = tile_from(tile.begin + tile.size)) {
        visit(tile);
        is_first = false;
      }
      if (is_first) without_tiles();
    }
  }
  template <typename Visit>
  __device__ __forceinline__ void each_tile(Visit visit) {
    each_tile(visit, [] {});
  }

  __device__ __forceinline__ int heads() const { return p.ssd.heads_per_group; }
  __device__ __forceinline__ int units() const { return p.ssd.heads_per_group * p.ssd.slices; }
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
    return cuts().is_odd(tile) ? kFindsH : cuts().has_odd_after(tile) ? kFindsG : kSlots;
  }

  // The other tile.
  __device__ __forceinline__ Span other(const Span &tile, Source source) const {
    if (source == kSlots) return {};
    return source == kFindsG ? cuts().from(tile.begin + tile.size) : cuts().before(tile.begin);
  }

  // What this window's tiles add to a parameter's gradient.
  __device__ __forceinline__ float *partial(int column) const {
    const long long columns = p.ssd.nheads * (2ll + p.dD_columns);
    return p.partials + row * columns + column;
  }
  // Add to it, the first tile setting it.
  __device__ __forceinline__ void add(int column, float value) const {
    float *sum = partial(column);
    *sum = is_first ? value : *sum + value;
  }

 private:
  // The window among those of all sequences.
  int row;
  bool is_first;

  __device__ __forceinline__ int next() const {
    int blocks;
    // Read anew each time: kept, it would take a register.
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
    return row * p.ngroups + group + blocks / kParts;
  }

  // Made where they are asked for, likewise.
  __device__ __forceinline__ Cuts cuts() const { return Cuts(p, unknown(b)); }
  __device__ __forceinline__ int window() const { return unknown(row) - unknown(b) * p.windows; }

  __device__ __forceinline__ Span tile_from(int begin) const {
    const bool inside = begin < p.ssd.seqlen && begin < (window() + 1) * OXI_SSD_TILE;
    return inside ? cuts().from(begin) : Span{};
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

// A product of 16 rows and 16 columns. What is on its diagonal 8 lanes have, each of row lane / 4 and of the one 8 rows on.
struct Square {
  float left[4] = {}, right[4] = {};

  __device__ __forceinline__ void add(const Block &a, const Block &b) {
    mma(left, a.word, b.word[0], b.word[1], Element());
    mma(right, a.word, b.word[2], b.word[3], Element());
  }

  __device__ static __forceinline__ bool has_diagonal(int lane) { return lane / 8 == lane % 4; }
  __device__ __forceinline__ float2 diagonal(int lane) const {
    const bool odd = lane / 4 % 2;
    return make_float2(odd ? left[1] : left[0], odd ? right[3] : right[2]);
  }
};

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
// it, where also dM is wanted; of K by column over its rows.
__device__ __forceinline__ void decay_products(const float (&dM)[kTile / 2], const Storage &storage, const UnitVectors &vectors,
                                               int warp, unsigned (&P)[kTile / 16][4], float (&dCB)[kTile / 2],
                                               float (&K_columns)[2], float (&diagonal)[2], float (&dM_diagonal)[2],
                                               float (&K_rows)[16]) {
  const int lane = lane_now();
  const int row = lane / 4;
  const Token *tokens = vectors.tokens + 16 * warp + row;
  const float l_s[2] = {tokens[0].l, tokens[8].l}, dt[2] = {tokens[0].dt, tokens[8].dt};
#pragma unroll
  for (int i = 0; i < 2; ++i) K_columns[i] = diagonal[i] = dM_diagonal[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    if (k < warp) {
#pragma unroll
      for (int i = 0; i < 4; ++i) P[k][i] = 0, K_rows[4 * k + i] = 0.0f;
      continue;
    }
    const float4 halves[2] = {storage.S.at(warp, k, 0), storage.S.at(warp, k, 1)};
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
      if (is_on) diagonal[half] = all, dM_diagonal[half] = dM[8 * k + i];
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

__device__ __forceinline__ void multiply_pairs(Work &work, Storage &storage) {
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  UnitPosition at;
  work.each_tile([&](const Span &) __attribute__((always_inline)) {
    float dCB[kTile / 2];
    storage.group_full.wait(at.parity_of_tiles());
    const unsigned B = operand_at(storage.B, 0), C = operand_at(storage.C, 0);
    products_begin();
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      Product<kTile>::of_shared(dCB, B + along_k(k, kSlabBytes), C + along_k(k, kSlabBytes), k > 0);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(dCB);
    storage.dCB_empty.wait(at.parity_of_tiles() ^ 1);
    storage.exchange.complete_S(dCB, storage.S, warp, at.parity_of_tiles());
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      if (i / 2 < warp) continue;
      storage.S.at(warp, i / 2, i % 2) = make_float4(dCB[4 * i], dCB[4 * i + 1], dCB[4 * i + 2], dCB[4 * i + 3]);
    }
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) dCB[i] = 0.0f;
    const auto store_operand = [&](unsigned char *slab, auto word) __attribute__((always_inline)) {
      const int lane = lane_now();
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = word(k, i);
        store_blocks(shared_address(slab) + slab_offset(16 * warp + lane % 16, 2 * k + lane / 16), words);
      }
      publish_to_products();
    };
    work.each_unit([&](int, int) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      const Unit &own = storage.units[at.stage()];
      const UnitVectors &vectors = storage.vectors[at.kept_stage()];
      Results &results = storage.results[at.stage()];
      float dM[kTile / 2], K_columns[2], diagonal[2], dM_diagonal[2], K_rows[16];
      const unsigned x = operand_at(own.x, 0), dy = operand_at(storage.dy[at.kept_stage()], 0);
      products_begin();
#pragma unroll
      for (int k = 0; k < kHeaddimSteps; ++k) Product<kTile>::of_shared(dM, x + along_k(k, 0), dy + along_k(k, 0), k > 0);
      end_of_products();
      wait_for_products<0>();
      keep_in_place(dM);
      unsigned P[kTile / 16][4];
      decay_products(dM, storage, vectors, warp, P, dCB, K_columns, diagonal, dM_diagonal, K_rows);
      storage.P_empty.wait(at.parity_of_units() ^ 1);
      store_operand(storage.P, [&](int k, int i) { return P[k][i]; });
      storage.P_full[at.dx_group()].arrive();
      if (work.has_whole()) {
        if (kParts > 1 && threadIdx.x == 0) storage.results_full[at.stage()].expect(Results::kSentBytes);
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
          if (Square::has_diagonal(lane)) results.dM_diagonal[t] = dM_diagonal[i];
        }
        storage.results_full[at.stage()].arrive();
      }
      storage.empty[at.stage()].arrive();
      at.advance();
    });
    storage.group_empty.arrive();
    // Until all of these threads have read S.
    synchronize_warpgroup(1);
    store_operand(storage.dCB, [&](int k, int i) { return join(dCB[8 * k + 2 * i], dCB[8 * k + 2 * i + 1], Element()); });
    storage.dCB_full.arrive();
    at.end_tile();
  });
}

// A state at one of a tile's ends, from a slot's and what the other tile has, in place; rounded.
__device__ __forceinline__ void pass_other_tile(unsigned char *state, const Unit &own, const unsigned char *columns,
                                                const UnitVectors &vectors, int warp) {
  const int lane = lane_now(), row = 16 * warp + lane % 16;
  const bool has_rows = 16 * warp < kHeaddim;
  Step step;
  step.load(own.other, vectors.other, unknown(threadIdx.x));
#pragma unroll 1
  for (int slab = 0; slab < kSlabsOfPart; ++slab) {
    const unsigned address = shared_address(state) + slab * kStateSlabBytes;
    const unsigned other = operand_at(columns + slab * kSlabBytes, 0);
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

// A warp's 16 rows of a slab of x or dY: word i of step k has the columns of accumulators 8 k + 2 i + {0, 1}.
template <int kSteps>
using Rows = unsigned[kSteps][4];

__device__ __forceinline__ int block_of_rows(int warp, int lane, int step) {
  return slab_offset(16 * warp + lane % 16, 2 * step + lane / 16);
}

// From a step on.
template <int kSteps>
__device__ __forceinline__ void load_rows(Rows<kSteps> &rows, const unsigned char *slab, int warp, int lane, int first = 0) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) load_blocks(rows[k], shared_address(slab) + block_of_rows(warp, lane, first + k));
}

// Sums over a thread's columns of values times these rows', of its two rows, over their lanes.
__device__ __forceinline__ void dot_rows(const float *values, const Rows<kHeaddimSteps> &rows, float (&sums)[2]) {
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int k = 0; k < kHeaddimSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float *own = values + 8 * k + 2 * i;
      sums[i % 2] = fmaf(own[0], low(rows[k][i], Element()), sums[i % 2]);
      sums[i % 2] = fmaf(own[1], high(rows[k][i], Element()), sums[i % 2]);
    }
  }
  sums[0] = sum_of_row(sums[0]);
  sums[1] = sum_of_row(sums[1]);
}

// d = A other^T, of a tile's B or C and a state; under way. Columns past kHeaddim are of no use.
__device__ __forceinline__ void multiply_state(float (&d)[kDxColumns / 2], const unsigned char *tile,
                                               const unsigned char *state) {
  const unsigned a = operand_at(tile, 0), b = operand_at(state, 0);
  products_begin();
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    Product<kDxColumns>::of_shared(d, a + along_k(k, kSlabBytes), b + along_k(k, kStateSlabBytes), k > 0);
  }
  end_of_products();
}

// visit(i, row) for a thread's two rows, by the first one of their lanes.
template <typename Visit>
__device__ __forceinline__ void each_own_row(int warp, Visit visit) {
  const int lane = lane_now(), row = 16 * warp + lane / 4;
  if (lane % 4 > 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) visit(i, row + 8 * i);
}

// Where a warpgroup for dX has it until it leaves: the slab, and from which step of 16 columns on.
__device__ __forceinline__ unsigned char *own_dx(Storage &storage, int index) { return storage.dx[index / kParts]; }
__device__ __forceinline__ int step_in_dx(int index) { return index % kParts * (kOwnColumns / 16); }

__device__ __forceinline__ void find_dX(const OxiSsdBackwardMapped &mapped, Work &work, Storage &storage, int index) {
  const OxiSsdBackward &p = work.p;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  UnitPosition at;
  work.each_tile([&](const Span &tile) __attribute__((always_inline)) {
    storage.group_full.wait(at.parity_of_tiles());
    const Work::Source source = work.source(tile);
    const unsigned end = at.units() + work.units();
    // Of a tile's only unit the other warpgroup has nothing.
    if (work.units() == 1 && at.dx_group() != index) storage.group_empty.arrive();
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      if (at.dx_group() != index) {
        at.advance();
        return;
      }
      storage.other_full[at.stage()].wait(at.parity());
      Unit &own = storage.units[at.stage()];
      const unsigned char *dy = storage.dy[at.kept_stage()];
      const UnitVectors &vectors = storage.vectors[at.kept_stage()];
      Results &results = storage.results[at.stage()];
      if (source != Work::kSlots) {
        pass_other_tile(source == Work::kFindsG ? own.G : own.H, own, storage.other, vectors, warp);
      }
      storage.states_full[at.stage()].arrive();
      storage.states_full[at.stage()].wait(at.parity());
      storage.full[at.stage()].wait(at.parity());
      wait_for_parts(storage.results_empty[at.stage()], at.parity() ^ 1);
      // C H^T for r, B G^T for q, which I is made of: the same code, as there is too much of it.
      float I[kDxColumns / 2], sums[2] = {};
      const auto put_sums = [&](int of_q) __attribute__((always_inline)) {
        each_own_row(warp, [&](int i, int row) {
          put(results.of_states[of_q][part_now()][row], sums[i], storage.results_full[at.stage()]);
        });
      };
#pragma unroll 1
      for (int of_q = 0; of_q < 2; ++of_q) {
        Rows<kHeaddimSteps> rows;
        multiply_state(I, of_q ? storage.B : storage.C, of_q ? own.G : own.H);
        load_rows<kHeaddimSteps>(rows, of_q ? own.x : dy, warp, lane_now());
        const Token *tokens = vectors.tokens + 16 * warp + lane_now() / 4;
        const float decays[2] = {of_q ? tokens[0].leaving : tokens[0].entering, of_q ? tokens[8].leaving : tokens[8].entering};
        wait_for_products<0>();
        keep_in_place(I);
        dot_rows(I, rows, sums);
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[i] *= decays[i];
        if (kParts == 1 || !of_q) put_sums(of_q);
      }
      if (kParts == 1) storage.results_full[at.stage()].arrive();
      // What remains to be done takes a third of the time: the next states, or B and C, come meanwhile.
      storage.empty[at.stage()].arrive();
      if (at.units() + kDxGroups >= end) storage.group_empty.arrive();
      float E[kOwnColumns / 2];
      // The other block has read what was sent to this stage before: it gives q only then, which was waited for above.
      storage.exchange.share(I, E, at.stage());
      storage.exchange.complete(E, at.stage(), at.parity());
      if constexpr (kParts > 1) {
        put_sums(1);
        if (work.has_whole()) storage.results_full[at.stage()].arrive();
      }
      {
        const Token *tokens = vectors.tokens + 16 * warp + lane_now() / 4;
        const float leaving[2] = {tokens[0].leaving, tokens[8].leaving};
#pragma unroll
        for (int i = 0; i < kOwnColumns / 2; ++i) E[i] *= leaving[i / 2 % 2];
      }
      keep_in_place(E);
      // The first one of this block's columns, in steps of 16.
      const int first_step = part_now() * (kOwnColumns / 16);
      storage.P_full[index].wait(at.parity_of_dx_group());
      {
        const unsigned P = operand_at(storage.P, 0), other = operand_at(dy + first_step * 16 * sizeof(Element), 0);
        products_begin();
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
          Product<kOwnColumns>::template of_shared<kAlongRows, kAcrossRows>(E, P + along_k(k, 0), other + across_k(k), 1);
        }
        end_of_products();
      }
      const int lane = lane_now();
      Rows<kOwnColumns / 16> rows;
      load_rows<kOwnColumns / 16>(rows, dy, warp, lane, first_step);
      // Before the rows of dX are written: the copy from there of the unit before.
      if (lane == 0) wait_for_bulk_reads<0>();
      __syncwarp();
      wait_for_products<0>();
      keep_in_place(E);
      storage.P_empty.arrive();
      const Token *tokens = vectors.tokens + 16 * warp + lane / 4;
      const float dt[2] = {tokens[0].dt, tokens[8].dt};
#pragma unroll
      for (int k = 0; k < kOwnColumns / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 16 * (first_step + k) + 8 * (i / 2) + 2 * (lane % 4);
          const float2 D = *reinterpret_cast<const float2 *>(vectors.D + column);
          const float *own_E = E + 8 * k + 2 * i;
          rows[k][i] = join(fmaf(dt[i % 2], own_E[0], D.x * low(rows[k][i], Element())),
                            fmaf(dt[i % 2], own_E[1], D.y * high(rows[k][i], Element())), Element());
        }
        store_blocks(shared_address(own_dx(storage, index)) + block_of_rows(warp, lane, step_in_dx(index) + k), rows[k]);
      }
      storage.kept_empty[at.kept_stage()].arrive();
      at.advance();
      publish_to_products();
      __syncwarp();
      // A tile's rows past its tokens are another's, or lie past the sequence's end, where bulk copies end too.
      const int first = slice * p.ssd.slice_step;
      const bool in_boxes =
          kOwnColumns == kSlabColumns && (tile.size == kTile || tile.begin + tile.size == p.ssd.seqlen);
      const unsigned char *rows_of_dx = own_dx(storage, index);
      if (__builtin_expect(in_boxes, 1)) {
        if (lane_now() == 0) {
          store_box(mapped.dx, first, head, tile.begin + 16 * warp, work.b, rows_of_dx + 16 * warp * kSlabRowBytes);
        }
      } else {
        constexpr int kChunks = kOwnColumns / 8;
        const int chunks = min(kHeaddim, p.ssd.headdim - first) / 8;
        Element *dx = static_cast<Element *>(p.dx.data) + unknown(work.b) * p.dx.stride[0] +
                      unknown(tile.begin) * p.dx.stride[1] + head * p.dx.stride[2] + first;
#pragma unroll 1
        for (int i = lane_now(); i < 16 * kChunks; i += kWarp) {
          const int t = 16 * warp + i / kChunks, own_chunk = i % kChunks, chunk = part_now() * kChunks + own_chunk;
          const unsigned char *words = rows_of_dx + slab_offset(t, 2 * step_in_dx(index) + own_chunk);
          if (t < tile.size && chunk < chunks) {
            *reinterpret_cast<uint4 *>(dx + t * p.dx.stride[1] + 8 * chunk) = *reinterpret_cast<const uint4 *>(words);
          }
        }
        __syncwarp();
      }
    });
    at.end_tile();
  });
  if (threadIdx.x % kWarp == 0) wait_for_bulk_reads<0>();
}

// <G, H> of a warp's 16 rows, where a lane has something on the diagonal of G H^T.
__device__ __forceinline__ float multiply_states(const Unit &own, int warp) {
  if (16 * warp >= kHeaddim) return 0.0f;
  Square square;
#pragma unroll 1
  for (int slab = 0; slab < kSlabsOfPart; ++slab) {
    const Blocks G(reinterpret_cast<const Element *>(own.G + slab * kStateSlabBytes), kSlabColumns);
    const Blocks H(reinterpret_cast<const Element *>(own.H + slab * kStateSlabBytes), kSlabColumns, Order::ALONG);
#pragma unroll
    for (int column = 0; column < kSlabColumns; column += 16) square.add(G.load(16 * warp, column), H.load(16 * warp, column));
  }
  const float2 diagonal = square.diagonal(lane_now());
  return diagonal.x + diagonal.y;
}

// dC and dB; <G, H>.
__device__ __forceinline__ void sum_outer(Work &work, Storage &storage) {
  const OxiSsdBackward &p = work.p;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp % 4, 0);
  UnitPosition at;
  work.each_tile([&](const Span &tile) __attribute__((always_inline)) {
    float dC[kColumns / 2], dB[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dC[i] = dB[i] = 0.0f;
    work.each_unit([&](int, int) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      const Unit &own = storage.units[at.stage()];
      const UnitVectors &vectors = storage.vectors[at.kept_stage()];
      Rows<kHeaddimSteps> scaled;
      const auto load = [&](const unsigned char *rows, const uint2 *factors_of_rows, int lane) __attribute__((always_inline)) {
        const int row = 16 * warp + lane / 4;
        const uint2 factors[2] = {factors_of_rows[row], factors_of_rows[row + 8]};
        load_rows<kHeaddimSteps>(scaled, rows, warp, lane);
#pragma unroll
        for (int k = 0; k < kHeaddimSteps; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scaled[k][i] = scale(scaled[k][i], factors[i % 2], Element());
        }
      };
      const auto add = [&](float (&sums)[kColumns / 2], const unsigned char *state) __attribute__((always_inline)) {
        const unsigned other = operand_at(state, kStateSlabBytes);
        products_begin();
#pragma unroll
        for (int k = 0; k < kHeaddimSteps; ++k) {
          Product<kColumns>::template of_registers<kAcrossRows>(sums, scaled[k], other + across_k(k), 1);
        }
        end_of_products();
      };
      load(storage.dy[at.kept_stage()], vectors.factors[0], lane_now());
      storage.states_full[at.stage()].wait(at.parity());
      add(dC, own.H);
      const float GH = vectors.over_tile * multiply_states(own, warp);
      wait_for_products<0>();
      keep_in_place(dC);
      load(own.x, vectors.factors[1], lane_now() + keep_until_here(scaled));
      add(dB, own.G);
      const int lane = lane_now();
      wait_for_parts(storage.results_empty[at.stage()], at.parity() ^ 1);
      if (Square::has_diagonal(lane)) {
        float &to = storage.results[at.stage()].GH[part_now()][8 * warp + lane / 4];
        put(to, GH, storage.results_full[at.stage()]);
      }
      if (work.has_whole()) storage.results_full[at.stage()].arrive();
      wait_for_products<0>();
      keep_in_place(dB);
      storage.empty[at.stage()].arrive();
      at.advance();
    });
    storage.group_full.wait(at.parity_of_tiles());
    storage.dCB_full.wait(at.parity_of_tiles());
    const unsigned dCB = operand_at(storage.dCB, 0);
    const unsigned B = operand_at(storage.B, kSlabBytes), C = operand_at(storage.C, kSlabBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Product<kColumns>::template of_shared<kAcrossRows, kAcrossRows>(dC, dCB + across_k(k), B + across_k(k), 1);
      Product<kColumns>::template of_shared<kAlongRows, kAcrossRows>(dB, dCB + along_k(k, 0), C + across_k(k), 1);
    }
    end_of_products();
    wait_for_products<0>();
    keep_in_place(dC);
    keep_in_place(dB);
    storage.group_empty.arrive();
    // By way of where dCB was, a warp its own rows of a slab at a time, so that whole lines leave.
    synchronize_warpgroup(0);
    const auto store = [&](const OxiTensor4 &tensor, const float (&sums)[kColumns / 2]) __attribute__((always_inline)) {
      const int lane = lane_now(), row = 16 * warp + lane / 8, chunk = lane % 8;
      Element *to = static_cast<Element *>(tensor.data) + unknown(work.b) * tensor.stride[0] +
                    unknown(work.group) * tensor.stride[2] + unknown(tile.begin + row) * tensor.stride[1] +
                    work.first_slab() * kSlabColumns + 8 * chunk;
#pragma unroll
      for (int slab = 0; slab < kSlabsOfPart; ++slab) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kSlabColumns / 8; j += 2) {
          unsigned words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float *pair = sums + slab * (kSlabColumns / 2) + 4 * j + 2 * i;
            words[i] = join(pair[0], pair[1], Element());
          }
          store_blocks(shared_address(storage.dCB) + slab_offset(16 * warp + lane % 16, j + lane / 16), words);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
          const uint4 words = *reinterpret_cast<const uint4 *>(storage.dCB + slab_offset(row + i, chunk));
          if (row + i < tile.size) *reinterpret_cast<uint4 *>(to + i * tensor.stride[1] + slab * kSlabColumns) = words;
        }
      }
    };
    store(p.dC, dC);
    store(p.dB, dB);
    storage.dCB_empty.arrive();
    storage.exchange.release_S();
    at.end_tile();
  });
}

// By one warp: zeros.
__device__ __forceinline__ void clear(unsigned char *from, int bytes) {
#pragma unroll 1
  for (int at = threadIdx.x % kWarp * 16; at < bytes; at += kWarp * 16) {
    *reinterpret_cast<uint4 *>(from + at) = make_uint4(0, 0, 0, 0);
  }
}

// By one warp: copies.
__device__ __forceinline__ void load_units(const OxiSsdBackwardMapped &mapped, Work &work, Storage &storage) {
  const OxiSsdBackward &p = work.p;
  UnitPosition at;
  unsigned landed_parity = 0;
  const auto wait_for_copies = [&]() {
    __syncwarp();
    storage.landed.arrive();
    storage.landed.wait(landed_parity);
    landed_parity ^= 1;
  };
  work.each_tile([&](const Span &tile) __attribute__((always_inline)) {
    const Work::Source source = work.source(tile);
    const Span other = work.other(tile, source);
    const int entry = source == Work::kFindsH ? entry_slot(p.ssd, work.b, other) : entry_slot(p.ssd, work.b, tile);
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
      if (elected()) {
        arrived.expect((source == Work::kSlots ? 2 : 3) * kSlabsOfPart * kSlabBytes);
#pragma unroll 1
        for (int slab = 0; slab < kSlabsOfPart; ++slab) {
          const int at = slab * kSlabBytes, column = (work.first_slab() + slab) * kSlabColumns;
          copy_box(storage.B + at, mapped.B, column, work.group, tile.begin, work.b, arrived);
          copy_box(storage.C + at, mapped.C, column, work.group, tile.begin, work.b, arrived);
          if (source != Work::kSlots) {
            copy_box(storage.other + at, other_columns, column, work.group, other.begin, work.b, arrived);
          }
        }
      }
      if (is_cut) {
        wait_for_copies();
        for (int slab = 0; slab < kSlabsOfPart; ++slab) {
          clear_past(storage.B + slab * kSlabBytes, tile);
          clear_past(storage.C + slab * kSlabBytes, tile);
          clear_past(storage.other + slab * kSlabBytes, other);
        }
        publish_to_products();
      }
      storage.group_full.arrive();
    };
    const auto first_in = [&](bool of_gradients, int slot) {
      const int bytes = kParts * kStateBytes;
      return in_slot(p, of_gradients, work.b, max(slot, 0), work.first_head(), 0, bytes) + part_now() * kStateBytes;
    };
    const unsigned char *G = first_in(true, exit), *H = first_in(false, entry);
    bool has_group = false;
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      storage.empty[at.stage()].wait(at.parity() ^ 1);
      storage.kept_empty[at.kept_stage()].wait(at.kept_parity() ^ 1);
      Unit &own = storage.units[at.stage()];
      unsigned char *dy = storage.dy[at.kept_stage()];
      Barrier &arrived = is_cut ? storage.landed : storage.full[at.stage()];
      Barrier &other_arrived = is_cut ? storage.landed : storage.other_full[at.stage()];
      if (elected()) {
        const int first = slice * p.ssd.slice_step;
        if (source != Work::kSlots) {
          const bool of_G = source == Work::kFindsG, has_slot = (of_G ? exit : entry) >= 0;
          other_arrived.expect(kSlabBytes + has_slot * kStateBytes);
          copy_box(own.other, other_rows, first, head, other.begin, work.b, other_arrived);
          if (has_slot) copy_bytes(of_G ? own.G : own.H, of_G ? G : H, kStateBytes, other_arrived);
        }
        const bool copies_G = exit >= 0 && source != Work::kFindsG, copies_H = entry >= 0 && source != Work::kFindsH;
        arrived.expect(2 * kSlabBytes + (copies_G + copies_H) * kStateBytes);
        copy_box(dy, mapped.dy, first, head, tile.begin, work.b, arrived);
        copy_box(own.x, mapped.x, first, head, tile.begin, work.b, arrived);
        if (copies_H) copy_bytes(own.H, H, kStateBytes, arrived);
        if (copies_G) copy_bytes(own.G, G, kStateBytes, arrived);
      }
      // A slot's heads lie behind one another.
      G += kParts * kStateBytes;
      H += kParts * kStateBytes;
      if (entry < 0) clear(own.H, kStateBytes);
      if (exit < 0) clear(own.G, kStateBytes);
      if (is_cut) {
        wait_for_copies();
        clear_past(own.x, tile);
        clear_past(dy, tile);
        clear_past(own.other, other);
      }
      if (is_cut || entry < 0 || exit < 0) publish_to_products();
      storage.other_full[at.stage()].arrive();
      storage.full[at.stage()].arrive();
      at.advance();
      // After the first unit, as the tile before may need its own for longer.
      if (!has_group) load_group();
      has_group = true;
    });
    at.end_tile();
  });
}

// By one warp: what dt and A make of each unit, from what the walks have left.
__device__ __forceinline__ void keep_time(Work &work, Storage &storage) {
  const OxiSsd &p = work.p.ssd;
  const int lane = threadIdx.x % kWarp;
  const long long all_tokens = static_cast<long long>(work.p.batch) * p.nheads * p.seqlen;
  UnitPosition at;
  work.each_tile([&](const Span &tile) __attribute__((always_inline)) {
    const Work::Source source = work.source(tile);
    const Span other = source == Work::kSlots ? tile : work.other(tile, source);
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      // While the stage is not free yet. Of a lane's two tokens; past a tile's, dt is 0 and l that of its last one.
      const float *line = work.p.tokens + (static_cast<long long>(work.b) * p.nheads + head) * p.seqlen;
      float dt[2], l[2], other_dt[2], other_l[2], D[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto load = [&](const Span &tile, float &dt, float &l) {
          const float *own = line + tile.begin + min(2 * lane + i, tile.size - 1);
          dt = 2 * lane + i < tile.size ? own[0] : 0.0f;
          l = own[all_tokens];
        };
        load(tile, dt[i], l[i]);
        load(other, other_dt[i], other_l[i]);
        const int row = slice * p.slice_step + 2 * lane + i;
        D[i] = p.D.data == nullptr || row >= p.headdim
                   ? 0.0f
                   : load_either<Element>(p.D.data, head * p.D.stride[0] + row * p.D.stride[1], p.wide_D);
      }
      const float total = __shfl_sync(kAllLanes, l[1], kWarp - 1);
      Token tokens[2];
      // One of the two: for both there are not enough registers.
      uint2 factors[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float entering = fast_exp2(l[i]), leaving = fast_exp2(total - l[i]);
        tokens[i] = {l[i], dt[i], leaving, entering};
        factors[i] = scale_factors(dt[i] * leaving, dt[i] * leaving, Element());
      }
      const float over_tile = fast_exp2(total);
      uint2 other_factors = {};
      float over_other = 0.0f;
      if (source != Work::kSlots) {
        const float other_total = __shfl_sync(kAllLanes, other_l[1], kWarp - 1);
        float of_other[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          of_other[i] = source == Work::kFindsG ? fast_exp2(other_l[i]) : other_dt[i] * fast_exp2(other_total - other_l[i]);
        }
        other_factors = scale_factors(of_other[0], of_other[1], Element());
        over_other = fast_exp2(other_total);
      }
      storage.empty[at.stage()].wait(at.parity() ^ 1);
      storage.kept_empty[at.kept_stage()].wait(at.kept_parity() ^ 1);
      UnitVectors &vectors = storage.vectors[at.kept_stage()];
      *reinterpret_cast<float2 *>(vectors.l + by_column(2 * lane)) = make_float2(l[0], l[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * lane + i;
        vectors.tokens[t] = tokens[i];
        vectors.factors[0][t] = scale_factors(tokens[i].entering, tokens[i].entering, Element());
        vectors.factors[1][t] = factors[i];
        if (t < kHeaddim) vectors.D[t] = D[i];
      }
      vectors.other.leaving[by_column(2 * lane) / 2] = other_factors;
      if (lane == 0) vectors.over_tile = over_tile, vectors.other.over_tile = over_other;
      storage.other_full[at.stage()].arrive();
      storage.full[at.stage()].arrive();
      at.advance();
    });
  });
}

// By one warp: dD, where it has a row for each of headdim, the diagonal of dY^T X.
__device__ __forceinline__ void sum_dD(Work &work, Storage &storage) {
  const OxiSsdBackward &p = work.p;
  UnitPosition at;
  work.each_tile([&](const Span &) __attribute__((always_inline)) {
    work.each_unit([&](int head, int slice) __attribute__((always_inline)) {
      storage.full[at.stage()].wait(at.parity());
      const int lane = lane_now();
      const Blocks dy(reinterpret_cast<const Element *>(storage.dy[at.kept_stage()]), kSlabColumns, Order::ALONG);
      const Blocks x(reinterpret_cast<const Element *>(storage.units[at.stage()].x), kSlabColumns);
#pragma unroll 1
      for (int row = 0; row < kHeaddim; row += 16) {
        Square square;
#pragma unroll
        for (int t = 0; t < kTile; t += 16) square.add(dy.load_transposed(t, row), x.load_transposed(t, row));
        const float2 diagonal = square.diagonal(lane);
        if (Square::has_diagonal(lane)) {
          const int first = slice * p.ssd.slice_step + row + lane / 4;
          const int column = 2 * p.ssd.nheads + head * p.dD_columns + first;
          if (first < p.ssd.headdim) work.add(column, diagonal.x);
          if (first + 8 < p.ssd.headdim) work.add(column + 8, diagonal.y);
        }
      }
      storage.empty[at.stage()].arrive();
      at.advance();
    });
  });
}

// By one warp: da, ddt, and what the tiles add to dA and ddt_bias.
__device__ __forceinline__ void finish_heads(Work &work, Storage &storage) {
  const OxiSsdBackward &params = work.p;
  const OxiSsd &p = params.ssd;
  const int lane = threadIdx.x % kWarp;
  const long long all_tokens = static_cast<long long>(params.batch) * p.nheads * p.seqlen;
  UnitPosition at;
  const auto finish = [&](const Span &tile) __attribute__((always_inline)) {
#pragma unroll 1
    for (int i = 0; i < work.heads(); ++i) {
      const int head = work.first_head() + i;
      float2 dl = {}, EX = {}, q = {};
      float dt[2], slope[2], by_lane[2] = {};
      // Under way until a unit's sums are there.
      const float *line = params.tokens + (static_cast<long long>(work.b) * p.nheads + head) * p.seqlen + tile.begin;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = min(2 * lane + j, tile.size - 1);
        dt[j] = line[t];
        slope[j] = line[t + 2 * all_tokens];
      }
      const auto pair = [&](const float *values) { return *reinterpret_cast<const float2 *>(values + 2 * lane); };
      const auto add = [](float2 &sum, float2 value) { sum.x += value.x, sum.y += value.y; };
#pragma unroll 1
      for (int slice = 0; slice < p.slices; ++slice) {
        const int stage = at.stage();
        wait_for_parts(storage.results_full[stage], at.parity());
        const Results &results = storage.results[stage];
#pragma unroll
        for (int warp = 0; warp < 4; ++warp) add(dl, pair(results.K_rows[warp]));
        const float2 columns = pair(results.K_columns);
        float2 own_q = pair(results.of_states[1][0]);
        add(dl, make_float2(-dt[0] * columns.x, -dt[1] * columns.y));
        add(dl, pair(results.of_states[0][0]));
        if constexpr (kParts > 1) {
          add(own_q, pair(results.of_states[1][1]));
          add(dl, pair(results.of_states[0][1]));
          by_lane[0] += results.GH[1][lane];
        }
        add(EX, pair(results.PM));
        add(EX, own_q);
        add(q, make_float2(dt[0] * own_q.x, dt[1] * own_q.y));
        by_lane[0] += results.GH[0][lane];
        const float2 diagonal = pair(results.dM_diagonal);
        by_lane[1] += diagonal.x + diagonal.y;
        storage.results_empty[stage].arrive();
        if constexpr (kParts > 1) {
          __syncwarp();
          if (lane == 0) storage.results_empty[stage].arrive_in(1);
        }
        at.advance();
      }
      // Under way during the sums over lanes.
      const float A = load_either<Element>(p.A.data, head * p.A.step, p.A.dtype == OXI_F32);
      warp_sum(by_lane);
      const float GH = by_lane[0], dD = by_lane[1];
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
        const float ddt = ((j == 0 ? EX.x : EX.y) + A * da[j]) * slope[j];
        const long long offset = unknown(work.b) * params.ddt.stride[0] +
                                 (tile.begin + t) * params.ddt.stride[1] + head * params.ddt.stride[2];
        store_scalar(params.ddt.data, params.wide_ddt ? OXI_F32 : kDtype<Element>, offset, ddt);
        sums[0] = fmaf(dt[j], da[j], sums[0]);
        sums[1] += ddt;
      }
      warp_sum(sums);
      if (lane == 0) {
        work.add(head, sums[0]);
        work.add(p.nheads + head, sums[1]);
        if (params.dD_columns == 1) work.add(2 * p.nheads + head, dD);
      }
    }
  };
  work.each_tile(finish, [&]() __attribute__((always_inline)) {
#pragma unroll 1
    for (int i = lane; i < work.heads(); i += kWarp) {
      const int head = work.first_head() + i;
      *work.partial(head) = *work.partial(p.nheads + head) = 0.0f;
    }
    const int first = 2 * p.nheads + work.first_head() * params.dD_columns;
#pragma unroll 1
    for (int i = lane; i < work.heads() * params.dD_columns; i += kWarp) *work.partial(first + i) = 0.0f;
  });
}

#if DSTATE > 128
#define OXI_CLUSTER __cluster_dims__(kParts, 1, 1)
#else
#define OXI_CLUSTER
#endif

extern "C" __global__ void OXI_CLUSTER __launch_bounds__(kThreads, 1)
    KERNEL(const __grid_constant__ OxiSsdBackwardMapped mapped) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage &storage = *reinterpret_cast<Storage *>(shared);
  Work work(mapped.bwd);
  if (threadIdx.x == 0) {
    storage.init(work.sums_dD());
    publish_to_products();
    if constexpr (kParts > 1) publish_barriers();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(mapped.x);
    prefetch_map(mapped.dy);
    prefetch_map(mapped.B);
    prefetch_map(mapped.C);
    prefetch_map(mapped.dx);
  }
  wait_for_earlier_work();
  if constexpr (kParts == 1) {
    __syncthreads();
  } else {
    synchronize_cluster();
  }
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
    if (warp == 16) {
      load_units(mapped, work, storage);
    } else if (warp == 17) {
      keep_time(work, storage);
    } else if (warp == 18) {
      if (work.sums_dD()) sum_dD(work, storage);
    } else if (work.has_whole()) {
      finish_heads(work, storage);
    }
  }
  if constexpr (kParts > 1) synchronize_cluster();
}

}  // namespace oxi
