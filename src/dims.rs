//! The dimensions of each op, derived and checked once, and the checks that every argument goes through.

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Rows, TensorArg, View, tuple};

/// What the first tensor of a call decides for the others: device and dtype.
pub struct Checker<'a> {
    first: &'static str,
    device: &'a Device,
    pub dtype: DType,
}

impl<'a> Checker<'a> {
    pub fn new(arg: &'static str, tensor: &'a TensorArg) -> Result<Self> {
        let device = &tensor.device;
        let check = Checker { first: arg, device, dtype: tensor.dtype };
        check.expect(arg, tensor, check.floats())?;
        Ok(check)
    }

    /// The floating dtypes that this device computes on.
    fn floats(&self) -> &'static [DType] {
        match self.device {
            Device::Cuda(_) => &DType::FLOATS_ON_CUDA,
            _ => &DType::FLOATS,
        }
    }

    fn expect(&self, arg: &'static str, tensor: &TensorArg, allowed: &[DType]) -> Result<()> {
        tensor.check(arg)?;
        if tensor.device != *self.device {
            return Err(Error::Value {
                arg,
                got: format!("a tensor on {}", tensor.device),
                allowed: format!("the device of {}, {}", self.first, self.device),
            });
        }
        if !allowed.contains(&tensor.dtype) {
            let mut names: Vec<_> = allowed.iter().map(|dtype| dtype.name()).collect();
            names.dedup();
            let separator = if names.len() > 2 { ", " } else { " or " };
            return Err(Error::Type {
                arg,
                got: tensor.dtype.name().into(),
                allowed: names.join(separator),
            });
        }
        Ok(())
    }

    /// A tensor that shares the first one's dtype. An axis of size `None` is one that it lacks, here and below.
    pub fn same<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, impl Into<Option<usize>>); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, &[self.dtype])?;
        tensor.view_of(arg, shape)
    }

    /// A tensor that has the first one's dtype or float32: parameters, dt, initial states.
    pub fn same_or_f32<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, impl Into<Option<usize>>); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, &[self.dtype, DType::F32])?;
        tensor.view_of(arg, shape)
    }

    /// A tensor that shares the first one's dtype, as rows along its last dimension.
    pub fn same_rows(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: &[usize],
    ) -> Result<Rows> {
        self.expect(arg, tensor, &[self.dtype])?;
        tensor.rows(arg, shape)
    }

    /// A tensor of the accumulation dtype: final states and their gradients.
    pub fn accumulator<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, usize); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, &[self.dtype.accumulator()])?;
        tensor.view_of(arg, shape)
    }

    /// A tensor of any floating dtype: a decode state, kept in the precision its owner chose.
    pub fn floating<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, impl Into<Option<usize>>); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, self.floats())?;
        tensor.view_of(arg, shape)
    }

    pub fn int32<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, usize); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, &[DType::I32])?;
        tensor.view_of(arg, shape)
    }

    /// A tensor of int32 or int64: positions and indices.
    pub fn integer<const N: usize>(
        &self,
        arg: &'static str,
        tensor: &TensorArg,
        shape: [(&str, usize); N],
    ) -> Result<View<N>> {
        self.expect(arg, tensor, &DType::INTEGERS)?;
        tensor.view_of(arg, shape)
    }

    /// The workspace `partials`: what blocks add to the gradients of parameters, (blocks, parameters, dim).
    #[cfg(feature = "cuda")]
    pub fn workspace(
        &self,
        partials: Option<&TensorArg>,
        parameters: usize,
        dim: usize,
    ) -> Result<View<3>> {
        let arg = "partials";
        let allowed = "(blocks, parameters, dim) with blocks >= 1, contiguous";
        let Some(partials) = partials else {
            return Err(Error::Value { arg, got: "None".into(), allowed: allowed.into() });
        };
        let blocks = partials.shape().first().copied().unwrap_or(0);
        let shape = [("blocks", blocks), ("parameters", parameters), ("dim", dim)];
        let view = self.accumulator(arg, partials, shape)?;
        let (dim, parameters) = (dim as isize, parameters as isize);
        if blocks == 0 || (dim > 0 && *view.strides() != [parameters * dim, dim, 1]) {
            return Err(partials.wrong_shape(arg, allowed));
        }
        Ok(view)
    }

    /// A workspace of at least so many elements.
    #[cfg(feature = "cuda")]
    pub fn scratch(
        &self,
        arg: &'static str,
        tensor: Option<&TensorArg>,
        dtype: DType,
        elements: usize,
    ) -> Result<View<1>> {
        let refused = |got| {
            let allowed = format!("at least {elements} elements of one dimension, contiguous");
            Error::Value { arg, got, allowed }
        };
        let tensor = tensor.ok_or_else(|| refused("None".into()))?;
        self.expect(arg, tensor, &[dtype])?;
        let view = tensor.view(arg, ["elements"])?;
        if view.shape[0] < elements || (elements > 1 && view.strides()[0] != 1) {
            let (size, stride) = (view.shape[0], view.strides()[0]);
            return Err(refused(format!("{size} elements with a stride of {stride}")));
        }
        Ok(view)
    }

    /// cu_seqlens (ndocs + 1,): its values are the backend's to check, where it can read them.
    pub fn cu_seqlens(&self, tensor: &TensorArg, batch: usize) -> Result<View<1>> {
        let size = tensor.view("cu_seqlens", ["ndocs + 1"])?.shape[0];
        if size < 2 {
            return Err(Error::Value {
                arg: "cu_seqlens",
                got: format!("shape ({size},)"),
                allowed: "(ndocs + 1,) with ndocs >= 1".into(),
            });
        }
        if batch != 1 {
            return Err(Error::Value {
                arg: "cu_seqlens",
                got: format!("cu_seqlens with a batch of {batch}"),
                allowed: "batch 1, documents one after the other".into(),
            });
        }
        self.integer("cu_seqlens", tensor, [("ndocs + 1", size)])
    }
}

/// `check` of an argument that may be left out.
pub fn optional<T>(
    tensor: &Option<TensorArg>,
    check: impl FnOnce(&TensorArg) -> Result<T>,
) -> Result<Option<T>> {
    tensor.as_ref().map(check).transpose()
}

/// The first size of final states: one row a document of cu_seqlens, or one a sequence.
pub fn document_rows(batch: usize, cu_seqlens: Option<&View<1>>) -> (&'static str, usize) {
    cu_seqlens.map_or(("batch", batch), |cu_seqlens| ("ndocs", cu_seqlens.shape[0] - 1))
}

/// The first size of initial states: that of final states or, with cu_seqlens, 1 for the first document alone.
pub fn initial_rows(
    batch: usize,
    cu_seqlens: Option<&View<1>>,
    states: &TensorArg,
) -> (&'static str, usize) {
    match (cu_seqlens, states.shape().first()) {
        (Some(_), Some(1)) => ("first document", 1),
        _ => document_rows(batch, cu_seqlens),
    }
}

fn positive(arg: &'static str, name: &str, size: usize) -> Result<()> {
    if size == 0 {
        return Err(Error::Value {
            arg,
            got: format!("{name} = 0"),
            allowed: format!("{name} >= 1"),
        });
    }
    Ok(())
}

#[derive(Clone, Copy, Debug)]
pub struct SsdDims {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
    pub ngroups: usize,
    pub dstate: usize,
}

impl SsdDims {
    pub fn new(x: &TensorArg, B: &TensorArg) -> Result<Self> {
        let x = x.view("x", ["batch", "seqlen", "nheads", "headdim"])?;
        let B = B.view("B", ["batch", "seqlen", "ngroups", "dstate"])?;
        let [batch, seqlen, nheads, headdim] = x.shape;
        let [_, _, ngroups, dstate] = B.shape;
        positive("x", "nheads", nheads)?;
        positive("x", "headdim", headdim)?;
        positive("B", "ngroups", ngroups)?;
        positive("B", "dstate", dstate)?;
        if nheads % ngroups != 0 {
            return Err(Error::Value {
                arg: "B",
                got: format!("ngroups = {ngroups}"),
                allowed: format!("a divisor of nheads = {nheads}"),
            });
        }
        Ok(SsdDims { batch, seqlen, nheads, headdim, ngroups, dstate })
    }

    pub fn heads_per_group(&self) -> usize {
        self.nheads / self.ngroups
    }

    pub fn x(&self) -> [(&'static str, usize); 4] {
        [
            ("batch", self.batch),
            ("seqlen", self.seqlen),
            ("nheads", self.nheads),
            ("headdim", self.headdim),
        ]
    }

    pub fn dt(&self) -> [(&'static str, usize); 3] {
        [("batch", self.batch), ("seqlen", self.seqlen), ("nheads", self.nheads)]
    }

    pub fn B(&self) -> [(&'static str, usize); 4] {
        [
            ("batch", self.batch),
            ("seqlen", self.seqlen),
            ("ngroups", self.ngroups),
            ("dstate", self.dstate),
        ]
    }

    pub fn heads(&self) -> [(&'static str, usize); 1] {
        [("nheads", self.nheads)]
    }

    /// States of a row a document or sequence.
    pub fn states(&self, rows: (&'static str, usize)) -> [(&'static str, usize); 4] {
        [rows, ("nheads", self.nheads), ("headdim", self.headdim), ("dstate", self.dstate)]
    }

    pub fn seq_idx(&self) -> [(&'static str, usize); 2] {
        [("batch", self.batch), ("seqlen", self.seqlen)]
    }
}

#[derive(Clone, Copy, Debug)]
pub struct StatePassingDims {
    pub batch: usize,
    pub nchunks: usize,
    pub nheads: usize,
    pub headdim: usize,
    pub dstate: usize,
}

impl StatePassingDims {
    pub fn new(states: &TensorArg) -> Result<Self> {
        let names = ["batch", "nchunks", "nheads", "headdim", "dstate"];
        let [batch, nchunks, nheads, headdim, dstate] = states.view("states", names)?.shape;
        Ok(StatePassingDims { batch, nchunks, nheads, headdim, dstate })
    }

    pub fn states(&self) -> [(&'static str, usize); 5] {
        [
            ("batch", self.batch),
            ("nchunks", self.nchunks),
            ("nheads", self.nheads),
            ("headdim", self.headdim),
            ("dstate", self.dstate),
        ]
    }

    pub fn decay(&self) -> [(&'static str, usize); 3] {
        [("batch", self.batch), ("nchunks", self.nchunks), ("nheads", self.nheads)]
    }

    pub fn one_state(&self) -> [(&'static str, usize); 4] {
        [
            ("batch", self.batch),
            ("nheads", self.nheads),
            ("headdim", self.headdim),
            ("dstate", self.dstate),
        ]
    }
}

/// The widest convolution.
pub const MAX_WIDTH: usize = 8;

fn conv_width(weight: &TensorArg) -> Result<usize> {
    let [_, width] = weight.view("weight", ["dim", "width"])?.shape;
    if !(2..=MAX_WIDTH).contains(&width) {
        return Err(Error::Value {
            arg: "weight",
            got: format!("width = {width}"),
            allowed: format!("width from 2 to {MAX_WIDTH}"),
        });
    }
    Ok(width)
}

#[derive(Clone, Copy, Debug)]
pub struct ConvDims {
    pub batch: usize,
    pub dim: usize,
    pub seqlen: usize,
    pub width: usize,
}

impl ConvDims {
    pub fn new(x: &TensorArg, weight: &TensorArg) -> Result<Self> {
        let [batch, dim, seqlen] = x.view("x", ["batch", "dim", "seqlen"])?.shape;
        let width = conv_width(weight)?;
        Ok(ConvDims { batch, dim, seqlen, width })
    }

    pub fn x(&self) -> [(&'static str, usize); 3] {
        [("batch", self.batch), ("dim", self.dim), ("seqlen", self.seqlen)]
    }

    pub fn weight(&self) -> [(&'static str, usize); 2] {
        [("dim", self.dim), ("width", self.width)]
    }

    pub fn bias(&self) -> [(&'static str, usize); 1] {
        [("dim", self.dim)]
    }

    /// States of a row a document or sequence.
    pub fn states(&self, rows: (&'static str, usize)) -> [(&'static str, usize); 3] {
        [rows, ("dim", self.dim), ("width - 1", self.width - 1)]
    }

    pub fn seq_idx(&self) -> [(&'static str, usize); 2] {
        [("batch", self.batch), ("seqlen", self.seqlen)]
    }
}

#[derive(Clone, Debug)]
pub struct NormDims {
    pub shape: Vec<usize>,
    pub nrows: usize,
    pub dim: usize,
    pub group_size: usize,
}

impl NormDims {
    pub fn new(x: &TensorArg, group_size: Option<usize>) -> Result<Self> {
        let shape = x.shape().to_vec();
        let Some((&dim, leading)) = shape.split_last() else {
            return Err(Error::Value {
                arg: "x",
                got: "shape ()".into(),
                allowed: "(..., dim)".into(),
            });
        };
        positive("x", "dim", dim)?;
        let group_size = group_size.unwrap_or(dim);
        if group_size == 0 || dim % group_size != 0 {
            return Err(Error::Value {
                arg: "group_size",
                got: group_size.to_string(),
                allowed: format!("a divisor of dim = {dim}"),
            });
        }
        Ok(NormDims { nrows: leading.iter().product(), dim, group_size, shape })
    }

    pub fn weight(&self) -> [(&'static str, usize); 1] {
        [("dim", self.dim)]
    }
}

/// The size of a named axis; `None` where the caller's tensors lack it.
type Axis = (&'static str, Option<usize>);

/// The first axis of a state: its slots where indices pick them, otherwise one row a sequence.
fn slots(state: &TensorArg, batch: usize, indexed: bool) -> (&'static str, usize) {
    match state.shape().first() {
        Some(&slots) if indexed => ("slots", slots),
        _ => ("batch", batch),
    }
}

#[derive(Clone, Copy, Debug)]
pub struct ConvUpdateDims {
    pub batch: usize,
    pub dim: usize,
    pub width: usize,
    pub state_len: usize,
    /// None: x is one token without an axis for it.
    seqlen: Option<usize>,
    slots: (&'static str, usize),
}

impl ConvUpdateDims {
    pub fn new(
        x: &TensorArg,
        conv_state: &TensorArg,
        weight: &TensorArg,
        indexed: bool,
    ) -> Result<Self> {
        let (batch, dim, seqlen) = match *x.shape() {
            [batch, dim] => (batch, dim, None),
            [batch, dim, seqlen] => (batch, dim, Some(seqlen)),
            _ => return Err(x.wrong_shape("x", "(batch, dim) or (batch, dim, seqlen)")),
        };
        let width = conv_width(weight)?;
        let state_len = conv_state.view("conv_state", ["slots", "dim", "state_len"])?.shape[2];
        if state_len < width - 1 {
            return Err(Error::Value {
                arg: "conv_state",
                got: format!("state_len = {state_len}"),
                allowed: format!("state_len >= width - 1 = {}", width - 1),
            });
        }
        let slots = slots(conv_state, batch, indexed);
        Ok(ConvUpdateDims { batch, dim, width, state_len, seqlen, slots })
    }

    pub fn seqlen(&self) -> usize {
        self.seqlen.unwrap_or(1)
    }

    pub fn slots(&self) -> usize {
        self.slots.1
    }

    pub fn x(&self) -> [Axis; 3] {
        [("batch", Some(self.batch)), ("dim", Some(self.dim)), ("seqlen", self.seqlen)]
    }

    pub fn rows(&self) -> [(&'static str, usize); 1] {
        [("batch", self.batch)]
    }

    pub fn weight(&self) -> [(&'static str, usize); 2] {
        [("dim", self.dim), ("width", self.width)]
    }

    pub fn bias(&self) -> [(&'static str, usize); 1] {
        [("dim", self.dim)]
    }

    pub fn conv_state(&self) -> [(&'static str, usize); 3] {
        [self.slots, ("dim", self.dim), ("state_len", self.state_len)]
    }

    pub fn intermediate(&self) -> [(&'static str, usize); 4] {
        let seqlen = ("seqlen", self.seqlen());
        [self.slots, seqlen, ("dim", self.dim), ("state_len", self.state_len)]
    }
}

#[derive(Clone, Copy, Debug)]
pub struct StateUpdateDims {
    pub batch: usize,
    pub dim: usize,
    pub dstate: usize,
    /// None: x is one token without an axis for it.
    seqlen: Option<usize>,
    /// None: no argument has heads.
    nheads: Option<usize>,
    /// None: B and C have no groups.
    ngroups: Option<usize>,
    slots: (&'static str, usize),
}

impl StateUpdateDims {
    pub fn new(x: &TensorArg, state: &TensorArg, B: &TensorArg, indexed: bool) -> Result<Self> {
        let (batch, seqlen, nheads, dim) = match *x.shape() {
            [batch, dim] => (batch, None, None, dim),
            [batch, nheads, dim] => (batch, None, Some(nheads), dim),
            [batch, seqlen, nheads, dim] => (batch, Some(seqlen), Some(nheads), dim),
            _ => {
                let allowed = "(batch, dim), (batch, nheads, dim) or (batch, seqlen, nheads, dim)";
                return Err(x.wrong_shape("x", allowed));
            }
        };
        let dstate = match nheads {
            Some(_) => state.view("state", ["slots", "nheads", "dim", "dstate"])?.shape[3],
            None => state.view("state", ["slots", "dim", "dstate"])?.shape[2],
        };
        positive("state", "dstate", dstate)?;
        let ngroups = match (seqlen, B.shape()) {
            (None, [_, _]) | (Some(_), [_, _, _]) => None,
            (None, [_, ngroups, _]) | (Some(_), [_, _, ngroups, _]) => Some(*ngroups),
            (None, _) => {
                return Err(B.wrong_shape("B", "(batch, dstate) or (batch, ngroups, dstate)"));
            }
            (Some(_), _) => {
                let allowed = "(batch, seqlen, dstate) or (batch, seqlen, ngroups, dstate)";
                return Err(B.wrong_shape("B", allowed));
            }
        };
        let slots = slots(state, batch, indexed);
        let dims = StateUpdateDims { batch, dim, dstate, seqlen, nheads, ngroups, slots };
        positive("B", "ngroups", dims.ngroups())?;
        if !dims.nheads().is_multiple_of(dims.ngroups()) {
            return Err(Error::Value {
                arg: "B",
                got: format!("ngroups = {}", dims.ngroups()),
                allowed: format!("a divisor of nheads = {}", dims.nheads()),
            });
        }
        Ok(dims)
    }

    pub fn seqlen(&self) -> usize {
        self.seqlen.unwrap_or(1)
    }

    pub fn nheads(&self) -> usize {
        self.nheads.unwrap_or(1)
    }

    pub fn ngroups(&self) -> usize {
        self.ngroups.unwrap_or(1)
    }

    pub fn slots(&self) -> usize {
        self.slots.1
    }

    pub fn rows(&self) -> [(&'static str, usize); 1] {
        [("batch", self.batch)]
    }

    pub fn x(&self) -> [Axis; 4] {
        [
            ("batch", Some(self.batch)),
            ("seqlen", self.seqlen),
            ("nheads", self.nheads),
            ("dim", Some(self.dim)),
        ]
    }

    pub fn A(&self) -> [Axis; 3] {
        [("nheads", self.nheads), ("dim", Some(self.dim)), ("dstate", Some(self.dstate))]
    }

    pub fn B(&self) -> [Axis; 4] {
        [
            ("batch", Some(self.batch)),
            ("seqlen", self.seqlen),
            ("ngroups", self.ngroups),
            ("dstate", Some(self.dstate)),
        ]
    }

    pub fn D(&self) -> [Axis; 2] {
        [("nheads", self.nheads), ("dim", Some(self.dim))]
    }

    pub fn state(&self) -> [Axis; 4] {
        let (name, slots) = self.slots;
        let [nheads, dim, dstate] = self.A();
        [(name, Some(slots)), nheads, dim, dstate]
    }

    pub fn intermediate(&self) -> [Axis; 5] {
        let [slots, nheads, dim, dstate] = self.state();
        [slots, ("seqlen", Some(self.seqlen())), nheads, dim, dstate]
    }
}

#[derive(Clone, Copy, Debug)]
pub struct SelectiveScanDims {
    pub batch: usize,
    pub dim: usize,
    pub seqlen: usize,
    pub ngroups: usize,
    pub dstate: usize,
}

impl SelectiveScanDims {
    pub fn new(u: &TensorArg, A: &TensorArg, B: &TensorArg, C: &TensorArg) -> Result<Self> {
        let [batch, dim, seqlen] = u.view("u", ["batch", "dim", "seqlen"])?.shape;
        let [_, dstate] = A.view("A", ["dim", "dstate"])?.shape;
        positive("u", "dim", dim)?;
        positive("A", "dstate", dstate)?;
        let groups_of_B = groups("B", B, dim)?;
        let groups_of_C = groups("C", C, dim)?;
        if let (Some(of_B), Some(of_C)) = (groups_of_B, groups_of_C)
            && of_B != of_C
        {
            return Err(Error::Value {
                arg: "C",
                got: format!("ngroups = {of_C}"),
                allowed: format!("B's ngroups = {of_B}"),
            });
        }
        let ngroups = groups_of_B.or(groups_of_C).unwrap_or(1);
        Ok(SelectiveScanDims { batch, dim, seqlen, ngroups, dstate })
    }

    pub fn group_dim(&self) -> usize {
        self.dim / self.ngroups
    }

    pub fn u(&self) -> [(&'static str, usize); 3] {
        [("batch", self.batch), ("dim", self.dim), ("seqlen", self.seqlen)]
    }

    pub fn A(&self) -> [(&'static str, usize); 2] {
        [("dim", self.dim), ("dstate", self.dstate)]
    }

    /// B and C that vary, without groups.
    pub fn tokens(&self) -> [(&'static str, usize); 3] {
        [("batch", self.batch), ("dstate", self.dstate), ("seqlen", self.seqlen)]
    }

    /// B and C that vary, with groups.
    pub fn groups(&self) -> [(&'static str, usize); 4] {
        [
            ("batch", self.batch),
            ("ngroups", self.ngroups),
            ("dstate", self.dstate),
            ("seqlen", self.seqlen),
        ]
    }

    pub fn channels(&self) -> [(&'static str, usize); 1] {
        [("dim", self.dim)]
    }

    pub fn states(&self, rows: (&'static str, usize)) -> [(&'static str, usize); 3] {
        [rows, ("dim", self.dim), ("dstate", self.dstate)]
    }

    pub fn seq_idx(&self) -> [(&'static str, usize); 2] {
        [("batch", self.batch), ("seqlen", self.seqlen)]
    }
}

/// The number of groups of the selective scan's B or C; None if it is the same for all tokens.
fn groups(arg: &'static str, tensor: &TensorArg, dim: usize) -> Result<Option<usize>> {
    tensor.check(arg)?;
    match *tensor.shape() {
        [_, _] => Ok(None),
        [_, _, _] => Ok(Some(1)),
        [_, ngroups, _, _] => {
            positive(arg, "ngroups", ngroups)?;
            if !dim.is_multiple_of(ngroups) {
                return Err(Error::Value {
                    arg,
                    got: format!("ngroups = {ngroups}"),
                    allowed: format!("a divisor of dim = {dim}"),
                });
            }
            Ok(Some(ngroups))
        }
        _ => Err(Error::Value {
            arg,
            got: format!("shape {}", tuple(tensor.shape())),
            allowed: "(dim, dstate), (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen)"
                .into(),
        }),
    }
}
