//! Tensors of rows for kernels: leading dimensions merged where every tensor allows it.

use super::params::{OXI_MAX_OUTER, OxiRowTensor, OxiRows};
use crate::tensor::Rows;

const MAX_OUTER: usize = OXI_MAX_OUTER as usize;

/// The shared leading dimensions of tensors of rows.
pub struct MergedRows {
    pub rows: OxiRows,
    /// Strides of the merged dimensions, for each tensor.
    strides: Vec<[i64; MAX_OUTER]>,
}

impl MergedRows {
    /// Of `tensors` with the same leading dimensions.
    pub fn new(tensors: &[&Rows]) -> Self {
        let mut rows = OxiRows { count: 1, ..Default::default() };
        let mut strides = vec![[0; MAX_OUTER]; tensors.len()];
        // From the outermost on; where the next one's elements lie between those of the one before, both are one.
        for axis in 0..tensors[0].outer().len() {
            let size = tensors[0].outer()[axis].0 as i64;
            rows.count *= size;
            if size == 1 {
                continue;
            }
            let own = |tensor: usize| tensors[tensor].outer()[axis].1 as i64;
            let last = (rows.ndim - 1).max(0) as usize;
            let merges = rows.ndim > 0
                && (0..tensors.len()).all(|tensor| strides[tensor][last] == size * own(tensor));
            let place = if merges { last } else { rows.ndim as usize };
            rows.size[place] = if merges { rows.size[last] * size } else { size };
            rows.ndim = place as i32 + 1;
            for (tensor, strides) in strides.iter_mut().enumerate() {
                strides[place] = own(tensor);
            }
        }
        MergedRows { rows, strides }
    }

    /// The `index`th tensor.
    pub fn tensor(&self, index: usize, tensor: &Rows) -> OxiRowTensor {
        OxiRowTensor {
            data: tensor.data().cast(),
            stride: self.strides[index],
            step: tensor.step() as i64,
        }
    }

    /// Whether every row of the `index`th tensor is dense and starts at a multiple of `bytes`.
    pub fn is_dense(&self, index: usize, tensor: &Rows, bytes: usize) -> bool {
        let is_multiple = |value: i64| value % bytes as i64 == 0;
        tensor.step() == 1
            && is_multiple(tensor.data() as i64)
            && self.strides[index].iter().all(|&s| is_multiple(s * tensor.dtype().size() as i64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{DType, Device, TensorArg};

    fn merged(tensors: &[(&[usize], &[isize])]) -> (Vec<i64>, Vec<Vec<i64>>) {
        let rows: Vec<_> = tensors
            .iter()
            .map(|(shape, strides)| {
                let mut arg =
                    TensorArg::new(std::ptr::null_mut(), DType::F32, Device::Cpu, shape.len());
                for (axis, (&size, &stride)) in shape.iter().zip(*strides).enumerate() {
                    arg.set_axis(axis, size, stride);
                }
                arg.rows("x", shape).unwrap()
            })
            .collect();
        let merged = MergedRows::new(&rows.iter().collect::<Vec<_>>());
        let ndim = merged.rows.ndim as usize;
        let strides = merged.strides.iter().map(|strides| strides[..ndim].to_vec()).collect();
        (merged.rows.size[..ndim].to_vec(), strides)
    }

    #[test]
    fn dimensions_merge_where_all_tensors_allow_it() {
        let dense: (&[usize], &[isize]) = (&[2, 3, 1, 8], &[24, 8, 8, 1]);
        assert_eq!(merged(&[dense]), (vec![6], vec![vec![8]]));
        let exchanged: (&[usize], &[isize]) = (&[2, 3, 1, 8], &[8, 16, 8, 1]);
        assert_eq!(merged(&[dense, exchanged]), (vec![2, 3], vec![vec![24, 8], vec![8, 16]]));
        let expanded: (&[usize], &[isize]) = (&[2, 3, 1, 8], &[0, 0, 0, 1]);
        assert_eq!(merged(&[dense, expanded]), (vec![6], vec![vec![8], vec![0]]));
        assert_eq!(merged(&[(&[8], &[1])]), (vec![], vec![vec![]]));
    }
}
