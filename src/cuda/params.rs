//! The structs that kernels are launched with, made by bindgen from cuda/include/params.h, and how tensors get into them.

use super::instances::{KERNELS, Kernel, named};
use crate::error::{Error, Result};
use crate::tensor::{DType, View};

pub use generated::*;

mod generated {
    // Of constants the ops use some, and the rest is as bindgen writes it.
    #![allow(dead_code, non_camel_case_types, clippy::all, clippy::undocumented_unsafe_blocks)]

    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

/// A kernel's params struct. It names the kernel, so that none is launched with another's.
pub trait Params: Copy {
    const KERNEL: &'static Kernel;
}

impl Params for OxiConv {
    const KERNEL: &'static Kernel = &KERNELS[named("causal_conv1d_fwd")];
}

impl Params for OxiConvBackward {
    const KERNEL: &'static Kernel = &KERNELS[named("causal_conv1d_bwd")];
}

impl Params for OxiConvParameters {
    const KERNEL: &'static Kernel = &KERNELS[named("causal_conv1d_bwd_parameters")];
}

impl Params for OxiConvUpdate {
    const KERNEL: &'static Kernel = &KERNELS[named("causal_conv1d_update")];
}

impl Params for OxiVarlenStates {
    const KERNEL: &'static Kernel = &KERNELS[named("causal_conv1d_varlen_states")];
}

impl Params for OxiNormForward {
    const KERNEL: &'static Kernel = &KERNELS[named("rmsnorm_gated_fwd")];
}

impl Params for OxiNormBackward {
    const KERNEL: &'static Kernel = &KERNELS[named("rmsnorm_gated_bwd")];
}

impl Params for OxiNormParameters {
    const KERNEL: &'static Kernel = &KERNELS[named("rmsnorm_gated_bwd_parameters")];
}

/// The params of other kernels than the structs' own.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdRecurrence(pub OxiSsd);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdMappedStates(pub OxiSsdMapped);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdBackwardCuts(pub OxiSsdBackward);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdBackwardStates(pub OxiSsdBackward);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdBackwardParameters(pub OxiSsdBackward);
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SsdBackwardMappedStates(pub OxiSsdBackwardMapped);

impl Params for OxiSsd {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_fwd_mma")];
}

impl Params for SsdRecurrence {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_fwd_recurrence")];
}

impl Params for OxiSsdMapped {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_fwd_wgmma")];
}

impl Params for SsdMappedStates {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_fwd_wgmma_states")];
}

impl Params for OxiSsdBackward {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_mma")];
}

impl Params for SsdBackwardCuts {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_cuts")];
}

impl Params for SsdBackwardStates {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_mma_states")];
}

impl Params for SsdBackwardParameters {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_parameters")];
}

impl Params for OxiSsdBackwardMapped {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_wgmma")];
}

impl Params for SsdBackwardMappedStates {
    const KERNEL: &'static Kernel = &KERNELS[named("ssd_bwd_wgmma_states")];
}

impl Params for OxiStateUpdate {
    const KERNEL: &'static Kernel = &KERNELS[named("selective_state_update")];
}

impl Params for OxiStatePassing {
    const KERNEL: &'static Kernel = &KERNELS[named("state_passing_fwd")];
}

impl Params for OxiStatePassingBackward {
    const KERNEL: &'static Kernel = &KERNELS[named("state_passing_bwd")];
}

impl Params for OxiStatePassingDecay {
    const KERNEL: &'static Kernel = &KERNELS[named("state_passing_bwd_decay")];
}

/// Bytes that a thread moves at once.
pub const VECTOR: usize = 16;

/// Whether the last dimension is dense and lines along it start at multiples of what `width` elements are moved in.
pub fn is_dense<const N: usize>(view: &View<N>, width: usize) -> bool {
    is_dense_along(view, N - 1, width)
}

/// The same of another dimension.
pub fn is_dense_along<const N: usize>(view: &View<N>, axis: usize, width: usize) -> bool {
    let bytes = VECTOR.min(width * view.dtype.size()) as isize;
    let starts_aligned = |other: usize| {
        let (stride, size) = (view.strides()[other], view.shape[other]);
        other == axis || size <= 1 || stride * view.dtype.size() as isize % bytes == 0
    };
    view.strides()[axis] == 1 && view.data() as isize % bytes == 0 && (0..N).all(starts_aligned)
}

/// Whether bulk copies can know of a dense tensor: no dimension is expanded, none too large.
pub fn can_be_mapped(view: &View<4>) -> bool {
    const MOST_BYTES: isize = 1 << 40;
    let fits = |axis: usize| {
        let bytes = view.strides()[axis] * view.dtype.size() as isize;
        view.shape[axis] <= 1 || (bytes > 0 && bytes < MOST_BYTES)
    };
    (0..3).all(fits) && view.shape.iter().all(|&size| u32::try_from(size).is_ok())
}

/// A dtype's number in params.h, and its place among the values of an axis of dtypes.
pub fn dtype(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => OXI_F32,
        DType::BF16 => OXI_BF16,
        DType::F16 => OXI_F16,
        DType::F64 | DType::I32 | DType::I64 => {
            unreachable!("a dtype that no kernel takes, where it was checked")
        }
    }
}

/// Whether a tensor that may be fp32 or of the first one's dtype is fp32.
pub fn is_wide(dtype: DType) -> i32 {
    (dtype == DType::F32).into()
}

/// A number of tokens: positions are 32-bit numbers in kernels, also those some tiles or batches past the last token.
pub fn seqlen(seqlen: usize) -> Result<i32> {
    const LIMIT: usize = i32::MAX as usize - 4096;
    if seqlen >= LIMIT {
        return Err(Error::Unsupported {
            arg: "x",
            got: format!("seqlen = {seqlen}"),
            allowed: format!("seqlen < {LIMIT} on cuda"),
        });
    }
    Ok(seqlen as i32)
}

/// A size that a kernel counts in 32 bits: of a single dimension, never a product of two.
pub fn size(arg: &'static str, name: &str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::Unsupported {
        arg,
        got: format!("{name} = {size}"),
        allowed: format!("{name} < 2^31 on cuda"),
    })
}

/// A vector, or one with no data where it was left out.
pub fn vector(view: Option<&View<1>>) -> OxiVector {
    view.map_or_else(OxiVector::default, |view| OxiVector {
        data: view.data().cast(),
        step: view.strides()[0] as i64,
        dtype: dtype(view.dtype) as i32,
        ..Default::default()
    })
}

/// Where a tensor lies, for the structs of N dimensions: (null, 0 strides) where it was left out.
fn place<const N: usize>(view: Option<&View<N>>) -> (*mut std::ffi::c_void, [i64; N]) {
    view.map_or((std::ptr::null_mut(), [0; N]), |view| {
        (view.data().cast(), view.strides().map(|stride| stride as i64))
    })
}

macro_rules! tensor_struct {
    ($name:ident, $ndim:literal) => {
        impl From<Option<&View<$ndim>>> for $name {
            fn from(view: Option<&View<$ndim>>) -> Self {
                let (data, stride) = place(view);
                $name { data, stride }
            }
        }
    };
}
tensor_struct!(OxiTensor2, 2);
tensor_struct!(OxiTensor3, 3);
tensor_struct!(OxiTensor4, 4);
tensor_struct!(OxiTensor5, 5);
