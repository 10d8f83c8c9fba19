// Matrix products of a warpgroup, 4 warps (sm_90a): accumulators in fp32, operands of Element from shared memory or registers.
//
// An operand in shared memory is made of *slabs*: rows of 128 bytes, 64 elements, whose 16-byte chunks are permuted within
// every 8 rows (chunk c of row r lies at c ^ (r % 8)), and which begin at multiples of 1024 bytes. More columns are more
// slabs. The dimension summed over, k, goes along the rows (K-major), or from row to row (MN-major).
//
// Accumulators and operands in registers, of 64 rows: warp w has rows 16 w to 16 w + 15, of which a thread has r = lane / 4
// and r + 8. Accumulators: of columns 8 j + 2 (lane % 4) + {0, 1} d[4 j + {0, 1}] in row r, d[4 j + {2, 3}] in row r + 8. A of
// 16 columns: pairs of columns 2 (lane % 4) + {0, 1}, in a[0] of row r, a[1] of row r + 8, in a[2], a[3] those 8 columns on.
#pragma once

#include "barrier.cuh"
#include "dtype.cuh"

namespace oxi {

constexpr int kSlabColumns = 64;
constexpr int kSlabRowBytes = 128;

// Bytes from a slab's begin to this 16-byte chunk of this row.
__device__ __forceinline__ int slab_offset(int row, int chunk) { return row * kSlabRowBytes + ((chunk ^ (row & 7)) << 4); }

// What describes an operand to the hardware, `address` being where its first row, or of K-major ones the first k, lies: this
// word, and another that is always OXI_OPERAND_HIGH. K-major: 8 rows are 1024 bytes. MN-major: so are 8 steps of k, and slabs
// are `slab_bytes` apart.
__device__ __forceinline__ unsigned operand(unsigned address, int slab_bytes) {
  return slab_bytes >> 4 << 16 | address >> 4;
}
// 128-byte swizzle; 1024 / 16.
#define OXI_OPERAND_HIGH "0x40000040"

// How the dimension summed over goes in an operand: K-major, MN-major.
constexpr int kAlongRows = 0;
constexpr int kAcrossRows = 1;

// To be added to an operand for the next 16 of what is summed over: K-major, in slabs of so many bytes; MN-major.
__device__ constexpr unsigned along_k(int step, int slab_bytes) { return (step / 4 * slab_bytes + step % 4 * 32) >> 4; }
__device__ constexpr unsigned across_k(int step) { return step * 16 * kSlabRowBytes >> 4; }

// Before a warpgroup's first product after its threads wrote accumulators or operands in registers.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last call are a batch.
__device__ __forceinline__ void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all batches are done but the latest N.
template <int N>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// What this thread wrote to shared memory, or sees there, is there for products and bulk copies too.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that products work on are not to be moved around them.
template <int N>
__device__ __forceinline__ void keep_in_place(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define OXI_TEXT_(text) #text
#define OXI_TEXT(text) OXI_TEXT_(text)
#define OXI_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OXI_D16 OXI_D8(0), OXI_D8(8)
#define OXI_D24 OXI_D16, OXI_D8(16)
#define OXI_D32 OXI_D24, OXI_D8(24)
#define OXI_D64 OXI_D32, OXI_D8(32), OXI_D8(40), OXI_D8(48), OXI_D8(56)
#define OXI_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OXI_NAMES24 OXI_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define OXI_NAMES32 OXI_NAMES24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define OXI_NAMES64                                                                                                  \
  OXI_NAMES32                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OXI_PRODUCT(columns, names) \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." OXI_TEXT(ELEMENT) "." OXI_TEXT(ELEMENT) " {" names "}, "

// d (64, kColumns) += A (64, 16) B (16, kColumns), or = if not `add`.
template <int kColumns>
struct Product;

// With kColumns / 2 registers the operands that follow them have these numbers.
#define OXI_PRODUCT_OF(columns, names, registers, n0, n1, n2, n3, n4, n5, n6)                                        \
  template <>                                                                                                        \
  struct Product<columns> {                                                                                          \
    /* A and B in shared memory, each kAlongRows or kAcrossRows. */                                                  \
    template <int kWayOfA = kAlongRows, int kWayOfB = kAlongRows>                                                    \
    __device__ static __forceinline__ void of_shared(float (&d)[columns / 2], unsigned a, unsigned b, int add) {     \
      asm volatile(                                                                                                  \
          "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, " n2 ", 0;\n"                                       \
          "mov.b64 a, {" n0 ", " OXI_OPERAND_HIGH "};\nmov.b64 b, {" n1 ", " OXI_OPERAND_HIGH "};\n" OXI_PRODUCT(    \
              columns, names) "a, b, add, 1, 1, " n3 ", " n4 ";\n}"                                                    \
          : registers                                                                                                \
          : "r"(a), "r"(b), "r"(add), "n"(kWayOfA), "n"(kWayOfB)                                                     \
          : "memory");                                                                                               \
    }                                                                                                                \
    /* A in registers, B in shared memory, kAlongRows or kAcrossRows. */                                             \
    template <int kWay>                                                                                              \
    __device__ static __forceinline__ void of_registers(float (&d)[columns / 2], const unsigned (&a)[4], unsigned b, \
                                                        int add) {                                                   \
      asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, " n5 ", 0;\nmov.b64 b, {" n4                  \
                   ", " OXI_OPERAND_HIGH "};\n" OXI_PRODUCT(columns, names) "{" n0 ", " n1 ", " n2 ", " n3           \
                   "}, b, add, 1, 1, " n6 ";\n}"                                                                     \
                   : registers                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(kWay)                         \
                   : "memory");                                                                                      \
    }                                                                                                                \
  };

OXI_PRODUCT_OF(32, OXI_NAMES16, OXI_D16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
OXI_PRODUCT_OF(48, OXI_NAMES24, OXI_D24, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
OXI_PRODUCT_OF(64, OXI_NAMES32, OXI_D32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
OXI_PRODUCT_OF(128, OXI_NAMES64, OXI_D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")

// The counterpart of load_blocks (shared_memory.cuh).
__device__ __forceinline__ void store_blocks(unsigned address, const unsigned (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Have N registers in each thread of this warpgroup from now on, a multiple of 8, instead of kBefore: what some give away
// others may have.
template <int N, int kBefore>
__device__ __forceinline__ void change_registers() {
  if constexpr (N < kBefore) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
  } else if constexpr (N > kBefore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
  }
}

}  // namespace oxi
