// Element types and memory: what tensors hold against the fp32 that kernels compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace oxi {

// The names that instances are compiled with (-DELEMENT=bf16).
using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(f32 value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(f16 value) { return __half2float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline f32 from_float<f32>(float value) {
  return value;
}
template <>
__device__ inline bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline f16 from_float<f16>(float value) {
  return __float2half_rn(value);
}

// Elements of one 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

__device__ inline float low(unsigned word, f32) { return __uint_as_float(word); }
// A bf16 is the upper half of the fp32 of the same value.
__device__ inline float low(unsigned word, bf16) { return __uint_as_float(word << 16); }
__device__ inline float high(unsigned word, bf16) { return __uint_as_float(word & 0xffff0000u); }
__device__ inline float low(unsigned word, f16) { return __low2float(reinterpret_cast<const __half2 &>(word)); }
__device__ inline float high(unsigned word, f16) { return __high2float(reinterpret_cast<const __half2 &>(word)); }

__device__ inline unsigned join(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned &>(pair);
}
__device__ inline unsigned join(float low, float high, f16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned &>(pair);
}

// Factors of a pair of elements as scale() takes them, and the products, rounded. The sum of two bf16 is as good as a factor in
// fp32 there, and needs two instructions instead of five; in fp16 a small one has no room for the second.
__device__ inline uint2 scale_factors(float low_factor, float high_factor, bf16) {
  const unsigned upper = join(low_factor, high_factor, bf16());
  return make_uint2(upper, join(low_factor - low(upper, bf16()), high_factor - high(upper, bf16()), bf16()));
}
__device__ inline unsigned scale(unsigned word, uint2 factors, bf16) {
  const auto pair = [](const unsigned &word) { return reinterpret_cast<const __nv_bfloat162 &>(word); };
  const __nv_bfloat162 product = __hfma2(pair(word), pair(factors.x), __hmul2(pair(word), pair(factors.y)));
  return reinterpret_cast<const unsigned &>(product);
}
__device__ inline uint2 scale_factors(float low_factor, float high_factor, f16) {
  return make_uint2(__float_as_uint(low_factor), __float_as_uint(high_factor));
}
__device__ inline unsigned scale(unsigned word, uint2 factors, f16) {
  return join(low(word, f16()) * __uint_as_float(factors.x), high(word, f16()) * __uint_as_float(factors.y), f16());
}

// N neighbours as they lie in memory, moved in accesses of up to 16 bytes. In words, since the compiler would give each
// 16-bit element a register of its own.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  static constexpr int kPerWord = sizeof(unsigned) / sizeof(T);
  unsigned word[N / kPerWord];

  __device__ static Pack of(const float (&values)[N]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N / kPerWord; ++i) {
      if constexpr (kPerWord == 1) {
        pack.word[i] = __float_as_uint(values[i]);
      } else {
        pack.word[i] = join(values[2 * i], values[2 * i + 1], T());
      }
    }
    return pack;
  }

  __device__ float operator[](int i) const {
    if constexpr (kPerWord == 1) {
      return low(word[i], T());
    } else {
      return i % 2 == 0 ? low(word[i / 2], T()) : high(word[i / 2], T());
    }
  }

  // Let the compiler know nothing of the contents: it then unpacks them again where they are used, instead of keeping
  // their fp32 values from before in twice the registers.
  __device__ void forget() {
#pragma unroll
    for (int i = 0; i < N / kPerWord; ++i) asm volatile("" : "+r"(word[i]));
  }
};

// Elements first, ..., first + N - 1 of a line of `size`, `step` apart; 0 for those past its end. `dense`: step is 1, the
// line is aligned to what N elements are moved in, and `size` is a multiple of N.
template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T *line, long long step, int first, int size, bool dense) {
  if (dense && first < size) return *reinterpret_cast<const Pack<T, N> *>(line + first);
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = !dense && first + i < size ? to_float(line[(first + i) * step]) : 0.0f;
  return Pack<T, N>::of(values);
}

// The counterpart of load_pack: elements past the end are left alone.
template <int N, typename T>
__device__ inline void store_pack(T *line, long long step, int first, int size, bool dense, const Pack<T, N> &pack) {
  if (dense) {
    if (first < size) *reinterpret_cast<Pack<T, N> *>(line + first) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i < size) line[(first + i) * step] = from_float<T>(pack[i]);
    }
  }
}

// An element of fp32 if `wide`, otherwise of T: parameters and dt have either dtype. Loaded by predicated instructions, each
// into a register of its own: with a branch, or one register, the thread would wait for it before it asks for the next.
// Volatile, since the compiler takes no notice of the memory access and could move it before a test for null or a barrier.
template <typename T>
struct Either {
  unsigned word = 0;
  unsigned half = 0;
  bool wide = true;

  Either() = default;
  __device__ Either(const void *data, long long offset, bool wide) : wide(wide) {
    const char *address = static_cast<const char *>(data) + offset * (wide ? sizeof(float) : sizeof(T));
    asm volatile(
        "{\n"
        ".reg .pred wide;\n"
        "setp.ne.s32 wide, %3, 0;\n"
        "@wide ld.global.u32 %0, [%2];\n"
        "@!wide ld.global.u16 %1, [%2];\n"
        "}"
        : "=r"(word), "=r"(half)
        : "l"(address), "r"(static_cast<int>(wide)));
  }

  __device__ operator float() const { return wide ? __uint_as_float(word) : low(half, T()); }
};

// An element of fp32 if `wide`, otherwise of T, where a thread may wait for it.
template <typename T>
__device__ inline float load_either(const void *data, long long offset, bool wide) {
  return wide ? static_cast<const float *>(data)[offset] : to_float(static_cast<const T *>(data)[offset]);
}

// An element of 64 bits or of 32: positions and indices.
__device__ inline long long load_integer(const void *data, long long offset, bool is_64_bit) {
  return is_64_bit ? static_cast<const long long *>(data)[offset] : static_cast<const int *>(data)[offset];
}

// The same from L2, each time anew: what is read before the wait for earlier work is not to be found again after it.
__device__ inline long long load_integer_anew(const void *data, long long offset, bool is_64_bit) {
  if (is_64_bit) return static_cast<const volatile long long *>(data)[offset];
  return static_cast<const volatile int *>(data)[offset];
}

// Element's number among the dtypes that are known at run time.
template <typename T>
constexpr int kDtype = OXI_F32;
template <>
constexpr int kDtype<bf16> = OXI_BF16;
template <>
constexpr int kDtype<f16> = OXI_F16;

// Load and store an element of a tensor whose dtype is known at run time.
__device__ inline float load_scalar(const void *data, int dtype, long long offset) {
  if (dtype == OXI_F32) return static_cast<const float *>(data)[offset];
  if (dtype == OXI_BF16) return to_float(static_cast<const bf16 *>(data)[offset]);
  return to_float(static_cast<const f16 *>(data)[offset]);
}
__device__ inline void store_scalar(void *data, int dtype, long long offset, float value) {
  if (dtype == OXI_F32) {
    static_cast<float *>(data)[offset] = value;
  } else if (dtype == OXI_BF16) {
    static_cast<bf16 *>(data)[offset] = from_float<bf16>(value);
  } else {
    static_cast<f16 *>(data)[offset] = from_float<f16>(value);
  }
}

}  // namespace oxi
