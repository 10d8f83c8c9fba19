//! Mamba-2's chunk scan (state-space duality), forward and backward.

use pyo3::prelude::*;

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda::{self, module::CudaDevice};
use crate::dims::{Checker, SsdDims, document_rows, initial_rows, optional};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
#[cfg(feature = "cuda")]
use crate::tensor::DType;
use crate::tensor::{TensorArg, View};
use crate::torch::{Backend, run, run_on_cpu};

/// x, dt, A, B, C; D, z, dt_bias, initial_states where given.
type SsdTensors = (
    TensorArg,
    TensorArg,
    TensorArg,
    TensorArg,
    TensorArg,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
);

/// seq_idx, cu_seqlens where given.
type TokenPacking = (Option<TensorArg>, Option<TensorArg>);

/// dy, states, partials, cuts, segments: see `SsdWorkspaces`.
type BackwardWorkspaces =
    (Option<TensorArg>, Option<TensorArg>, Option<TensorArg>, Option<TensorArg>, Option<TensorArg>);

/// cu_chunk_seqlens, seq_idx.
type ChunkPacking = (TensorArg, TensorArg);

/// How documents are packed into sequences.
pub enum Packing {
    /// By token: seq_idx (batch, seqlen), cu_seqlens (ndocs + 1,).
    Tokens { seq_idx: Option<View<2>>, cu_seqlens: Option<View<1>> },
    /// By chunk: cu_chunk_seqlens (nchunks + 1,), seq_idx (nchunks,) with a row of initial_states for each.
    Chunks { cu_chunk_seqlens: View<1>, seq_idx: View<1> },
}

impl Packing {
    fn by_token(check: &Checker, packing: &TokenPacking, dims: &SsdDims) -> Result<Self> {
        let (seq_idx, cu_seqlens) = packing;
        Ok(Packing::Tokens {
            seq_idx: optional(seq_idx, |ids| check.int32("seq_idx", ids, dims.seq_idx()))?,
            cu_seqlens: optional(cu_seqlens, |bounds| check.cu_seqlens(bounds, dims.batch))?,
        })
    }

    fn by_chunk(check: &Checker, packing: &ChunkPacking) -> Result<Self> {
        let (cu_chunk_seqlens, seq_idx) = packing;
        let nchunks = seq_idx.view("seq_idx", ["nchunks"])?.shape[0];
        let bounds = [("nchunks + 1", nchunks + 1)];
        Ok(Packing::Chunks {
            cu_chunk_seqlens: check.integer("cu_chunk_seqlens", cu_chunk_seqlens, bounds)?,
            seq_idx: check.integer("seq_idx", seq_idx, [("nchunks", nchunks)])?,
        })
    }

    /// How many documents have states of their own, by token: without cu_seqlens each sequence is one.
    #[cfg(feature = "cuda")]
    pub fn documents(&self) -> usize {
        match self {
            Packing::Tokens { cu_seqlens, .. } => {
                cu_seqlens.map_or(1, |bounds| bounds.shape[0] - 1)
            }
            Packing::Chunks { .. } => unreachable!("chunks of the caller's are the CPU backend's"),
        }
    }

    fn initial_rows(&self, dims: &SsdDims, states: &TensorArg) -> (&'static str, usize) {
        match self {
            Packing::Tokens { cu_seqlens, .. } => {
                initial_rows(dims.batch, cu_seqlens.as_ref(), states)
            }
            Packing::Chunks { .. } => ("ndocs", states.shape().first().copied().unwrap_or(0)),
        }
    }
}

/// What forward and backward both read.
pub struct SsdInputs {
    pub dims: SsdDims,
    pub x: View<4>,
    pub dt: View<3>,
    pub A: View<1>,
    pub B: View<4>,
    pub C: View<4>,
    /// (nheads, headdim); expanded along headdim when the caller's has one value a head.
    pub D: Option<View<2>>,
    pub z: Option<View<4>>,
    pub dt_bias: Option<View<1>>,
    pub initial_states: Option<View<4>>,
    pub packing: Packing,
    pub dt_softplus: bool,
    /// (low, high), low <= high.
    pub dt_limit: (f64, f64),
}

impl SsdInputs {
    fn new(
        check: &Checker,
        tensors: &SsdTensors,
        dims: SsdDims,
        packing: Packing,
        dt_softplus: bool,
        dt_limit: (f64, f64),
    ) -> Result<Self> {
        let (x, dt, A, B, C, D, z, dt_bias, initial_states) = tensors;
        Ok(SsdInputs {
            dims,
            x: check.same("x", x, dims.x())?,
            dt: check.same_or_f32("dt", dt, dims.dt())?,
            A: check.same_or_f32("A", A, dims.heads())?,
            B: check.same("B", B, dims.B())?,
            C: check.same("C", C, dims.B())?,
            D: optional(D, |D| per_head_or_element(check, "D", D, &dims))?,
            z: optional(z, |z| check.same("z", z, dims.x()))?,
            dt_bias: optional(dt_bias, |bias| check.same_or_f32("dt_bias", bias, dims.heads()))?,
            initial_states: optional(initial_states, |states| {
                let rows = packing.initial_rows(&dims, states);
                check.same_or_f32("initial_states", states, dims.states(rows))
            })?,
            packing,
            dt_softplus,
            dt_limit,
        })
    }

    /// The shape of final_states.
    fn final_states(&self) -> [(&'static str, usize); 4] {
        self.dims.states(("batch", self.dims.batch))
    }

    /// The shape of varlen_states: a row a document of cu_seqlens, or a chunk.
    fn varlen_states(&self) -> Result<[(&'static str, usize); 4]> {
        let rows = match &self.packing {
            Packing::Tokens { cu_seqlens: Some(cu_seqlens), .. } => {
                document_rows(self.dims.batch, Some(cu_seqlens))
            }
            Packing::Tokens { cu_seqlens: None, .. } => {
                return Err(Error::Value {
                    arg: "varlen_states",
                    got: "a tensor without cu_seqlens".into(),
                    allowed: "both, or neither".into(),
                });
            }
            Packing::Chunks { seq_idx, .. } => ("nchunks", seq_idx.shape[0]),
        };
        Ok(self.dims.states(rows))
    }
}

/// D, or its gradient: (nheads,) or (nheads, headdim).
fn per_head_or_element(
    check: &Checker,
    arg: &'static str,
    D: &TensorArg,
    dims: &SsdDims,
) -> Result<View<2>> {
    if D.shape().len() == 2 {
        check.same_or_f32(arg, D, [("nheads", dims.nheads), ("headdim", dims.headdim)])
    } else {
        Ok(check.same_or_f32(arg, D, dims.heads())?.expand_last(dims.headdim))
    }
}

/// The returned states, where asked for.
pub struct SsdStates {
    /// After each sequence's last token.
    pub final_states: Option<View<4>>,
    /// After each document's last token.
    pub varlen_states: Option<View<4>>,
}

/// Gradients that come in, and where those that go out are written.
pub struct SsdGradients {
    pub dout: Option<View<4>>,
    pub dfinal_states: Option<View<4>>,
    pub dvarlen_states: Option<View<4>>,
    pub dx: View<4>,
    pub ddt: View<3>,
    pub dA: View<1>,
    pub dB: View<4>,
    pub dC: View<4>,
    pub dD: Option<View<2>>,
    pub dz: Option<View<4>>,
    pub ddt_bias: Option<View<1>>,
    pub dinitial_states: Option<View<4>>,
}

#[cfg(feature = "cuda")]
impl SsdGradients {
    /// Elements of dD a head: 1 where D has one value.
    pub fn dD_columns(&self) -> usize {
        self.dD.map_or(0, |dD| if dD.strides()[1] == 0 { 1 } else { dD.shape[1] })
    }
}

/// What the CUDA backend's kernels of backward leave for one another; dout with it, which it does not do without.
#[cfg(feature = "cuda")]
pub struct SsdWorkspaces {
    pub dout: View<4>,
    /// With z: the gradient of what it gates.
    pub dy: Option<View<4>>,
    /// In x's dtype: (batch, slots, nheads, elements) gradients of states. `slots`: one more than there are for a sequence's
    /// tokens, one for as many as `ssd_backward_slot_tokens` says, and, with dvarlen_states, for its documents, 1 without
    /// cu_seqlens. `elements` as in `ssd_forward`. Behind them, where forward kept none, as many states as it would keep, but
    /// in these slots and elements.
    pub states: View<1>,
    /// Those that `ssd_forward` kept.
    pub entry_states: Option<View<1>>,
    /// float32: 3 (batch, nheads, seqlen), of tokens; (batch windows, nheads (2 + elements of D a head)), gradients of
    /// parameters.
    pub partials: View<1>,
    /// With seq_idx or cu_seqlens, int32: 3 (batch, windows).
    pub cuts: Option<View<1>>,
    /// As `ssd_forward`'s.
    pub segments: Option<View<3>>,
    /// What `cuda::ssd_backward::fits` says.
    pub fits: bool,
}

#[cfg(feature = "cuda")]
impl SsdWorkspaces {
    fn new(
        device: &CudaDevice,
        check: &Checker,
        tensors: &BackwardWorkspaces,
        entry_states: &Option<TensorArg>,
        inputs: &SsdInputs,
        gradients: &SsdGradients,
    ) -> Result<Self> {
        let (dy, states, partials, cuts, segments) = tensors;
        let dims = inputs.dims;
        let missing = |arg| Error::Value {
            arg,
            got: "None".into(),
            allowed: "a tensor of x's shape and dtype".into(),
        };
        if inputs.z.is_some() && gradients.dz.is_none() {
            return Err(missing("dz"));
        }
        let dout = gradients.dout.ok_or_else(|| missing("dout"))?;
        let dy = match (&inputs.z, dy) {
            (None, _) => None,
            (Some(_), Some(dy)) => Some(check.same("dy", dy, dims.x())?),
            (Some(_), None) => return Err(missing("dy")),
        };
        let mapped = [&inputs.x, dy.as_ref().unwrap_or(&dout), &inputs.B, &inputs.C, &gradients.dx];
        let dense = [&gradients.dB, &gradients.dC];
        let fits = cuda::ssd_backward::fits(device, check.dtype, &dims, mapped, dense);
        let slots = cuda::ssd::Slots::of(inputs, gradients.dvarlen_states.is_some(), fits);
        let windows = cuda::ssd_backward::windows(dims.seqlen);
        let state = cuda::ssd::state_elements(dims.headdim, dims.dstate);
        let found = if entry_states.is_some() { 0 } else { slots.of_entries() };
        let state_count = dims.batch * (slots.of_exits() + found) * dims.nheads;
        if entry_states.is_some() && !fits {
            return Err(cuda::ssd::unserved_entry_states());
        }
        let rows = dims.batch * windows;
        let columns = dims.nheads * (2 + gradients.dD_columns());
        let tokens = cuda::ssd_backward::TOKEN_FLOATS * dims.batch * dims.nheads * dims.seqlen;
        let scratch = |arg, tensor: &Option<TensorArg>, dtype, elements| {
            check.scratch(arg, tensor.as_ref(), dtype, elements)
        };
        Ok(SsdWorkspaces {
            dout,
            dy,
            states: scratch("states", states, check.dtype, state_count * state)?,
            entry_states: entry_states_of(check, entry_states, inputs)?,
            partials: scratch("partials", partials, DType::F32, tokens + rows * columns)?,
            cuts: match inputs.packing {
                Packing::Tokens { seq_idx: None, cu_seqlens: None } => None,
                _ => Some(scratch("cuts", cuts, DType::I32, 3 * rows)?),
            },
            segments: segments_workspace(check, segments, &dims)?,
            fits,
        })
    }
}

/// As `ssd_forward` says.
#[cfg(feature = "cuda")]
fn entry_states_of(
    check: &Checker,
    states: &Option<TensorArg>,
    inputs: &SsdInputs,
) -> Result<Option<View<1>>> {
    let dims = inputs.dims;
    let slots = cuda::ssd::Slots::of(inputs, false, true).of_entries();
    let elements = dims.batch * slots * dims.nheads * dims.headdim * dims.dstate;
    optional(states, |states| check.scratch("entry_states", Some(states), check.dtype, elements))
}

#[cfg(feature = "cuda")]
fn segments_workspace(
    check: &Checker,
    segments: &Option<TensorArg>,
    dims: &SsdDims,
) -> Result<Option<View<3>>> {
    optional(segments, |segments| {
        let elements = segments.shape().last().copied().unwrap_or(0);
        check.workspace(Some(segments), dims.batch * dims.nheads, elements)
    })
}

/// out (batch, seqlen, nheads, headdim) and, where given, final_states and varlen_states are written.
///
/// segments: on CUDA the workspace of sequences that are walked in several segments at once, (2 (segments - 1), batch
/// nheads, elements + 1) float32 and contiguous, `elements` being those of a state with headdim rounded up to a multiple
/// of 64, dstate to 64, 128 or 256.
///
/// entry_states: on CUDA, where `_ssd_keeps_states` says so, the states that enter every other tile are kept there for
/// `ssd_backward`: (batch, slots, nheads, headdim dstate) in x's dtype and contiguous. `slots`: one for 128 tokens of a
/// sequence and, with initial_states, for each of its documents, 1 without cu_seqlens.
#[pyfunction]
pub fn ssd_forward(
    py: Python<'_>,
    tensors: SsdTensors,
    packing: TokenPacking,
    dt_softplus: bool,
    dt_limit: (f64, f64),
    out: TensorArg,
    final_states: Option<TensorArg>,
    varlen_states: Option<TensorArg>,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] segments: Option<TensorArg>,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] entry_states: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let dims = SsdDims::new(&tensors.0, &tensors.3)?;
        let packing = Packing::by_token(&check, &packing, &dims)?;
        let inputs = SsdInputs::new(&check, &tensors, dims, packing, dt_softplus, dt_limit)?;
        let out = check.same("out", &out, inputs.dims.x())?;
        let states = SsdStates {
            final_states: optional(&final_states, |states| {
                check.accumulator("final_states", states, inputs.final_states())
            })?,
            varlen_states: optional(&varlen_states, |states| {
                check.floating("varlen_states", states, inputs.varlen_states()?)
            })?,
        };
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(
                threads,
                || with_accumulator!(check.dtype, T => cpu::ssd::forward::<T>(&inputs, &out, &states)),
            )?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                let segments = segments_workspace(&check, &segments, &inputs.dims)?;
                let kept = entry_states_of(&check, &entry_states, &inputs)?;
                let (dtype, kept) = (check.dtype, kept.as_ref());
                cuda::ssd::forward(&stream, dtype, &inputs, &out, states, segments.as_ref(), kept)
            }
        }
    })
}

/// Every gradient tensor that is given is written; those of optional arguments go with their arguments.
///
/// dout must be given on CUDA, as must the workspaces that `SsdWorkspaces` says; the CPU backend takes none. entry_states: what
/// `ssd_forward` kept, if `_ssd_backward_slot_tokens` says 128.
#[pyfunction]
pub fn ssd_backward(
    py: Python<'_>,
    tensors: SsdTensors,
    packing: TokenPacking,
    dt_softplus: bool,
    dt_limit: (f64, f64),
    dout: Option<TensorArg>,
    dfinal_states: Option<TensorArg>,
    dvarlen_states: Option<TensorArg>,
    dx: TensorArg,
    ddt: TensorArg,
    dA: TensorArg,
    dB: TensorArg,
    dC: TensorArg,
    dD: Option<TensorArg>,
    dz: Option<TensorArg>,
    ddt_bias: Option<TensorArg>,
    dinitial_states: Option<TensorArg>,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] workspaces: BackwardWorkspaces,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] entry_states: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let dims = SsdDims::new(&tensors.0, &tensors.3)?;
        let packing = Packing::by_token(&check, &packing, &dims)?;
        let inputs = SsdInputs::new(&check, &tensors, dims, packing, dt_softplus, dt_limit)?;
        let gradients = SsdGradients {
            dout: optional(&dout, |dout| check.same("dout", dout, dims.x()))?,
            dfinal_states: optional(&dfinal_states, |states| {
                check.accumulator("dfinal_states", states, inputs.final_states())
            })?,
            dvarlen_states: optional(&dvarlen_states, |states| {
                check.floating("dvarlen_states", states, inputs.varlen_states()?)
            })?,
            dx: check.same("dx", &dx, dims.x())?,
            ddt: check.same_or_f32("ddt", &ddt, dims.dt())?,
            dA: check.same_or_f32("dA", &dA, dims.heads())?,
            dB: check.same("dB", &dB, dims.B())?,
            dC: check.same("dC", &dC, dims.B())?,
            dD: optional(&dD, |dD| per_head_or_element(&check, "dD", dD, &dims))?,
            dz: optional(&dz, |dz| check.same("dz", dz, dims.x()))?,
            ddt_bias: optional(&ddt_bias, |bias| {
                check.same_or_f32("ddt_bias", bias, dims.heads())
            })?,
            dinitial_states: optional(&dinitial_states, |states| {
                let rows = inputs.packing.initial_rows(&dims, states);
                check.same_or_f32("dinitial_states", states, dims.states(rows))
            })?,
        };
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(
                threads,
                || with_accumulator!(check.dtype, T => cpu::ssd::backward::<T>(&inputs, &gradients)),
            )?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                cuda::ssd::check_sizes(&inputs.dims)?;
                let device = stream.device;
                let (kept, of_states) = (&entry_states, &workspaces);
                let workspaces =
                    SsdWorkspaces::new(device, &check, of_states, kept, &inputs, &gradients)?;
                let dtype = check.dtype;
                cuda::ssd_backward::backward(&stream, dtype, &inputs, &gradients, &workspaces)
            }
        }
    })
}

/// How many tokens have a slot of `SsdWorkspaces::states` on CUDA, where these decide which kernels serve a call. dy: with z
/// the workspace, else dout. 0 on the CPU, which has no slots.
#[pyfunction]
#[pyo3(name = "_ssd_backward_slot_tokens")]
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
pub fn ssd_backward_slot_tokens(
    py: Python<'_>,
    x: TensorArg,
    dy: TensorArg,
    B: TensorArg,
    C: TensorArg,
    dx: TensorArg,
    dB: TensorArg,
    dC: TensorArg,
) -> PyResult<usize> {
    match Backend::of(py, "x", &x)? {
        Backend::Cpu { .. } => Ok(0),
        #[cfg(feature = "cuda")]
        Backend::Cuda(stream) => {
            let check = Checker::new("x", &x)?;
            let dims = SsdDims::new(&x, &B)?;
            let of_x = |arg, tensor| check.same(arg, tensor, dims.x());
            let of_B = |arg, tensor| check.same(arg, tensor, dims.B());
            let mapped = [
                &of_x("x", &x)?,
                &of_x("dout", &dy)?,
                &of_B("B", &B)?,
                &of_B("C", &C)?,
                &of_x("dx", &dx)?,
            ];
            let dense = [&of_B("dB", &dB)?, &of_B("dC", &dC)?];
            let fits = cuda::ssd_backward::fits(stream.device, check.dtype, &dims, mapped, dense);
            Ok(cuda::ssd::slot_tokens(fits))
        }
    }
}

/// Whether `ssd_forward` can keep states for a backward; never on the CPU.
#[pyfunction]
#[pyo3(name = "_ssd_keeps_states")]
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
pub fn ssd_keeps_states(
    py: Python<'_>,
    x: TensorArg,
    B: TensorArg,
    C: TensorArg,
    z: Option<TensorArg>,
    out: TensorArg,
) -> PyResult<bool> {
    match Backend::of(py, "x", &x)? {
        Backend::Cpu { .. } => Ok(false),
        #[cfg(feature = "cuda")]
        Backend::Cuda(stream) => {
            let check = Checker::new("x", &x)?;
            let dims = SsdDims::new(&x, &B)?;
            let of_x = |arg, tensor| check.same(arg, tensor, dims.x());
            let of_B = |arg, tensor| check.same(arg, tensor, dims.B());
            let mapped = [&of_x("x", &x)?, &of_B("B", &B)?, &of_B("C", &C)?, &of_x("out", &out)?];
            let z = optional(&z, |z| check.same("z", z, dims.x()))?;
            let (device, dtype) = (stream.device, check.dtype);
            Ok(cuda::ssd::keeps_states(device, dtype, &dims, mapped, z.as_ref()))
        }
    }
}

/// One sequence (batch 1) in the caller's chunks, for inference: out and chunk_states (nchunks, nheads, headdim, dstate),
/// the state after each chunk, are written. last_chunk_indices, an index of a chunk for each document, is checked here.
#[pyfunction]
pub fn ssd_varlen_forward(
    py: Python<'_>,
    tensors: SsdTensors,
    packing: ChunkPacking,
    last_chunk_indices: TensorArg,
    dt_softplus: bool,
    dt_limit: (f64, f64),
    out: TensorArg,
    chunk_states: TensorArg,
) -> PyResult<()> {
    run_on_cpu(py, "mamba_chunk_scan_combined_varlen", "x", &tensors.0, |threads| {
        let check = Checker::new("x", &tensors.0)?;
        let dims = SsdDims::new(&tensors.0, &tensors.3)?;
        let packing = Packing::by_chunk(&check, &packing)?;
        let inputs = SsdInputs::new(&check, &tensors, dims, packing, dt_softplus, dt_limit)?;
        let ndocs = last_chunk_indices.view("last_chunk_indices", ["ndocs"])?.shape[0];
        let last_chunks =
            check.integer("last_chunk_indices", &last_chunk_indices, [("ndocs", ndocs)])?;
        out.expect_writable("out")?;
        for (arg, input) in [("x", Some(&tensors.0)), ("z", tensors.6.as_ref())] {
            if let Some(input) = input.filter(|input| !out.is_same_memory(input)) {
                out.expect_apart("out", arg, input)?;
            }
        }
        let out = check.same("out", &out, inputs.dims.x())?;
        let chunk_states =
            check.floating("chunk_states", &chunk_states, inputs.varlen_states()?)?;
        let nchunks = chunk_states.shape[0];
        let states = SsdStates { final_states: None, varlen_states: Some(chunk_states) };
        for document in 0..ndocs {
            let chunk = last_chunks.get_int([document]);
            cpu::documents::index("last_chunk_indices", chunk, Some(nchunks))?;
        }
        cpu::pool::install(
            threads,
            || with_accumulator!(check.dtype, T => cpu::ssd::forward::<T>(&inputs, &out, &states)),
        )?
    })
}
