//! Mamba-1's selective scan, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Checker, SelectiveScanDims, document_rows, initial_rows, optional};
use crate::error::Result;
use crate::ops::with_accumulator;
use crate::tensor::{TensorArg, View};
use crate::torch::run_on_cpu;

/// u, delta, A, B, C; D, z, delta_bias, initial_state, seq_idx, cu_seqlens where given.
type ScanTensors = (
    TensorArg,
    TensorArg,
    TensorArg,
    TensorArg,
    TensorArg,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
);

/// B or C, or the gradient of one.
pub enum Projection {
    /// (dim, dstate), the same for all tokens.
    Fixed(View<2>),
    /// (batch, ngroups, dstate, seqlen)
    Varying(View<4>),
}

impl Projection {
    fn new(
        check: &Checker,
        arg: &'static str,
        tensor: &TensorArg,
        dims: &SelectiveScanDims,
    ) -> Result<Self> {
        Ok(match tensor.shape().len() {
            2 => Projection::Fixed(check.same_or_f32(arg, tensor, dims.A())?),
            3 => Projection::Varying(check.same(arg, tensor, dims.tokens())?.unsqueeze(1)),
            _ => Projection::Varying(check.same(arg, tensor, dims.groups())?),
        })
    }
}

/// What forward and backward both read.
pub struct ScanInputs {
    pub dims: SelectiveScanDims,
    pub u: View<3>,
    pub delta: View<3>,
    pub A: View<2>,
    pub B: Projection,
    pub C: Projection,
    pub D: Option<View<1>>,
    pub z: Option<View<3>>,
    pub delta_bias: Option<View<1>>,
    pub initial_state: Option<View<3>>,
    pub seq_idx: Option<View<2>>,
    pub cu_seqlens: Option<View<1>>,
    pub delta_softplus: bool,
}

impl ScanInputs {
    fn new(check: &Checker, tensors: &ScanTensors, delta_softplus: bool) -> Result<Self> {
        let (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens) = tensors;
        let dims = SelectiveScanDims::new(u, A, B, C)?;
        let cu_seqlens = optional(cu_seqlens, |tensor| check.cu_seqlens(tensor, dims.batch))?;
        Ok(ScanInputs {
            dims,
            u: check.same("u", u, dims.u())?,
            delta: check.same_or_f32("delta", delta, dims.u())?,
            A: check.same_or_f32("A", A, dims.A())?,
            B: Projection::new(check, "B", B, &dims)?,
            C: Projection::new(check, "C", C, &dims)?,
            D: optional(D, |D| check.same_or_f32("D", D, dims.channels()))?,
            z: optional(z, |z| check.same("z", z, dims.u()))?,
            delta_bias: optional(delta_bias, |bias| {
                check.same_or_f32("delta_bias", bias, dims.channels())
            })?,
            initial_state: optional(initial_state, |state| {
                let rows = initial_rows(dims.batch, cu_seqlens.as_ref(), state);
                check.same_or_f32("initial_state", state, dims.states(rows))
            })?,
            seq_idx: optional(seq_idx, |ids| check.int32("seq_idx", ids, dims.seq_idx()))?,
            cu_seqlens,
            delta_softplus,
        })
    }

    /// The state after each sequence's last token, or its gradient.
    fn last_state(
        &self,
        check: &Checker,
        arg: &'static str,
        states: &Option<TensorArg>,
    ) -> Result<Option<View<3>>> {
        let shape = self.dims.states(("batch", self.dims.batch));
        optional(states, |states| check.accumulator(arg, states, shape))
    }

    /// The state after each document's last token, or its gradient.
    fn varlen_states(
        &self,
        check: &Checker,
        arg: &'static str,
        states: &Option<TensorArg>,
    ) -> Result<Option<View<3>>> {
        let rows = document_rows(self.dims.batch, self.cu_seqlens.as_ref());
        let shape = self.dims.states(rows);
        optional(states, |states| check.accumulator(arg, states, shape))
    }
}

/// Gradients that come in, and where those that go out are written.
pub struct ScanGradients {
    pub dout: Option<View<3>>,
    pub dlast_state: Option<View<3>>,
    pub dvarlen_states: Option<View<3>>,
    pub du: View<3>,
    pub ddelta: View<3>,
    pub dA: View<2>,
    pub dB: Projection,
    pub dC: Projection,
    pub dD: Option<View<1>>,
    pub dz: Option<View<3>>,
    pub ddelta_bias: Option<View<1>>,
    pub dinitial_state: Option<View<3>>,
}

/// out (batch, dim, seqlen) and, where given, last_state and varlen_states are written.
#[pyfunction]
pub fn selective_scan_forward(
    py: Python<'_>,
    tensors: ScanTensors,
    delta_softplus: bool,
    out: TensorArg,
    last_state: Option<TensorArg>,
    varlen_states: Option<TensorArg>,
) -> PyResult<()> {
    run_on_cpu(py, "selective_scan_fn", "u", &tensors.0, |threads| {
        let check = Checker::new("u", &tensors.0)?;
        let inputs = ScanInputs::new(&check, &tensors, delta_softplus)?;
        let out = check.same("out", &out, inputs.dims.u())?;
        let last_state = inputs.last_state(&check, "last_state", &last_state)?;
        let varlen_states = inputs.varlen_states(&check, "varlen_states", &varlen_states)?;
        cpu::pool::install(threads, || {
            with_accumulator!(check.dtype, T => {
                cpu::selective_scan::forward::<T>(
                    &inputs,
                    &out,
                    last_state.as_ref(),
                    varlen_states.as_ref(),
                )
            })
        })?
    })
}

/// Every gradient tensor that is given is written; those of optional arguments go with their arguments.
#[pyfunction]
pub fn selective_scan_backward(
    py: Python<'_>,
    tensors: ScanTensors,
    delta_softplus: bool,
    dout: Option<TensorArg>,
    dlast_state: Option<TensorArg>,
    dvarlen_states: Option<TensorArg>,
    du: TensorArg,
    ddelta: TensorArg,
    dA: TensorArg,
    dB: TensorArg,
    dC: TensorArg,
    dD: Option<TensorArg>,
    dz: Option<TensorArg>,
    ddelta_bias: Option<TensorArg>,
    dinitial_state: Option<TensorArg>,
) -> PyResult<()> {
    run_on_cpu(py, "selective_scan_fn", "u", &tensors.0, |threads| {
        let check = Checker::new("u", &tensors.0)?;
        let inputs = ScanInputs::new(&check, &tensors, delta_softplus)?;
        let dims = inputs.dims;
        let gradients = ScanGradients {
            dout: optional(&dout, |dout| check.same("dout", dout, dims.u()))?,
            dlast_state: inputs.last_state(&check, "dlast_state", &dlast_state)?,
            dvarlen_states: inputs.varlen_states(&check, "dvarlen_states", &dvarlen_states)?,
            du: check.same("du", &du, dims.u())?,
            ddelta: check.same_or_f32("ddelta", &ddelta, dims.u())?,
            dA: check.same_or_f32("dA", &dA, dims.A())?,
            dB: Projection::new(&check, "dB", &dB, &dims)?,
            dC: Projection::new(&check, "dC", &dC, &dims)?,
            dD: optional(&dD, |dD| check.same_or_f32("dD", dD, dims.channels()))?,
            dz: optional(&dz, |dz| check.same("dz", dz, dims.u()))?,
            ddelta_bias: optional(&ddelta_bias, |bias| {
                check.same_or_f32("ddelta_bias", bias, dims.channels())
            })?,
            dinitial_state: optional(&dinitial_state, |state| {
                let rows = initial_rows(dims.batch, inputs.cu_seqlens.as_ref(), state);
                check.same_or_f32("dinitial_state", state, dims.states(rows))
            })?,
        };
        cpu::pool::install(threads, || {
            with_accumulator!(check.dtype, T => {
                cpu::selective_scan::backward::<T>(&inputs, &gradients)
            })
        })?
    })
}
