// Functions of one fp32 value. Those of the inner loops use the hardware's approximations (2 ulp), which is enough for
// fp32's tolerances; the others are libdevice's.
#pragma once

namespace oxi {

// 2^x, e^x and 1 / x by the special function unit, where a result below 2^-126 becomes 0: without that each takes several
// instructions more.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

__device__ inline float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / (1 + e^-x). e^-x is infinite below -88, where the result is 0.
__device__ inline float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }

// Its derivative.
__device__ inline float silu_grad(float x) {
  const float sig = sigmoid(x);
  return sig * fmaf(x, 1.0f - sig, 1.0f);
}

// ln(1 + e^x), the identity above 20 as torch's.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// What a state keeps of itself over a step of log decay x: state = kept * state + (factor * state + added).
//
// Where e^x is from 1/2 to below 1, factor is e^x - 1 and kept is 1: 1 - e^x is what the state forgets, token after
// token, and a factor near 1 would round it away. Elsewhere factor is e^x and kept 0. An infinite state becomes NaN.
struct Decay {
  float kept;
  float factor;

  __device__ explicit Decay(float x) {
    // The series of e^x - 1 to x^8 / 8!, within 2e-7 down to -ln 2.
    float minus_one = 1.0f / 40320.0f;
    minus_one = fmaf(minus_one, x, 1.0f / 5040.0f);
    minus_one = fmaf(minus_one, x, 1.0f / 720.0f);
    minus_one = fmaf(minus_one, x, 1.0f / 120.0f);
    minus_one = fmaf(minus_one, x, 1.0f / 24.0f);
    minus_one = fmaf(minus_one, x, 1.0f / 6.0f);
    minus_one = fmaf(minus_one, x, 0.5f);
    minus_one = fmaf(minus_one * x, x, x);
    const bool nearly_stays = x < 0.0f && x > -0.6931472f;
    kept = nearly_stays ? 1.0f : 0.0f;
    factor = nearly_stays ? minus_one : fast_exp(x);
  }

  __device__ float apply(float state, float added) const { return fmaf(kept, state, fmaf(factor, state, added)); }
};

}  // namespace oxi
