// Matrix products of a warp, m16n8k16 (8.0 and later): accumulators in fp32, operands of a 16-bit Element from registers,
// where they come as *blocks*, 16 x 16 elements, from matrices in shared memory.
//
// Of 8 x 8 elements a thread has, in row lane / 4, columns 2 (lane % 4) + {0, 1}: of an operand as a word, of an accumulator
// as two floats. A is four such parts, in words (rows 0-7, 8-15) of columns 0-7, then of 8-15. An accumulator is two, of
// rows 0-7 and 8-15. B is two, transposed: columns of B in rows, its first 8 rows in the first word.
#pragma once

#include "dtype.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace oxi {

// The parts of a block, in an order of Blocks.
struct Block {
  unsigned word[4];
};

// At (row, column) (0, 0), (8, 0), (0, 8), (8, 8), as A has them; or (0, 0), (0, 8), (8, 0), (8, 8).
enum class Order { DOWN, ALONG };

// Elements from a matrix's begin to this place. Rows are of `pitch` elements, a power of two from 64 on, and their 16-byte
// pieces are permuted within every 8 rows, so that the same piece of 8 rows lies in all banks.
__device__ __forceinline__ int swizzled(int row, int column, int pitch) { return row * pitch + (column ^ ((row & 7) * 8)); }

// Blocks of a matrix that begins at a multiple of its pitch.
//
// A: loaded in the order DOWN; of a matrix whose columns are A's rows transposed in the order ALONG. B, as words 0 and 1 of
// its first 8 columns, 2 and 3 of the others: transposed in the order DOWN; of a matrix whose rows are B's columns loaded in
// the order ALONG.
class Blocks {
 public:
  template <typename T>
  __device__ __forceinline__ Blocks(const T *matrix, int pitch, Order order = Order::DOWN) : pitch(pitch) {
    unsigned lane = threadIdx.x % kWarp;
    // For the compiler not to compute blocks' addresses ahead, outside a loop, in a register each.
    asm volatile("" : "+r"(lane));
    // Of the four parts each eighth of the lanes names the rows of one.
    const int low = lane % 8, first = lane & 8, second = lane / 2 & 8;
    const int offset = order == Order::DOWN ? swizzled(low + first, second, pitch) : swizzled(low + second, first, pitch);
    address = shared_address(matrix + offset);
  }

  // The block at a row and column, multiples of 16.
  __device__ __forceinline__ Block load(int row, int column) const {
    Block block;
    load_blocks(block.word, at(row, column));
    return block;
  }

  // The same with each part transposed.
  __device__ __forceinline__ Block load_transposed(int row, int column) const {
    Block block;
    oxi::load_transposed(block.word, at(row, column));
    return block;
  }

 private:
  // Where the lane's part of block (0, 0) has its row.
  unsigned address;
  int pitch;

  // A column's bits are apart from a row's, and adding to those of a lane is flipping them.
  __device__ __forceinline__ unsigned at(int row, int column) const { return (address ^ (column * 2)) + row * pitch * 2; }
};

// d += a b.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace oxi
