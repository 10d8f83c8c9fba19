//! Numbers: `Real` is what the kernels compute in (f32, f64), `Element` what tensors hold (also bf16, f16).

use std::ops::{AddAssign, MulAssign, SubAssign};

use half::{bf16, f16};
use num_traits::Float;

/// Above this softplus is the identity, as torch's.
pub const SOFTPLUS_LINEAR: f32 = 20.0;

/// The type an op computes and accumulates in.
pub trait Real:
    Float + AddAssign + SubAssign + MulAssign + Default + Send + Sync + std::fmt::Debug + 'static
{
    fn from_f32(value: f32) -> Self;
    fn from_f64(value: f64) -> Self;
    fn as_f32(self) -> f32;
    fn as_f64(self) -> f64;

    /// e^self, written so that a loop over it becomes vector code.
    fn fast_exp(self) -> Self;

    /// e^self as what `decayed` multiplies a state by: e^self - 1 where that is from -1/2 to below 0, since 1 - e^self is
    /// what a state forgets, token after token, and e^self near 1 would round it; e^self elsewhere.
    fn decay_factor(self) -> Self;

    /// The state decayed by a factor of `decay_factor`, and what is added to it.
    #[inline(always)]
    fn decayed(self, factor: Self, added: Self) -> Self {
        let kept = if factor < Self::zero() { self } else { Self::zero() };
        kept + factor.mul_add(self, added)
    }

    /// 1 / (1 + e^-self), with `exp` of a negative argument only.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let small = (-self.abs()).fast_exp();
        let one = Self::one();
        (if self >= Self::zero() { one } else { small }) / (one + small)
    }

    #[inline(always)]
    fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// The derivative of silu.
    #[inline(always)]
    fn silu_grad(self) -> Self {
        let sigmoid = self.sigmoid();
        sigmoid * (Self::one() + self * (Self::one() - sigmoid))
    }

    /// ln(1 + e^self), written like `fast_exp`.
    fn softplus(self) -> Self;

    /// The derivative of softplus.
    #[inline(always)]
    fn softplus_grad(self) -> Self {
        if self > Self::from_f32(SOFTPLUS_LINEAR) { Self::one() } else { self.sigmoid() }
    }
}

/// e^x = 2 (1 + tail) half, half a power of 2; 0 below -87, infinity above 88.7.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; then the series of e^r - 1 to r^7 / 7!.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // What is past these ends at 0 and at infinity too; a NaN stays one.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -87.5 { -87.5 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        series = series.mul_add(r, coefficient);
    }
    // 2^(n - 1): n reaches 128, one more than an exponent holds.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    (series * r, f32::from_bits(n.wrapping_add(126) << 23))
}

impl Real for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn as_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }

    /// Within 3e-7 relative of e^x; 0 below -87 (no subnormal results), infinity above 88.7.
    #[inline(always)]
    fn fast_exp(self) -> Self {
        let (tail, half) = exp_parts(self);
        2.0 * tail.mul_add(half, half)
    }

    #[inline(always)]
    fn decay_factor(self) -> Self {
        let (tail, half) = exp_parts(self);
        let minus_one = (2.0 * tail).mul_add(half, 2.0 * half - 1.0);
        let nearly_stays = minus_one < 0.0 && minus_one > -0.5;
        if nearly_stays { minus_one } else { 2.0 * tail.mul_add(half, half) }
    }

    /// Within 5e-7 relative.
    ///
    /// max(self, 0) + ln(1 + w) with w = e^-|self|, and ln(1 + w) = 2 artanh(z) with z = w / (2 + w) <= 1/3: the series
    /// of artanh to z^13 / 13.
    #[inline(always)]
    fn softplus(self) -> Self {
        let w = (-self.abs()).fast_exp();
        let z = w / (2.0 + w);
        let mut series = 1.0 / 13.0;
        for odd in [11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
            series = series.mul_add(z * z, 1.0 / odd);
        }
        let positive = if self > 0.0 { self } else { 0.0 };
        let value = positive + 2.0 * z * series;
        if self > SOFTPLUS_LINEAR { self } else { value }
    }
}

impl Real for f64 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn as_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn fast_exp(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn decay_factor(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn softplus(self) -> Self {
        if self > f64::from(SOFTPLUS_LINEAR) { self } else { self.exp().ln_1p() }
    }
}

/// Sum of products in 16 interleaved sums: vector code, and always the same order.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
    let tail = rest.fold(T::zero(), |sum, (&a, &b)| sum + a * b);
    for (a, b) in chunks_a.zip(chunks_b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().fold(tail, |total, &sum| total + sum)
}

/// Sum in f64, in 16 interleaved sums as `dot`.
#[inline(always)]
pub fn sum<T: Real>(values: &[T]) -> f64 {
    let mut sums = [0.0; 16];
    let chunks = values.chunks_exact(16);
    let tail = chunks.remainder().iter().fold(0.0, |sum, value| sum + value.as_f64());
    for values in chunks {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value.as_f64();
        }
    }
    sums.iter().fold(tail, |total, sum| total + sum)
}

/// What a floating tensor holds.
pub trait Element: Copy {
    fn to_real<T: Real>(self) -> T;
    fn from_real<T: Real>(value: T) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_real<T: Real>(self) -> T {
        T::from_f32(self)
    }
    #[inline(always)]
    fn from_real<T: Real>(value: T) -> Self {
        value.as_f32()
    }
}

impl Element for f64 {
    #[inline(always)]
    fn to_real<T: Real>(self) -> T {
        T::from_f64(self)
    }
    #[inline(always)]
    fn from_real<T: Real>(value: T) -> Self {
        value.as_f64()
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_real<T: Real>(self) -> T {
        T::from_f32(self.to_f32())
    }
    #[inline(always)]
    fn from_real<T: Real>(value: T) -> Self {
        bf16::from_f32(value.as_f32())
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_real<T: Real>(self) -> T {
        T::from_f32(self.to_f32())
    }
    #[inline(always)]
    fn from_real<T: Real>(value: T) -> Self {
        f16::from_f32(value.as_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    #[test]
    fn fast_exp_is_within_3e_7() {
        let worst = (-86_800..=88_700)
            .map(|i| i as f32 * 1e-3 + 1.7e-4)
            .map(|x| {
                let exact = f64::from(x).exp();
                (f64::from(x.fast_exp()) / exact - 1.0).abs()
            })
            .fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst}");
    }

    #[test]
    fn a_decay_near_one_keeps_what_it_forgets() {
        for x in [-1e-7f32, -1e-5, -1e-3, -0.3, -0.69, -0.7, -5.0, -80.0, -1e4, -12345.6, 0.0, 0.5]
        {
            let exact = f64::from(x).exp();
            let forgotten = 1.0 - f64::from(1.0f32.decayed(x.decay_factor(), 0.0));
            assert!((forgotten - (1.0 - exact)).abs() <= 6e-8, "{x}");
            // Token after token: a state that nearly stays.
            let factor = x.decay_factor();
            let lost = if factor < 0.0 { f64::from(factor) } else { f64::from(factor) - 1.0 };
            assert!((lost / (exact - 1.0) - 1.0).abs() < 5e-7 || x == 0.0, "{x}");
        }
        assert!(f32::NAN.decay_factor().is_nan());
    }

    #[test]
    fn fast_exp_at_the_edges() {
        assert_eq!(0.0f32.fast_exp(), 1.0);
        assert_eq!((-1e4f32).fast_exp(), 0.0);
        assert_eq!(f32::NEG_INFINITY.fast_exp(), 0.0);
        assert_eq!(100.0f32.fast_exp(), f32::INFINITY);
        assert_eq!(f32::INFINITY.fast_exp(), f32::INFINITY);
        assert!(f32::NAN.fast_exp().is_nan());
    }

    #[test]
    fn softplus_is_within_5e_7() {
        let worst = (-86_000..=100_000)
            .map(|i| i as f32 * 1e-3 + 1.7e-4)
            .map(|x| {
                let exact = f64::from(x).exp().ln_1p();
                (f64::from(x.softplus()) / exact - 1.0).abs()
            })
            .fold(0.0, f64::max);
        assert!(worst < 5e-7, "{worst}");
        assert_eq!(f32::INFINITY.softplus(), f32::INFINITY);
        assert_eq!(f32::NEG_INFINITY.softplus(), 0.0);
    }

    #[test]
    fn sigmoid_and_softplus_stay_finite() {
        for x in [-1e4f32, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4] {
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(x.sigmoid()) - exact).abs() < 1e-6);
            assert!(x.silu().is_finite() && x.silu_grad().is_finite() && x.softplus().is_finite());
        }
        assert_eq!(25.0f32.softplus(), 25.0);
        assert!(f32::NAN.softplus().is_nan());
    }
}
