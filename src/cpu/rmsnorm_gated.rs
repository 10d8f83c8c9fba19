//! Gated RMSNorm. With r = rsqrt(mean over the group of v^2 + eps):
//!
//! ```text
//! norm_before_gate:  v = x           out = (v r weight + bias) silu(z)
//! otherwise:         v = x silu(z)   out =  v r weight + bias
//! ```
//!
//! With c the gradient of v r (dout weight, gated in the first form): dv = r (c - v r mean(c v r)).
//! dweight and dbias are partial sums over blocks of rows, added in order.

use rayon::prelude::*;

use crate::cpu::real::{Real, dot};
use crate::dims::NormDims;
use crate::ops::rmsnorm_gated::{NormGradients, NormInputs};
use crate::tensor::{Rows, View};

/// Rows a task takes; fixed, so that sums over rows have one order.
const BLOCK: usize = 32;

/// One row's buffers, and the parameters, in the accumulation type.
struct Row<T> {
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    /// x, then v r.
    normed: Vec<T>,
    z: Vec<T>,
    /// 1 / rms of each group.
    rstd: Vec<T>,
}

impl<T: Real> Row<T> {
    fn new(inputs: &NormInputs) -> Self {
        let dim = inputs.dims.dim;
        let load = |view: &View<1>| {
            let mut values = vec![T::zero(); dim];
            view.load_line([0], 0, &mut values);
            values
        };
        Row {
            weight: load(&inputs.weight),
            bias: inputs.bias.as_ref().map(load),
            normed: vec![T::zero(); dim],
            z: vec![T::zero(); dim],
            rstd: vec![T::zero(); dim / inputs.dims.group_size],
        }
    }

    /// Load row `row` and normalize it.
    #[inline(always)]
    fn normalize(&mut self, inputs: &NormInputs, row: usize) {
        let group_size = inputs.dims.group_size;
        inputs.x.row(row).load_line([0], 0, &mut self.normed);
        if let Some(z) = &inputs.z {
            z.row(row).load_line([0], 0, &mut self.z);
            if !inputs.norm_before_gate {
                for (v, z) in self.normed.iter_mut().zip(&self.z) {
                    *v *= z.silu();
                }
            }
        }
        for (group, rstd) in self.normed.chunks_exact_mut(group_size).zip(&mut self.rstd) {
            let mean = dot(group, group) / T::from_f64(group_size as f64);
            let factor = (mean + T::from_f64(inputs.eps)).sqrt().recip();
            *rstd = factor;
            for v in group {
                *v *= factor;
            }
        }
    }

    /// values = normed * weight + bias.
    #[inline(always)]
    fn affine(&self, values: &mut [T]) {
        let products = self.normed.iter().zip(&self.weight);
        for (value, (&normed, &weight)) in values.iter_mut().zip(products) {
            *value = normed * weight;
        }
        if let Some(bias) = &self.bias {
            for (value, &bias) in values.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    }
}

pub fn forward<T: Real>(inputs: &NormInputs, out: &Rows) {
    for_each_block(&inputs.dims, |rows| {
        let mut row = Row::<T>::new(inputs);
        let mut result = vec![T::zero(); inputs.dims.dim];
        simd!({
            for index in rows.clone() {
                row.normalize(inputs, index);
                row.affine(&mut result);
                if inputs.z.is_some() && inputs.norm_before_gate {
                    for (value, z) in result.iter_mut().zip(&row.z) {
                        *value *= z.silu();
                    }
                }
                out.row(index).store_line([0], 0, &result);
            }
        });
    });
}

fn for_each_block(dims: &NormDims, task: impl Fn(std::ops::Range<usize>) + Sync) {
    let nrows = dims.nrows;
    (0..nrows.div_ceil(BLOCK))
        .into_par_iter()
        .for_each(|block| task(block * BLOCK..nrows.min((block + 1) * BLOCK)));
}

pub fn backward<T: Real>(inputs: &NormInputs, gradients: &NormGradients) {
    let NormDims { nrows, dim, group_size, .. } = inputs.dims;
    // dweight and dbias of each block of rows.
    let mut partials = vec![T::zero(); nrows.div_ceil(BLOCK) * 2 * dim];
    partials.par_chunks_mut(2 * dim).enumerate().for_each(|(block, partial)| {
        let (dweight, dbias) = partial.split_at_mut(dim);
        let mut row = Row::<T>::new(inputs);
        let mut c = vec![T::zero(); dim];
        let mut dz = vec![T::zero(); dim];
        simd!({
            for index in block * BLOCK..nrows.min((block + 1) * BLOCK) {
                row.normalize(inputs, index);
                gradients.dout.row(index).load_line([0], 0, &mut c);
                if inputs.z.is_some() && inputs.norm_before_gate {
                    row.affine(&mut dz);
                    for ((dz, c), z) in dz.iter_mut().zip(&mut c).zip(&row.z) {
                        *dz *= *c * z.silu_grad();
                        *c *= z.silu();
                    }
                }
                for ((dweight, &c), &normed) in dweight.iter_mut().zip(&c).zip(&row.normed) {
                    *dweight += c * normed;
                }
                for (dbias, &c) in dbias.iter_mut().zip(&c) {
                    *dbias += c;
                }
                for (c, &weight) in c.iter_mut().zip(&row.weight) {
                    *c *= weight;
                }
                let groups = c.chunks_exact_mut(group_size);
                for ((c, normed), &rstd) in
                    groups.zip(row.normed.chunks_exact(group_size)).zip(&row.rstd)
                {
                    let mean = dot(c, normed) / T::from_f64(group_size as f64);
                    for (c, &normed) in c.iter_mut().zip(normed) {
                        *c = rstd * (*c - normed * mean);
                    }
                }
                if inputs.z.is_some() && !inputs.norm_before_gate {
                    // c is dv; v = x silu(z), and x is read again: v r does not give it back where silu(z) is 0.
                    inputs.x.row(index).load_line([0], 0, &mut dz);
                    for ((dz, c), z) in dz.iter_mut().zip(&mut c).zip(&row.z) {
                        *dz *= *c * z.silu_grad();
                        *c *= z.silu();
                    }
                }
                gradients.dx.row(index).store_line([0], 0, &c);
                if let Some(view) = &gradients.dz {
                    view.row(index).store_line([0], 0, &dz);
                }
            }
        });
    });
    let mut total = vec![0.0; 2 * dim];
    for partial in partials.chunks_exact(2 * dim) {
        for (total, partial) in total.iter_mut().zip(partial) {
            *total += partial.as_f64();
        }
    }
    gradients.dweight.store_line([0], 0, &total[..dim]);
    if let Some(dbias) = &gradients.dbias {
        dbias.store_line([0], 0, &total[dim..]);
    }
}
