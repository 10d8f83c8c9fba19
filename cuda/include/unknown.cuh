// Values that the compiler knows nothing of: what is made of one is computed where it is needed, rather than before the loop
// around it, in registers through all of it.
#pragma once

namespace oxi {

__device__ __forceinline__ int unknown(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ unsigned unknown(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ long long unknown(long long value) {
  asm volatile("" : "+l"(value));
  return value;
}
template <typename T>
__device__ __forceinline__ T *unknown(T *pointer) {
  asm volatile("" : "+l"(pointer));
  // But that it is not of shared memory.
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

}  // namespace oxi
