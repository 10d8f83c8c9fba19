// Arguments of generic lambdas by which the compiler makes code for each value.
#pragma once

namespace oxi {

// An argument that the compiler knows.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
  __device__ constexpr operator decltype(kValue)() const { return kValue; }
};

}  // namespace oxi
