// What the chunk scan's backward has on a warp's products, for every dtype: matrices in shared memory, products of their
// blocks, rows of tensors on the way to and from there, decays.
//
// Products are of *blocks*, 16 x 16 elements, into pairs of accumulators of 16 x 8, as mma.cuh has them: of its columns
// 8 n + 2 (lane % 4) + {0, 1} a thread has rows lane / 4 + 8 half at [n][2 half + {0, 1}]. 16-bit elements are multiplied as
// they are. An fp32 element is split into what TF32 holds of it and the rest; three products of four are summed (the fourth
// is below fp32's digits), in fp32.
#pragma once

#include "async_copy.cuh"
#include "mma.cuh"
#include "ssd_bwd.cuh"
#include "ssd_mma.cuh"

namespace oxi {

constexpr int kTile = OXI_SSD_TILE;
constexpr int kDstate = DSTATE;
// Rows of the state that are worked on at once, and pitch of x and dY.
constexpr int kSlice = 64;
constexpr int kBlock = 16;
constexpr int kTileBlocks = kTile / kBlock;
constexpr bool kNarrow = sizeof(Element) == 2;

// Elements from a matrix's begin to this place; the pitch is a power of two, from 64 on, of fp32 from 32 on. Pieces of 16 bytes
// stay together. Both of a block's rows and of its columns what a warp reads at once lies in all banks.
__device__ __forceinline__ int place(int row, int column, int pitch) {
  if constexpr (kNarrow) return swizzled(row, column, pitch);
  return row * pitch + (column ^ ((row & 3) << 3 | (row & 4)));
}

// A pair of neighbours in a matrix, the first in an even column.
__device__ __forceinline__ float2 load_pair(const Element *matrix, int row, int column, int pitch) {
  const Pack<Element, 2> pair = *reinterpret_cast<const Pack<Element, 2> *>(matrix + place(row, column, pitch));
  return make_float2(pair[0], pair[1]);
}
__device__ __forceinline__ void store_pair(Element *matrix, int row, int column, int pitch, float x, float y) {
  const float values[2] = {x, y};
  *reinterpret_cast<Pack<Element, 2> *>(matrix + place(row, column, pitch)) = Pack<Element, 2>::of(values);
}

// A block of fp32: element (8 i + lane / 4, 4 j + lane % 4) at [i][j], of A and of the transpose of B.
struct FloatBlock {
  float value[2][4];
};

// Blocks of a matrix of T that begins at a multiple of its pitch. A product's A is loaded, its B too if the matrix's rows are
// B's columns; otherwise they are transposed on the way, A if the matrix's rows are A's columns.
template <typename T>
struct Operand {
  __device__ __forceinline__ Operand(const T *matrix, int pitch, bool is_A, bool transposed)
      : blocks(matrix, pitch, is_A != transposed ? Order::DOWN : Order::ALONG) {}

  __device__ __forceinline__ Block load(int row, int column) const { return blocks.load(row, column); }
  __device__ __forceinline__ Block load_transposed(int row, int column) const { return blocks.load_transposed(row, column); }

 private:
  Blocks blocks;
};

template <>
struct Operand<f32> {
  __device__ __forceinline__ Operand(const f32 *matrix, int pitch, bool, bool transposed) : pitch(pitch) {
    const int lane = lane_now();
    const int group = lane / 4, own = lane % 4;
    address = shared_address(matrix + (transposed ? place(own, group, pitch) : place(group, own, pitch)));
  }

  __device__ __forceinline__ FloatBlock load(int row, int column) const {
    FloatBlock block;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) block.value[i][j] = at(row + 8 * i, column + 4 * j);
    }
    return block;
  }
  __device__ __forceinline__ FloatBlock load_transposed(int row, int column) const {
    FloatBlock block;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      // Bit 2 of a row flips that of the column.
      for (int j = 0; j < 4; ++j) block.value[i][j] = at(row + 4 * j, (column + 8 * i) ^ (4 * j & 4));
    }
    return block;
  }

 private:
  // Of the lane's element of block (0, 0).
  unsigned address;
  int pitch;

  __device__ __forceinline__ float at(int row, int column) const {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"((address ^ (column * 4)) + row * pitch * 4));
    return value;
  }
};

// Of a matrix whose rows are A's rows or columns, B's columns or rows; of each second kind blocks are loaded transposed.
struct RowsOfA : Operand<Element> {
  __device__ __forceinline__ RowsOfA(const Element *matrix, int pitch) : Operand(matrix, pitch, true, false) {}
};
struct ColumnsOfA : Operand<Element> {
  __device__ __forceinline__ ColumnsOfA(const Element *matrix, int pitch) : Operand(matrix, pitch, true, true) {}
};
struct ColumnsOfB : Operand<Element> {
  __device__ __forceinline__ ColumnsOfB(const Element *matrix, int pitch) : Operand(matrix, pitch, false, false) {}
};
struct RowsOfB : Operand<Element> {
  __device__ __forceinline__ RowsOfB(const Element *matrix, int pitch) : Operand(matrix, pitch, false, true) {}
};

// d[0], d[1] += a b, of 8 columns each.
template <typename T = Element>
__device__ __forceinline__ void multiply(float (*d)[4], const Block &a, const Block &b) {
  mma(d[0], a.word, b.word[0], b.word[1], T());
  mma(d[1], a.word, b.word[2], b.word[3], T());
}

// d += a b, of what TF32 holds of each element: its upper 19 bits.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

__device__ __forceinline__ void multiply(float (*d)[4], const FloatBlock &a, const FloatBlock &b) {
  const auto upper = [](float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float a_upper[4], a_rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = a.value[i % 2][2 * k + i / 2];
      a_upper[i] = upper(value);
      a_rest[i] = value - a_upper[i];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float b_upper[2], b_rest[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = b.value[n][2 * k + i];
        b_upper[i] = upper(value);
        b_rest[i] = value - b_upper[i];
      }
      mma_tf32(d[n], a_rest, b_upper);
      mma_tf32(d[n], a_upper, b_rest);
      mma_tf32(d[n], a_upper, b_upper);
    }
  }
}

// A block of A, its columns times factors, of which the first is that of the block's first column.
template <typename T = Element>
__device__ __forceinline__ void scale_columns(Block &a, const float *factors) {
  const float *own = factors + lane_now() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 factor = *reinterpret_cast<const float2 *>(own + i / 2 * 8);
    a.word[i] = join(low(a.word[i], T()) * factor.x, high(a.word[i], T()) * factor.y, T());
  }
}
__device__ __forceinline__ void scale_columns(FloatBlock &a, const float *factors) {
  const int own = lane_now() % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float factor = factors[4 * j + own];
    a.value[0][j] *= factor;
    a.value[1][j] *= factor;
  }
}

// Rows of a tensor: token after token, of this sequence and head, or group, from a token and a column on. `columns` exist.
struct Lines {
  Element *data;
  long long stride;
  long long step;
  int columns;

  __device__ __forceinline__ static Lines of(const OxiTensor4 &tensor, long long b, int begin, int head_or_group, int first,
                                             int columns) {
    Element *data = static_cast<Element *>(tensor.data) + b * tensor.stride[0] + begin * tensor.stride[1] +
                    head_or_group * tensor.stride[2] + first * tensor.stride[3];
    return Lines{data, tensor.stride[1], tensor.stride[3], columns};
  }

  // Whether rows move in accesses of 16 bytes, and take whole ones.
  __device__ __forceinline__ bool dense() const {
    constexpr int kWhole = kVector<Element>;
    return step == 1 && stride % kWhole == 0 && columns % kWhole == 0 && reinterpret_cast<unsigned long long>(data) % 16 == 0;
  }
};

// Ask for kRows rows of a matrix, by the block's first kThreads threads, or have them right away unless `wide`, when 16 bytes
// move at once. Zeros past `rows`, and past what columns there are.
template <int kRows, int kPitch, int kThreads>
__device__ __forceinline__ void copy(Element *to, const Lines &lines, int rows, bool wide) {
  constexpr int kPiece = kVector<Element>;
  constexpr int kStep = kThreads * kPiece / kPitch;
  static_assert(kRows % kStep == 0);
  const int thread = thread_now();
  const int first = thread * kPiece / kPitch, column = thread * kPiece % kPitch;
  const long long stride = unknown(lines.stride);
  const Element *from = lines.data + first * stride;
  if (wide) {
#pragma unroll
    for (int row = first; row < first + kRows; row += kStep) {
      copy_async<16>(to + place(row, column, kPitch), from + column, row < rows && column < lines.columns);
      from += kStep * stride;
    }
  } else {
#pragma unroll 1
    for (int row = first; row < first + kRows; row += kStep) {
      const int columns = row < rows ? lines.columns : 0;
      *reinterpret_cast<Pack<Element, kPiece> *>(to + place(row, column, kPitch)) =
          load_pack<kPiece>(from, lines.step, column, columns, false);
      from += kStep * stride;
    }
  }
}

// Of four words in each of four neighbouring lanes, give the i-th lane the i-th words, in the order of lanes.
__device__ __forceinline__ uint4 transpose_words(const unsigned (&word)[4]) {
  const bool second = threadIdx.x & 2, odd = threadIdx.x & 1;
  // Words of the lane's half, from the first two lanes, from the others.
  unsigned lower[2], upper[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned kept = second ? word[2 + i] : word[i];
    const unsigned other = __shfl_xor_sync(kAllLanes, second ? word[i] : word[2 + i], 2);
    lower[i] = second ? other : kept;
    upper[i] = second ? kept : other;
  }
  const unsigned low_kept = odd ? lower[1] : lower[0], high_kept = odd ? upper[1] : upper[0];
  const unsigned low_other = __shfl_xor_sync(kAllLanes, odd ? lower[0] : lower[1], 1);
  const unsigned high_other = __shfl_xor_sync(kAllLanes, odd ? upper[0] : upper[1], 1);
  return make_uint4(odd ? low_other : low_kept, odd ? low_kept : low_other, odd ? high_other : high_kept,
                    odd ? high_kept : high_other);
}

// Rows 8 half + lane / 4 of accumulators, kColumns / 8 of them, to memory, where `to` is that row's place for their first
// column. To be called by all lanes, of which `inside` tells those whose row exists.
template <int kColumns, typename T = Element>
__device__ __forceinline__ void store_row(T *to, long long step, int columns, bool dense, bool inside, int half,
                                          const float (*value)[4]) {
  const int own = lane_now() % 4;
  if (!dense) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const int column = i / 2 * 8 + own * 2 + i % 2;
      if (inside && column < columns) to[column * step] = from_float<T>(value[i / 2][2 * half + i % 2]);
    }
  } else if constexpr (sizeof(T) == 2) {
    static_assert(kColumns % 32 == 0);
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {
      unsigned word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = join(value[first + i][2 * half], value[first + i][2 * half + 1], T());
      const uint4 whole = transpose_words(word);
      const int column = (first + own) * 8;
      if (inside && column < columns) *reinterpret_cast<uint4 *>(to + column) = whole;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const int column = i * 8 + own * 2;
      const float2 pair = make_float2(value[i][2 * half], value[i][2 * half + 1]);
      if (inside && column < columns) *reinterpret_cast<float2 *>(to + column) = pair;
    }
  }
}

// Sums of log2 decays: fp32's digits are too few for fp32's tolerances where some tokens decay a lot and some little.
template <bool kIsNarrow>
struct LogOf {
  using Type = float;
};
template <>
struct LogOf<false> {
  using Type = double;
};
using Log = LogOf<kNarrow>::Type;

// As sum_decays (ssd.cuh), without the sum.
template <typename Raw>
__device__ __forceinline__ void sum_log_decays(const OxiSsd &p, const Discretize &head, float A, int size, Raw raw,
                                               float (&dt)[2], Log (&l)[2]) {
  if constexpr (kNarrow) {
    sum_decays(p, head, size, raw, dt, l);
  } else {
    // Beyond it nothing is left of what was before, and the sums keep their digits.
    constexpr double kLeast = -1e6;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = 2 * lane + i < size;
      dt[i] = inside ? head.dt(p, raw(i)) : 0.0f;
      const double decay = dt[i] * (A * 1.4426950408889634);
      l[i] = inside ? (decay < kLeast ? kLeast : decay) : 0.0;
    }
    l[1] += l[0];
    double sum = l[1];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const double other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    const double before = __shfl_up_sync(kAllLanes, sum, 1);
    if (lane > 0) {
      l[0] += before;
      l[1] += before;
    }
  }
}

}  // namespace oxi
