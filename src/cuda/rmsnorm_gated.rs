//! Gated RMSNorm on CUDA: which instance serves a call, and its launch.

use super::launch::{Block, Stream, WARP};
use super::params::{self, OxiNormBackward, OxiNormForward, OxiNormParameters, VECTOR};
use super::rows::MergedRows;
use crate::error::Result;
use crate::ops::rmsnorm_gated::{NormGradients, NormInputs};
use crate::tensor::{DType, Rows, View};

/// A block's warps where each has a group of its own.
const BLOCK_WARPS: usize = 4;
/// The most warps that share a group: kMaxWarps of the kernels.
const MAX_WARPS: usize = 16;

/// How a group of a row is shared out.
struct Split {
    /// How many warps share it.
    warps: usize,
    /// The choice of VECTORS: 0 for none on the chip, 1 for one vector a thread, 2 for `most`.
    held: usize,
}

/// `dense`: whether vectors can be moved at once. The warps do not depend on it, nor do results.
fn split(group_size: usize, dtype: DType, most: usize, dense: bool) -> Split {
    let vectors = group_size.div_ceil(VECTOR / dtype.size());
    let warps = vectors.div_ceil(most * WARP);
    let held = match vectors {
        _ if !dense || warps > MAX_WARPS => 0,
        ..=WARP => 1,
        _ => 2,
    };
    Split { warps: warps.min(MAX_WARPS), held }
}

/// The value of the axis GATE.
fn gate(inputs: &NormInputs) -> usize {
    match (&inputs.z, inputs.norm_before_gate) {
        (None, _) => 0,
        (Some(_), true) => 1,
        (Some(_), false) => 2,
    }
}

/// Whether rows and parameters, and groups in them, are dense and aligned.
fn is_dense(inputs: &NormInputs, merged: &MergedRows, rows: &[&Rows], dtype: DType) -> bool {
    let parameter = |view: &View<1>| params::is_dense(view, VECTOR / dtype.size());
    (inputs.dims.group_size * dtype.size()).is_multiple_of(VECTOR)
        && rows.iter().enumerate().all(|(index, rows)| merged.is_dense(index, rows, VECTOR))
        && parameter(&inputs.weight)
        && inputs.bias.as_ref().is_none_or(parameter)
}

pub fn forward(stream: &Stream, dtype: DType, inputs: &NormInputs, out: &Rows) -> Result<()> {
    let dims = &inputs.dims;
    let z = inputs.z.as_ref().unwrap_or(&inputs.x);
    let tensors = [&inputs.x, out, z];
    let merged = MergedRows::new(&tensors);
    let dense = is_dense(inputs, &merged, &tensors, dtype);
    let Split { warps, held } = split(dims.group_size, dtype, 4, dense);
    let params = OxiNormForward {
        rows: merged.rows,
        x: merged.tensor(0, &inputs.x),
        out: merged.tensor(1, out),
        z: merged.tensor(2, z),
        weight: params::vector(Some(&inputs.weight)),
        bias: params::vector(inputs.bias.as_ref()),
        dim: params::size("x", "dim", dims.dim)?,
        group_size: dims.group_size as i32,
        eps: inputs.eps as f32,
        warps: warps as i32,
        dense: dense.into(),
        ..Default::default()
    };
    let groups = dims.nrows * (dims.dim / dims.group_size);
    let (blocks, warps) =
        if warps == 1 { (groups.div_ceil(BLOCK_WARPS), BLOCK_WARPS) } else { (groups, warps) };
    let choices = [params::dtype(dtype) as usize, held, gate(inputs)];
    stream.launch(&params, &choices, [blocks, 1, 1], Block::of(warps * WARP))
}

pub fn backward(
    stream: &Stream,
    dtype: DType,
    inputs: &NormInputs,
    gradients: &NormGradients,
    partials: &View<3>,
) -> Result<()> {
    let dims = &inputs.dims;
    let z = inputs.z.as_ref().unwrap_or(&inputs.x);
    let dz = gradients.dz.as_ref().unwrap_or(&gradients.dx);
    let tensors = [&inputs.x, &gradients.dout, &gradients.dx, z, dz];
    let merged = MergedRows::new(&tensors);
    let dense = is_dense(inputs, &merged, &tensors, dtype)
        && (partials.data() as usize).is_multiple_of(VECTOR);
    let biased = inputs.bias.is_some();
    let (most, tensors_read) = if inputs.z.is_some() { (2, 3) } else { (4, 2) };
    let ngroups = dims.dim / dims.group_size;
    let plan = |on_chip: bool| {
        let Split { warps, held } = split(dims.group_size, dtype, most, on_chip);
        // Rows of a block at once.
        let slots = if warps == 1 && held > 0 { BLOCK_WARPS } else { 1 };
        let threads = warps * slots * WARP;
        let vectors = [0, 1, most][held];
        // Of two rows for each thread, and in fp32 of the weight for each that shares a group.
        let shared_bytes = vectors * VECTOR * 2 * tensors_read * threads
            + vectors * VECTOR / dtype.size() * size_of::<f32>() * warps * WARP;
        let choices = [params::dtype(dtype) as usize, held, gate(inputs)];
        let block = Block { threads, shared_bytes };
        let resident = stream.resident_blocks::<OxiNormBackward>(&choices, block)?;
        Ok((warps, slots, choices, block, resident))
    };
    let (warps, slots, choices, block, resident) = match plan(dense && !biased)? {
        (.., 0) => plan(false)?,
        plan => plan,
    };
    // As many as run at once, so that all end together; none without a row, since its part of the sum would be missing.
    let blocks = (resident / ngroups).max(1).min(dims.nrows.div_ceil(slots)).min(partials.shape[0]);
    let params = OxiNormBackward {
        rows: merged.rows,
        x: merged.tensor(0, &inputs.x),
        dout: merged.tensor(1, &gradients.dout),
        dx: merged.tensor(2, &gradients.dx),
        z: merged.tensor(3, z),
        dz: merged.tensor(4, dz),
        weight: params::vector(Some(&inputs.weight)),
        bias: params::vector(inputs.bias.as_ref()),
        partials: partials.data().cast(),
        blocks: blocks as i32,
        dim: params::size("x", "dim", dims.dim)?,
        group_size: dims.group_size as i32,
        eps: inputs.eps as f32,
        warps: warps as i32,
        dense: dense.into(),
    };
    stream.launch(&params, &choices, [blocks * ngroups, 1, 1], block)?;

    let params = OxiNormParameters {
        partials: partials.data().cast(),
        dweight: params::vector(Some(&gradients.dweight)),
        dbias: params::vector(gradients.dbias.as_ref()),
        blocks: blocks as i32,
        dim: params::size("x", "dim", dims.dim)?,
    };
    let columns = dims.dim * if biased { 2 } else { 1 };
    stream.launch(&params, &[], [columns.div_ceil(WARP), 1, 1], Block::of_column_sum(blocks))
}
