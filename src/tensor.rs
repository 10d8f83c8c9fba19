//! A torch tensor as this crate sees it (`TensorArg`), and checked access to its memory (`View`, `Rows`).

use std::ops::Range;

use half::{bf16, f16};

use crate::cpu::real::{Element, Real};
use crate::error::{Error, Result};

pub const MAX_DIMS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    F64,
    BF16,
    F16,
    I32,
    I64,
}

impl DType {
    pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];
    /// Without float64, which GPUs that people train on compute at a fraction of the speed.
    pub const FLOATS_ON_CUDA: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
    pub const INTEGERS: [DType; 2] = [DType::I32, DType::I64];

    /// torch's name for it.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::I32 => "int32",
            DType::I64 => "int64",
        }
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
        }
    }

    /// The dtype that results and states are accumulated in.
    pub fn accumulator(self) -> DType {
        if self == DType::F64 { DType::F64 } else { DType::F32 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// By torch's index.
    Cuda(usize),
    /// A device without a backend, by torch's name for it.
    Other(String),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
            Device::Other(name) => f.write_str(name),
        }
    }
}

/// Run `$body` with `$E` bound to the Rust type of a floating dtype.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $E = f32;
                $body
            }
            DType::F64 => {
                type $E = f64;
                $body
            }
            DType::BF16 => {
                type $E = bf16;
                $body
            }
            DType::F16 => {
                type $E = f16;
                $body
            }
            DType::I32 | DType::I64 => {
                unreachable!("an integer tensor where a floating one was checked for")
            }
        }
    };
}

/// One tensor argument: where it lies and how, nothing owned.
///
/// It is valid for the duration of the call it was passed to.
#[derive(Clone, Debug)]
pub struct TensorArg {
    ptr: *mut u8,
    pub dtype: DType,
    pub device: Device,
    ndim: usize,
    shape: [usize; MAX_DIMS],
    strides: [isize; MAX_DIMS],
    /// What came and what is allowed, where Python's object cannot be taken.
    refused: Option<Box<(String, String)>>,
}

// SAFETY: a TensorArg is a description. Its memory is reached through View and Rows only, whose users read inputs
// from any thread and give each task its own part of an output.
unsafe impl Send for TensorArg {}
// SAFETY: as above.
unsafe impl Sync for TensorArg {}

impl TensorArg {
    pub fn new(ptr: *mut u8, dtype: DType, device: Device, ndim: usize) -> Self {
        TensorArg {
            ptr,
            dtype,
            device,
            ndim,
            shape: [0; MAX_DIMS],
            strides: [0; MAX_DIMS],
            refused: None,
        }
    }

    /// A place to describe a tensor in.
    pub fn nothing() -> Self {
        TensorArg::new(std::ptr::null_mut(), DType::F32, Device::Cpu, 0)
    }

    /// An argument that `check` will refuse.
    pub fn refused(got: String, allowed: String) -> Self {
        TensorArg { refused: Some(Box::new((got, allowed))), ..TensorArg::nothing() }
    }

    /// Fail unless Python passed a tensor of a known kind.
    pub fn check(&self, arg: &'static str) -> Result<()> {
        match &self.refused {
            None => Ok(()),
            Some(refused) => {
                let (got, allowed) = *refused.clone();
                Err(Error::Type { arg, got, allowed })
            }
        }
    }

    pub fn set_axis(&mut self, axis: usize, size: usize, stride: isize) {
        self.shape[axis] = size;
        self.strides[axis] = stride;
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.ndim]
    }

    /// Whether it can be the imaginary part of complex numbers, the one kind of tensor that torch negates lazily: that
    /// starts at an odd element, and steps over the real parts. Asking torch takes as long as reading the tensor.
    pub fn may_be_imaginary(&self) -> bool {
        let starts_odd = self.ptr as usize / self.dtype.size() % 2 == 1;
        let mut axes = self.strides.iter().zip(self.shape());
        starts_odd || axes.all(|(stride, &size)| size <= 1 || stride % 2 == 0)
    }

    /// The error of an argument, if it is a tensor at all, whose shape is none of those that `allowed` lists.
    pub fn wrong_shape(&self, arg: &'static str, allowed: &str) -> Error {
        let got = format!("shape {}", tuple(self.shape()));
        self.check(arg).err().unwrap_or(Error::Value { arg, got, allowed: allowed.into() })
    }

    /// The tensor with exactly `N` dimensions, which `names` names.
    pub fn view<const N: usize>(&self, arg: &'static str, names: [&str; N]) -> Result<View<N>> {
        self.check(arg)?;
        if self.ndim != N {
            return Err(Error::Value {
                arg,
                got: format!("shape {}", tuple(self.shape())),
                allowed: format!("{N} dimensions ({})", names.join(", ")),
            });
        }
        Ok(View {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: std::array::from_fn(|axis| self.shape[axis]),
            strides: std::array::from_fn(|axis| self.strides[axis]),
        })
    }

    /// The tensor with exactly this shape. An axis of size `None` is one that it lacks and that the view has with a
    /// single element.
    pub fn view_of<const N: usize>(
        &self,
        arg: &'static str,
        shape: [(&str, impl Into<Option<usize>>); N],
    ) -> Result<View<N>> {
        self.check(arg)?;
        let axes = shape.map(|(name, size)| (name, size.into()));
        let sizes = || axes.iter().filter_map(|(_, size)| *size);
        if !sizes().eq(self.shape().iter().copied()) {
            let names: Vec<_> =
                axes.iter().filter(|(_, size)| size.is_some()).map(|(name, _)| *name).collect();
            return Err(Error::Value {
                arg,
                got: format!("shape {}", tuple(self.shape())),
                allowed: format!(
                    "({}) = {}",
                    names.join(", "),
                    tuple(&sizes().collect::<Vec<_>>())
                ),
            });
        }
        let mut own = self.strides.iter();
        Ok(View {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: axes.map(|(_, size)| size.unwrap_or(1)),
            strides: axes.map(|(_, size)| size.map_or(0, |_| *own.next().unwrap())),
        })
    }

    /// The tensor as rows along its last dimension, in the order of its leading dimensions.
    pub fn rows(&self, arg: &'static str, shape: &[usize]) -> Result<Rows> {
        if self.shape() != shape {
            return Err(Error::Value {
                arg,
                got: format!("shape {}", tuple(self.shape())),
                allowed: tuple(shape),
            });
        }
        let last = self.ndim - 1;
        Ok(Rows {
            ptr: self.ptr,
            dtype: self.dtype,
            len: self.shape[last],
            stride: self.strides[last],
            outer: self.shape().iter().copied().zip(self.strides).take(last).collect(),
        })
    }

    /// The bytes from its first element to behind its last, and whether its elements fill them.
    fn extent(&self) -> (Range<usize>, bool) {
        let (mut first, mut last) = (0, 0);
        for (&stride, &size) in self.strides.iter().zip(self.shape()) {
            let reach = stride * (size as isize - 1).max(0);
            (first, last) = (first + reach.min(0), last + reach.max(0));
        }
        let elements: usize = self.shape().iter().product();
        let start = self.ptr as isize + first * self.dtype.size() as isize;
        let span = if elements == 0 { 0 } else { (last - first + 1) as usize };
        let start = start as usize;
        (start..start + span * self.dtype.size(), span == elements)
    }

    /// Whether `other` is the same tensor, element by element.
    pub fn is_same_memory(&self, other: &TensorArg) -> bool {
        self.ptr == other.ptr && self.shape() == other.shape() && self.strides == other.strides
    }

    /// Fail if this tensor, which is written while `other` is used, shares memory with it: where either fills its memory
    /// and the other reaches into that. Two that leave gaps, such as parts of one pool, are taken to be apart.
    pub fn expect_apart(
        &self,
        arg: &'static str,
        other_arg: &str,
        other: &TensorArg,
    ) -> Result<()> {
        let (own, others) = (self.extent(), other.extent());
        let reaches = |from: &(Range<usize>, bool), into: &(Range<usize>, bool)| {
            let (from, (into, filled)) = (&from.0, into);
            let ends =
                !from.is_empty() && (into.contains(&from.start) || into.contains(&(from.end - 1)));
            *filled && ends
        };
        if reaches(&own, &others) || reaches(&others, &own) {
            return Err(Error::Value {
                arg,
                got: format!("memory that it shares with {other_arg}"),
                allowed: "memory of its own, as it is written".into(),
            });
        }
        Ok(())
    }

    /// Fail unless each stride steps over all that the smaller ones reach: then no two indices reach the same element,
    /// and tasks can write in place side by side.
    pub fn expect_writable(&self, arg: &'static str) -> Result<()> {
        // On the stack: this is part of what a decode step costs.
        let mut axes = [(0, 0); MAX_DIMS];
        let mut count = 0;
        for (&stride, &size) in self.strides.iter().zip(self.shape()).filter(|(_, size)| **size > 1)
        {
            axes[count] = (stride, size);
            count += 1;
        }
        axes[..count].sort_unstable();
        let mut reach = 0;
        let mut overlapping = false;
        for &(stride, size) in &axes[..count] {
            overlapping |= stride <= reach;
            reach += stride * (size as isize - 1);
        }
        if overlapping && !self.shape().contains(&0) {
            return Err(Error::Value {
                arg,
                got: format!("strides {:?}", &self.strides[..self.ndim]),
                allowed:
                    "a tensor whose elements are apart in memory (not expanded), as it is written"
                        .into(),
            });
        }
        Ok(())
    }
}

/// A shape as Python prints it.
pub fn tuple(sizes: &[usize]) -> String {
    match sizes {
        [one] => format!("({one},)"),
        _ => {
            let sizes: Vec<_> = sizes.iter().map(ToString::to_string).collect();
            format!("({})", sizes.join(", "))
        }
    }
}

/// A tensor of `N` dimensions with any strides. Every access is checked against its shape.
#[derive(Clone, Copy, Debug)]
pub struct View<const N: usize> {
    ptr: *mut u8,
    pub dtype: DType,
    pub shape: [usize; N],
    strides: [isize; N],
}

// SAFETY: see TensorArg.
unsafe impl<const N: usize> Send for View<N> {}
// SAFETY: see TensorArg.
unsafe impl<const N: usize> Sync for View<N> {}

/// One axis of a tile: which dimension of the view it runs along, and how many elements it has.
pub type Along = (usize, usize);

impl<const N: usize> View<N> {
    /// The same tensor with a last dimension of `size` along which every element is the same.
    pub fn expand_last<const M: usize>(self, size: usize) -> View<M> {
        assert_eq!(M, N + 1);
        View {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: std::array::from_fn(|axis| if axis < N { self.shape[axis] } else { size }),
            strides: std::array::from_fn(|axis| if axis < N { self.strides[axis] } else { 0 }),
        }
    }

    /// The same tensor with one more dimension, of size 1, before `axis`.
    pub fn unsqueeze<const M: usize>(self, axis: usize) -> View<M> {
        assert_eq!(M, N + 1);
        let from = |dim: usize| if dim < axis { dim } else { dim - 1 };
        let (shape, strides) = (self.shape, self.strides);
        View {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: std::array::from_fn(|dim| if dim == axis { 1 } else { shape[from(dim)] }),
            strides: std::array::from_fn(|dim| if dim == axis { 0 } else { strides[from(dim)] }),
        }
    }

    /// Whether neighbours along `axis` are neighbours in memory.
    pub fn is_dense(&self, axis: usize) -> bool {
        self.strides[axis] == 1
    }

    /// Whether all elements along `axis` are one and the same (an expanded dimension).
    pub fn is_expanded(&self, axis: usize) -> bool {
        self.strides[axis] == 0
    }

    /// Offset in elements of `at`, after checking that the tile that starts there lies inside the tensor.
    #[inline(always)]
    fn offset(&self, at: [usize; N], rows: Along, cols: Along) -> isize {
        let mut end = at;
        end[rows.0] += rows.1.saturating_sub(1);
        end[cols.0] += cols.1.saturating_sub(1);
        let mut offset = 0;
        for axis in 0..N {
            assert!(end[axis] < self.shape[axis], "a tile outside its tensor");
            offset += at[axis] as isize * self.strides[axis];
        }
        offset
    }

    /// Copy a tile into `dst`, row after row. Where the tensor lies the other way round, the copy transposes.
    #[inline(always)]
    pub fn load_tile<T: Real>(&self, at: [usize; N], rows: Along, cols: Along, dst: &mut [T]) {
        let (nrows, ncols) = (rows.1, cols.1);
        if nrows == 0 || ncols == 0 {
            return;
        }
        let offset = self.offset(at, rows, cols);
        let (row_stride, col_stride) = (self.strides[rows.0], self.strides[cols.0]);
        let dst = &mut dst[..nrows * ncols];
        with_element!(self.dtype, E => {
            // SAFETY: offset() checked that the whole tile lies inside the tensor, whose memory is valid for this call.
            unsafe {
                let base = self.ptr.cast::<E>().offset(offset);
                if col_stride == 1 {
                    for (r, row) in dst.chunks_exact_mut(ncols).enumerate() {
                        let src = base.offset(r as isize * row_stride);
                        let src = std::slice::from_raw_parts(src, ncols);
                        for (value, &element) in row.iter_mut().zip(src) {
                            *value = element.to_real();
                        }
                    }
                } else if row_stride == 1 {
                    for c in 0..ncols {
                        let src = base.offset(c as isize * col_stride);
                        let src = std::slice::from_raw_parts(src, nrows);
                        for (r, &element) in src.iter().enumerate() {
                            dst[r * ncols + c] = element.to_real();
                        }
                    }
                } else {
                    for (r, row) in dst.chunks_exact_mut(ncols).enumerate() {
                        let src = base.offset(r as isize * row_stride);
                        for (c, value) in row.iter_mut().enumerate() {
                            *value = (*src.offset(c as isize * col_stride)).to_real();
                        }
                    }
                }
            }
        });
    }

    /// Copy `src` (row after row) into a tile of the tensor.
    ///
    /// No two tasks that run at once may store to the same element.
    #[inline(always)]
    pub fn store_tile<T: Real>(&self, at: [usize; N], rows: Along, cols: Along, src: &[T]) {
        let (nrows, ncols) = (rows.1, cols.1);
        if nrows == 0 || ncols == 0 {
            return;
        }
        let offset = self.offset(at, rows, cols);
        let (row_stride, col_stride) = (self.strides[rows.0], self.strides[cols.0]);
        let src = &src[..nrows * ncols];
        with_element!(self.dtype, E => {
            // SAFETY: offset() checked that the whole tile lies inside the tensor, whose memory is valid for this call;
            // the ops give each task its own part of an output.
            unsafe {
                let base = self.ptr.cast::<E>().offset(offset);
                if col_stride != 1 && row_stride == 1 {
                    for c in 0..ncols {
                        let dst = base.offset(c as isize * col_stride);
                        let dst = std::slice::from_raw_parts_mut(dst, nrows);
                        for (r, element) in dst.iter_mut().enumerate() {
                            *element = E::from_real(src[r * ncols + c]);
                        }
                    }
                } else {
                    for (r, row) in src.chunks_exact(ncols).enumerate() {
                        let dst = base.offset(r as isize * row_stride);
                        if col_stride == 1 {
                            let dst = std::slice::from_raw_parts_mut(dst, ncols);
                            for (element, &value) in dst.iter_mut().zip(row) {
                                *element = E::from_real(value);
                            }
                        } else {
                            for (c, &value) in row.iter().enumerate() {
                                *dst.offset(c as isize * col_stride) = E::from_real(value);
                            }
                        }
                    }
                }
            }
        });
    }

    /// Copy elements along one axis into `dst`, as many as `dst` holds.
    #[inline(always)]
    pub fn load_line<T: Real>(&self, at: [usize; N], axis: usize, dst: &mut [T]) {
        self.load_tile(at, (axis, 1), (axis, dst.len()), dst);
    }

    /// Copy `src` to elements along one axis; see `store_tile`.
    #[inline(always)]
    pub fn store_line<T: Real>(&self, at: [usize; N], axis: usize, src: &[T]) {
        self.store_tile(at, (axis, 1), (axis, src.len()), src);
    }

    #[inline(always)]
    pub fn get<T: Real>(&self, at: [usize; N]) -> T {
        let mut value = [T::zero()];
        self.load_line(at, N - 1, &mut value);
        value[0]
    }

    #[inline(always)]
    pub fn set<T: Real>(&self, at: [usize; N], value: T) {
        self.store_line(at, N - 1, &[value]);
    }

    /// One element of an integer tensor.
    pub fn get_int(&self, at: [usize; N]) -> i64 {
        let offset = self.offset(at, (0, 1), (0, 1));
        // SAFETY: offset() checked that the element lies inside the tensor, whose memory is valid for this call.
        unsafe {
            match self.dtype {
                DType::I32 => i64::from(*self.ptr.cast::<i32>().offset(offset)),
                DType::I64 => *self.ptr.cast::<i64>().offset(offset),
                _ => unreachable!("a floating tensor where an integer one was checked for"),
            }
        }
    }
}

#[cfg(feature = "cuda")]
impl<const N: usize> View<N> {
    /// Where the first element is. Only the device's own code may follow it.
    pub fn data(&self) -> *mut u8 {
        self.ptr
    }

    /// In elements.
    pub fn strides(&self) -> &[isize; N] {
        &self.strides
    }
}

/// A tensor as rows along its last dimension, whatever the number and strides of the others.
#[derive(Clone, Debug)]
pub struct Rows {
    ptr: *mut u8,
    dtype: DType,
    len: usize,
    stride: isize,
    /// Size and stride of each leading dimension.
    outer: Vec<(usize, isize)>,
}

// SAFETY: see TensorArg.
unsafe impl Send for Rows {}
// SAFETY: see TensorArg.
unsafe impl Sync for Rows {}

impl Rows {
    /// Row `row` as a tensor of one dimension.
    #[inline(always)]
    pub fn row(&self, row: usize) -> View<1> {
        let mut rest = row;
        let mut offset = 0;
        for &(size, stride) in self.outer.iter().rev() {
            offset += (rest % size) as isize * stride;
            rest /= size;
        }
        assert_eq!(rest, 0, "a row outside its tensor");
        let bytes = offset * self.dtype.size() as isize;
        View {
            ptr: self.ptr.wrapping_offset(bytes),
            dtype: self.dtype,
            shape: [self.len],
            strides: [self.stride],
        }
    }
}

#[cfg(feature = "cuda")]
impl Rows {
    /// Where the first element is. Only the device's own code may follow it.
    pub fn data(&self) -> *mut u8 {
        self.ptr
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements from one of a row to the next.
    pub fn step(&self) -> isize {
        self.stride
    }

    /// Size and stride of each leading dimension.
    pub fn outer(&self) -> &[(usize, isize)] {
        &self.outer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(data: &mut [f32], shape: &[usize], strides: &[isize]) -> TensorArg {
        let mut arg =
            TensorArg::new(data.as_mut_ptr().cast(), DType::F32, Device::Cpu, shape.len());
        for (axis, (&size, &stride)) in shape.iter().zip(strides).enumerate() {
            arg.set_axis(axis, size, stride);
        }
        arg
    }

    #[test]
    fn tiles_are_the_same_in_every_layout() {
        let mut data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        // Logical element (i, j) of a 4 x 6 matrix is 6 i + j in the first layout, and i + 4 j in the second.
        for (strides, value) in
            [([6, 1], [8.0, 9.0, 14.0, 15.0]), ([1, 4], [9.0, 13.0, 10.0, 14.0])]
        {
            let view = argument(&mut data, &[4, 6], &strides).view("x", ["rows", "cols"]).unwrap();
            let mut tile = [0.0f32; 4];
            view.load_tile([1, 2], (0, 2), (1, 2), &mut tile);
            assert_eq!(tile, value);
            let mut transposed = [0.0f32; 4];
            view.load_tile([1, 2], (1, 2), (0, 2), &mut transposed);
            assert_eq!(transposed, [value[0], value[2], value[1], value[3]]);
        }
    }

    #[test]
    fn storing_a_tile_touches_nothing_else() {
        for strides in [[3, 1], [1, 4]] {
            let mut data = vec![7.0f32; 12];
            let view = argument(&mut data, &[4, 3], &strides).view("x", ["rows", "cols"]).unwrap();
            view.store_tile([1, 1], (0, 2), (1, 2), &[1.0f32, 2.0, 3.0, 4.0]);
            let mut all = [0.0f32; 12];
            view.load_tile([0, 0], (0, 4), (1, 3), &mut all);
            assert_eq!(all, [7.0, 7.0, 7.0, 7.0, 1.0, 2.0, 7.0, 3.0, 4.0, 7.0, 7.0, 7.0]);
        }
    }

    #[test]
    #[should_panic(expected = "a tile outside its tensor")]
    fn a_tile_past_the_end_is_refused() {
        let mut data = vec![0.0f32; 12];
        let view = argument(&mut data, &[4, 3], &[3, 1]).view("x", ["rows", "cols"]).unwrap();
        view.load_tile([3, 0], (0, 2), (1, 3), &mut [0.0f32; 6]);
    }

    #[test]
    fn rows_follow_the_leading_dimensions() {
        let mut data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        // (2, 3, 4) seen as (3, 2, 4): the first two dimensions exchanged.
        let rows = argument(&mut data, &[3, 2, 4], &[4, 12, 1]).rows("x", &[3, 2, 4]).unwrap();
        let first: Vec<f32> = (0..6).map(|row| rows.row(row).get([0])).collect();
        assert_eq!(first, [0.0, 12.0, 4.0, 16.0, 8.0, 20.0]);
    }

    #[test]
    fn errors_name_the_argument_and_both_shapes() {
        let arg = argument(&mut [0.0; 6], &[2, 3], &[3, 1]);
        let error = arg.view_of("dt", [("batch", 2), ("seqlen", 4)]).unwrap_err();
        assert_eq!(error.to_string(), "dt: got shape (2, 3); allowed: (batch, seqlen) = (2, 4)");
    }
}
