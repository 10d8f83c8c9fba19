//! Small matrix products on one thread: a safe face for the gemm crate.

use crate::cpu::real::Real;

/// A matrix of `rows` x `cols` in a slice, row after row, or its transpose.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "a matrix larger than its data");
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose; nothing is copied.
    pub fn t(self) -> Self {
        Mat {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// dst = keep * dst + a b, dst row after row. With keep = 0 what dst held does not matter, NaN included.
pub fn matmul<T: Real>(dst: &mut [T], keep: T, a: Mat<'_, T>, b: Mat<'_, T>) {
    assert_eq!(a.cols, b.rows, "a matrix product of sizes that do not fit");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(dst.len() >= m * n, "a matrix product larger than its destination");
    // SAFETY: Mat::new and the assertion above checked that every element addressed below lies in its slice, and dst,
    // a unique borrow, overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            keep != T::zero(),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{Mat, matmul};

    #[test]
    fn an_empty_sum_scales_or_clears() {
        let mut dst = [2.0f64; 4];
        matmul(&mut dst, 3.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 2));
        assert_eq!(dst, [6.0; 4]);
        let mut dst = [f64::NAN; 4];
        matmul(&mut dst, 0.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 2));
        assert_eq!(dst, [0.0; 4]);
    }

    #[test]
    fn products_with_transposes_and_accumulation() {
        let a = [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [1.0f64, -1.0, 0.5, 2.0, 0.0, 3.0];
        let mut dst = [10.0; 4];
        matmul(&mut dst, 2.0, Mat::new(&a, 2, 3), Mat::new(&b, 3, 2));
        assert_eq!(dst, [22.0, 32.0, 26.5, 44.0]);
        let mut dst = [f64::NAN; 4];
        matmul(&mut dst, 0.0, Mat::new(&a, 3, 2).t(), Mat::new(&b, 2, 3).t());
        assert_eq!(dst, [0.5, 17.0, 1.0, 22.0]);
    }
}
