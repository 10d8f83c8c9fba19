"""Every op against the float64 reference on arguments that hypothesis draws.

`--examples N` runs N random examples a test; without it a fixed set runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, inputs, run, seeded_gradients

#: Around the tokens that the kernels take at once.
EDGES = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 150)
SEQLENS = st.integers(0, 40) | st.sampled_from(EDGES)
SIZES = st.integers(1, 9) | st.sampled_from((16, 17, 33))
DT_LIMITS = st.sampled_from([(0.0, float("inf")), (0.1, 1.0), (0.0, 0.5)])
ACTIVATIONS = st.sampled_from([None, "silu", "swish"])
INDICES = st.sampled_from([torch.int32, torch.int64])
LAYOUTS = (*inputs.LAYOUTS, "expanded")
#: The dtypes of the backend under test.
FLOATS = list(inputs.FLOATS)
#: How many states of 20 are large. They cost the CPU time; CUDA has kernels of their own for some.
LARGE = [1]


@pytest.fixture(autouse=True, scope="module")
def drawn_for_the_backend(device):
    """Nothing is drawn before."""
    FLOATS[:] = inputs.floats(device)
    LARGE[:] = [1 if device.type == "cpu" else 8]


class Kind(NamedTuple):
    """What every test draws: the dtypes and strides of arguments, the values by their seed."""

    seed: int
    dtype: torch.dtype
    #: Arguments that are float32 whatever the dtype.
    float32: set[str]
    left_out: set[str]
    #: Of the arguments in their order, then of the output gradients; from the start again where there are more.
    layouts: list[str]
    #: Outputs that pass no gradient back.
    unused: set[int]

    def make(self, case: Callable[..., dict[str, Tensor]], *shape: int, device: Any, **sizes: Any) -> dict[str, Tensor]:
        """Arguments from a generator of `inputs`, in float64 and contiguous."""
        return case(*shape, **sizes, dtype=torch.float64, device=device, seed=self.seed)

    def finish(self, tensors: dict[str, Tensor], written: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The arguments as they are passed: without those left out, each in its dtype and layout."""
        result = {}
        for i, (name, tensor) in enumerate(tensors.items()):
            if name in self.left_out:
                continue
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if name in self.float32 else self.dtype)
            result[name] = self.lay_out(tensor, i, expand=name not in written)
        return result

    def lay_out(self, tensor: Tensor, i: int, expand: bool = True) -> Tensor:
        layout = self.layouts[i % len(self.layouts)]
        if layout != "expanded":
            return inputs.laid_out(tensor, layout)
        if expand and tensor.is_floating_point():
            return tensor[:1].expand_as(tensor)
        return inputs.laid_out(tensor, "strided")


def kinds(float32: tuple[str, ...] = (), optional: tuple[str, ...] = (), outputs: int = 1) -> st.SearchStrategy[Kind]:
    """Kinds for an op with these arguments that may be float32, and these that may be left out."""
    return st.builds(
        Kind,
        st.integers(0, 2**32),
        st.deferred(lambda: st.sampled_from(FLOATS)),
        st.just(set()) | st.just(set(float32)) | st.sets(st.sampled_from(float32)) if float32 else st.just(set()),
        st.sets(st.sampled_from(optional)) if optional else st.just(set()),
        st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=16),
        st.sets(st.integers(0, outputs - 1), max_size=outputs - 1),
    )


class Packing(NamedTuple):
    """A batch of sequences, and which documents are in them."""

    batch: int
    seqlen: int
    #: Of documents by seq_idx: mean length, lowest id.
    seq_idx: tuple[int, int] | None
    #: Of documents by cu_seqlens.
    lengths: list[int] | None
    indices: torch.dtype
    #: With cu_seqlens, whether one row of initial states is for the first document or there is one for each.
    a_row_each: bool

    def pack(self, tensors: dict[str, Tensor], states: dict[str, Tensor], seed: int, device: Any) -> dict[str, Tensor]:
        """`tensors` with seq_idx and cu_seqlens; `states` has as many rows as there are documents."""
        tensors = tensors | states
        if self.seq_idx is not None:
            mean_length, lowest = self.seq_idx
            generator = torch.Generator().manual_seed(seed)
            tensors["seq_idx"] = inputs.documents(
                self.batch, self.seqlen, device=device, mean_length=mean_length, lowest=lowest, generator=generator
            )
        if self.lengths is not None:
            tensors["cu_seqlens"] = inputs.cu_seqlens(*self.lengths, device=device, dtype=self.indices)
        return tensors

    @property
    def rows(self) -> int:
        """Rows of initial states."""
        if self.lengths is None:
            return self.batch
        return len(self.lengths) if self.a_row_each else 1


@st.composite
def packings(draw: st.DrawFn, seqlens: st.SearchStrategy[int] = SEQLENS) -> Packing:
    seq_idx = draw(st.none() | st.tuples(st.sampled_from((1, 3, 11, 200)), st.sampled_from((0, -1))))
    indices = draw(INDICES)
    if not draw(st.booleans()):
        return Packing(draw(st.integers(0, 3)), draw(seqlens), seq_idx, None, indices, False)
    lengths = draw(st.lists(st.integers(0, 12) | st.just(0), min_size=1, max_size=5))
    if draw(st.booleans()):
        lengths[-1] = draw(seqlens)
    padding = draw(st.just(0) | st.integers(0, 9))
    return Packing(1, sum(lengths) + padding, seq_idx, lengths, indices, draw(st.booleans()))


def reached(values: Any) -> list[Tensor]:
    return list(values) if isinstance(values, tuple) else [values]


Results = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rounding_errors(
    results: Results, tensors: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """How far plain torch is from `exact` where it computes in the dtypes of `tensors`, which are a rounding off each.

    The root mean square over eight draws of the roundings. float64 counts as 2^-29 of float32.
    """
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    scale = 1.0
    if dtype == torch.float64:
        floating = {name: t.float() for name, t in floating.items()}
        scale = 2.0**-29
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(exact, 0.0)
    for _ in range(8):
        moved = {}
        for name, t in floating.items():
            rounding = torch.randn(t.shape, generator=generator).to(t.device) * torch.finfo(t.dtype).eps / 2
            moved[name] = (t.double() * (1 + rounding)).to(t.dtype)
        for name, value in results(tensors | moved).items():
            squares[name] += float((value.double() - exact[name]).norm() * scale) ** 2 / 8
    return {name: square**0.5 for name, square in squares.items()}


def assert_results(
    actual: dict[str, Tensor],
    tolerances: dict[str, float],
    results: Results,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Compare with `results`, the reference, of `tensors` in float64. `dtype`: that of the activations.

    A relative bound cannot hold for what happens to be nearly zero: one element, or a sum whose terms cancel. How far
    off that may be is a matter of the roundings behind it. So an error above the tolerance may still be a few times
    what roundings cost in plain torch, the token-by-token recurrence: twice over many elements, whose luck averages
    out, up to sixteen times for one. Where nothing cancels that is hardly more than the tolerance. And where a kernel
    finds by subtraction what the recurrence knows to be zero (the gradient of a decay that leaves nothing), the error
    may be 64 roundings of the largest result.
    """
    exact = results({name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    negligible = 64 * eps * max(float(value.norm()) for value in exact.values())
    errors = {}
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        if not value.isfinite().all():
            assert not all(t.isfinite().all() for t in results(tensors).values()), f"{name} is not finite"
            hypothesis.reject()  # something leaves float16's range in plain torch as well
        error, size = float((value.double() - exact[name]).norm()), float(exact[name].norm())
        if error > max(tolerances[name] * size, negligible):
            errors[name] = error, size
    if not errors:
        return
    rounding = rounding_errors(results, tensors, exact, dtype)
    for name, (error, size) in errors.items():
        hypothesis.event(f"{name} within roundings")
        allowed = (2 + 14 / actual[name].numel() ** 0.5) * rounding[name]
        assert error <= allowed, (
            f"{name}: error {error:.3g} of {size:.3g}, allowed {tolerances[name]:.3g} of that or {allowed:.3g}"
        )


def check(
    op: Callable[..., Any],
    op_reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    kind: Kind,
    options: dict[str, Any],
) -> None:
    """Outputs and gradients of a training op."""
    before = {name: t.clone() for name, t in tensors.items()}
    with torch.no_grad():
        outputs = reached(op(**tensors, **options))
    assert outputs[0].dtype == kind.dtype
    gradients = [
        None if i in kind.unused else kind.lay_out(gradient, len(tensors) + i)
        for i, gradient in enumerate(seeded_gradients(outputs))
    ]
    actual = run(op, tensors, options, gradients)
    tolerances = {}
    for name, value in actual.items():
        gradient = not name.startswith("out")
        if gradient:
            assert value.dtype == tensors[name[1:]].dtype, name
        tolerances[name] = max(TOLERANCES[kind.dtype][gradient], TOLERANCES[value.dtype][gradient])
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was written"

    given_gradients = {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    plain_options = {name: value for name, value in options.items() if name != "state_dtype"}

    def results(values: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments = {name: values[name] for name in tensors}
        return run(op_reference, arguments, plain_options, [values.get(f"gradient {i}") for i in range(len(gradients))])

    assert_results(actual, tolerances, results, tensors | given_gradients, kind.dtype)


def check_in_place(
    op: Callable[..., Any],
    op_reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    written: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Outputs of an inference op and the parts of `tensors` that it writes, `written`; it must touch nothing else."""
    values = {name: t.clone() for name, t in tensors.items()}

    def results(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments = {name: t.clone() for name, t in arguments.items()}
        outputs = reached(op_reference(**arguments, **options))
        parts = {name: arguments[name][part] for name, part in written.items()}
        return {f"out{i}": output for i, output in enumerate(outputs)} | parts

    memory = {}
    for name, part in written.items():
        kept = tensors[name][part].clone()
        tensors[name].fill_(float("nan"))[part] = kept
        memory[name] = whole_memory(tensors[name]).clone()
    outputs = reached(op(**tensors, **options))
    actual = {f"out{i}": output for i, output in enumerate(outputs)}
    for name, tensor in tensors.items():
        if name in written:
            part = written[name]
            actual[name] = tensor[part]
            expected = memory[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            expected[part] = tensor[part]
            assert torch.equal(memory[name].nan_to_num(7.0), whole_memory(tensor).nan_to_num(7.0)), (
                f"{name} was written elsewhere"
            )
        else:
            assert torch.equal(tensor, values[name]), f"{name} was written"
    dtype = tensors["x"].dtype
    assert outputs[0].dtype in (dtype, options.get("state_dtype"))
    tolerances = {name: max(TOLERANCES[dtype][0], TOLERANCES[value.dtype][0]) for name, value in actual.items()}
    assert_results(actual, tolerances, results, values, dtype)


def whole_memory(tensor: Tensor) -> Tensor:
    """All elements of the memory that a tensor is a view of."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


@given(
    kinds(("weight", "bias", "initial_states"), ("bias", "initial_states"), outputs=2),
    packings(SEQLENS | st.integers(126, 138) | st.integers(0, 300)),
    st.integers(1, 9) | st.sampled_from((63, 64, 65, 130)),
    st.integers(2, 8),
    ACTIVATIONS,
    st.sampled_from(["none", "returned", "given"]),
)
def test_causal_conv1d_fn(device, kind, packing, dim, width, activation, final_states):
    sizes = {"dim": dim, "width": width, "device": device}
    tensors = kind.make(inputs.conv, batch=packing.batch, seqlen=packing.seqlen, **sizes)
    states = kind.make(inputs.conv, batch=packing.rows, seqlen=1, **sizes)
    tensors = packing.pack(tensors, {"initial_states": states["initial_states"]}, kind.seed, device)
    tensors = kind.finish(tensors)
    options = {"activation": activation, "return_final_states": final_states != "none"}
    given_out: list[Tensor] = []

    def op(**arguments):
        if final_states != "given":
            return oxiscan.causal_conv1d_fn(**arguments)
        rows = packing.batch if packing.lengths is None else len(packing.lengths)
        buffer = torch.full((rows, dim, width - 1), float("nan"), dtype=kind.dtype, device=device)
        given_out.append(kind.lay_out(buffer, 0, expand=False))
        out, states = oxiscan.causal_conv1d_fn(**arguments, final_states_out=given_out[-1])
        assert states is given_out[-1]
        return out, states

    check(op, reference.causal_conv1d_fn, tensors, kind, options)
    for out in given_out:
        assert whole_memory(out.detach()).isfinite().sum() == out.numel(), "final_states_out was written elsewhere"


def slots(tensors: dict[str, Tensor], name: str, padding: set[int], indices: torch.dtype) -> list[int]:
    """The slots that the rows of a batch use, -1 written into its indices for rows of padding."""
    rows = range(tensors["x"].shape[0])
    if name not in tensors:
        return list(rows)
    for row in padding & set(rows):
        tensors[name][row] = -1
    tensors[name] = tensors[name].to(indices)
    return [slot for slot in tensors[name].tolist() if slot >= 0]


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a decode step."""
    batch = draw(st.integers(0, 4))
    return {
        "batch": batch,
        "seqlen": draw(st.none() | st.integers(0, 9)),
        "slots": draw(st.none() | st.integers(batch, batch + 3)),
        "intermediate": draw(st.booleans()),
    }


PADDING = st.sets(st.integers(0, 3), max_size=2)


@given(
    kinds(("weight", "bias"), ("bias",)),
    steps(),
    st.integers(1, 9) | st.sampled_from((63, 64, 65, 130)),
    st.integers(2, 8),
    st.integers(0, 4),
    st.booleans(),
    ACTIVATIONS,
    PADDING,
    INDICES,
)
def test_causal_conv1d_update(device, kind, step, dim, width, extra, circular, activation, padding, indices):
    written = ("conv_state", "intermediate_conv_states")
    sizes = {"dim": dim, "width": width, "state_len": width - 1 + extra, "circular": circular}
    tensors = kind.make(inputs.conv_update, **step, **sizes, device=device)
    used = slots(tensors, "conv_state_indices", padding, indices)
    tensors = kind.finish(tensors, written)
    parts = {name: used for name in written if name in tensors}
    check_in_place(
        oxiscan.causal_conv1d_update, reference.causal_conv1d_update, tensors, parts, {"activation": activation}
    )


@given(kinds(), packings(), st.integers(0, 9) | st.sampled_from((64, 65)), st.integers(0, 9))
def test_causal_conv1d_varlen_states(device, kind, packing, dim, state_len):
    x = inputs.normal(packing.seqlen, dim, dtype=torch.float64, device=device)
    lengths = [packing.seqlen] if packing.lengths is None else packing.lengths
    cu_seqlens = inputs.cu_seqlens(*lengths, device=device, dtype=packing.indices)
    tensors = kind.finish({"x": x, "cu_seqlens": cu_seqlens})
    check_in_place(
        oxiscan.causal_conv1d_varlen_states,
        reference.causal_conv1d_varlen_states,
        tensors,
        {},
        {"state_len": state_len},
    )


@st.composite
def heads(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of a state with heads."""
    ngroups = draw(st.integers(1, 3))
    sizes = {"nheads": ngroups * draw(st.integers(1, 3)), "ngroups": ngroups}
    headdim, dstate = draw(SIZES), draw(SIZES)
    if draw(st.integers(0, 19)) >= 20 - LARGE[0]:
        sizes = {"nheads": 1, "ngroups": 1}
        headdim, dstate = draw(st.sampled_from([(64, 128), (65, 64), (80, 3), (3, 130), (80, 64), (128, 256)]))
    return sizes | {"headdim": headdim, "dstate": dstate}


DECAYS = st.sampled_from([1.0, 1.0, 0.0, 30.0, 1e4])
#: Of A, where a negative dt makes the state grow: not out of float16's range.
SLOW_GROWTH = 0.01
STATE_DTYPES = st.deferred(lambda: st.sampled_from([None, *FLOATS]))


@given(
    kinds(("dt", "A", "D", "dt_bias", "initial_states"), ("D", "z", "dt_bias", "initial_states"), outputs=3),
    packings(),
    heads(),
    st.sampled_from(["heads", "elements"]),
    DECAYS,
    st.integers(1, 300),
    st.booleans(),
    DT_LIMITS,
    st.booleans(),
    st.booleans(),
    STATE_DTYPES,
)
def test_mamba_chunk_scan_combined(
    device, kind, packing, sizes, D, decay, chunk_size, softplus, dt_limit, final_states, varlen_states, state_dtype
):
    tensors = kind.make(
        inputs.ssd, batch=packing.batch, seqlen=packing.seqlen, **sizes, D=D, decay=decay, device=device
    )
    states = kind.make(inputs.ssd, batch=packing.rows, seqlen=1, **sizes, device=device)
    tensors = packing.pack(tensors, {"initial_states": states["initial_states"]}, kind.seed, device)
    options = {
        "chunk_size": chunk_size,
        "dt_softplus": softplus,
        "dt_limit": dt_limit,
        "return_final_states": final_states,
        "return_varlen_states": varlen_states and packing.lengths is not None,
        "state_dtype": state_dtype,
    }
    check(
        oxiscan.mamba_chunk_scan_combined,
        reference.mamba_chunk_scan_combined,
        kind.finish(tensors),
        kind,
        options,
    )


@given(
    kinds(("dt", "A", "D", "dt_bias", "initial_states"), ("D", "z", "dt_bias", "initial_states")),
    st.lists(st.tuples(st.integers(0, 20) | SEQLENS, st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(0, 9),
    st.lists(st.integers(0, 5), max_size=4),
    heads(),
    st.sampled_from(["heads", "elements"]),
    DECAYS,
    st.booleans(),
    DT_LIMITS,
    STATE_DTYPES,
    INDICES,
)
def test_mamba_chunk_scan_combined_varlen(
    device, kind, chunks, padding, last, sizes, D, decay, softplus, dt_limit, state_dtype, indices
):
    lengths, documents = zip(*chunks, strict=True)
    end = sum(lengths)
    tensors = kind.make(inputs.ssd, batch=1, seqlen=end + padding, **sizes, D=D, decay=decay, device=device)
    for name in ("x", "dt", "B", "C", "z"):
        tensors[name] = tensors[name].squeeze(0)
    tensors["initial_states"] = kind.make(inputs.ssd, batch=3, seqlen=1, **sizes, device=device)["initial_states"]
    tensors["cu_chunk_seqlens"] = inputs.cu_seqlens(*lengths, device=device, dtype=indices)
    tensors["seq_idx"] = torch.tensor(documents, dtype=indices, device=device)
    chosen = [chunk % len(chunks) for chunk in last]
    tensors["last_chunk_indices"] = torch.tensor(chosen, dtype=indices, device=device)
    tensors["out"] = torch.zeros_like(tensors["x"])
    tensors = kind.finish(tensors, ("out",))
    options = {
        "chunk_size": 16,
        "dt_softplus": softplus,
        "dt_limit": dt_limit,
        "return_raw_states": True,
        "state_dtype": state_dtype,
    }
    check_in_place(
        oxiscan.mamba_chunk_scan_combined_varlen,
        reference.mamba_chunk_scan_combined_varlen,
        tensors,
        {"out": slice(0, end)},
        options,
    )


@given(
    kinds(
        (
            "conv1d_weight",
            "conv1d_bias",
            "dt_bias",
            "A",
            "D",
            "rmsnorm_weight",
            "outproj_weight",
            "outproj_bias",
            "initial_states",
            "initial_conv_states",
        ),
        ("conv1d_bias", "rmsnorm_weight", "outproj_bias", "initial_states", "initial_conv_states"),
        outputs=4,
    ),
    packings(),
    heads(),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    ACTIVATIONS,
    st.booleans(),
    st.sampled_from([1e-6, 0.1]),
    DT_LIMITS,
    st.sets(st.sampled_from(["return_final_states", "return_final_conv_states", "return_varlen_states"])),
    STATE_DTYPES,
)
def test_mamba_split_conv1d_scan_combined(
    device,
    kind,
    packing,
    sizes,
    width,
    D_by_head,
    outproj,
    activation,
    norm_before_gate,
    rmsnorm_eps,
    dt_limit,
    returned,
    state_dtype,
):
    like = {**sizes, "width": width, "norm": True, "outproj": outproj, "device": device}
    tensors = kind.make(inputs.split_conv1d_scan, batch=packing.batch, seqlen=packing.seqlen, **like)
    states = kind.make(inputs.split_conv1d_scan, batch=packing.rows, seqlen=1, **like)
    states = {name: states[name] for name in ("initial_states", "initial_conv_states")}
    tensors = packing.pack(tensors, states, kind.seed, device)
    if D_by_head:
        tensors["D"] = tensors["D"][:, 0]
    tensors = kind.finish(tensors)
    options = {
        "chunk_size": 16,
        "headdim": sizes["headdim"] if D_by_head else None,
        "ngroups": sizes["ngroups"],
        "activation": activation,
        "norm_before_gate": norm_before_gate,
        "rmsnorm_eps": rmsnorm_eps,
        "dt_limit": dt_limit,
        "state_dtype": state_dtype,
    }
    if "conv1d_bias" in kind.left_out:
        options["conv1d_bias"] = None
    options |= {name: True for name in returned if name != "return_varlen_states" or packing.lengths is not None}
    check(oxiscan.mamba_split_conv1d_scan_combined, reference.mamba_split_conv1d_scan_combined, tensors, kind, options)


@given(
    kinds(("decay", "initial_states"), ("initial_states",), outputs=2),
    st.integers(0, 3),
    st.integers(0, 12),
    heads(),
    st.sampled_from([0.0, 1.0, 1e3]),
)
def test_state_passing(device, kind, batch, nchunks, sizes, decay):
    sizes = {name: size for name, size in sizes.items() if name != "ngroups"}
    tensors = kind.make(inputs.state_passing, batch=batch, nchunks=nchunks, **sizes, device=device)
    tensors["decay"] = tensors["decay"] * decay
    if kind.dtype != torch.float64:
        kind.float32.add("decay")
    check(oxiscan.state_passing, reference.state_passing, kind.finish(tensors), kind, {})


@given(
    kinds(("weight", "bias"), ("bias", "z")),
    st.lists(st.integers(0, 6), max_size=3) | st.lists(st.sampled_from((31, 32, 33, 70)), max_size=1),
    SIZES,
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.booleans(),
)
def test_rmsnorm_gated(device, kind, shape, group_size, ngroups, one_group, eps, norm_before_gate):
    tensors = kind.finish(kind.make(inputs.rmsnorm_gated, *shape, group_size * ngroups, device=device))
    options = {"eps": eps, "group_size": None if one_group else group_size, "norm_before_gate": norm_before_gate}
    check(oxiscan.rmsnorm_gated, reference.rmsnorm_gated, tensors, kind, options)


@given(
    kinds(("dt", "A", "D", "dt_bias", "state", "intermediate_ssm_states"), ("D", "z", "dt_bias")),
    steps(),
    heads(),
    st.sampled_from(["heads", "heads", "B and C without groups", "no heads", "neither"]),
    st.booleans(),
    PADDING,
    INDICES,
)
def test_selective_state_update(device, kind, step, sizes, form, softplus, padding, indices):
    written = ("state", "intermediate_ssm_states")
    dim = sizes.pop("headdim")
    if form in ("B and C without groups", "neither"):
        sizes["ngroups"] = None
    if form in ("no heads", "neither"):
        sizes |= {"nheads": None, "ngroups": None if sizes["ngroups"] is None else 1}
        step["seqlen"] = None
    tensors = kind.make(inputs.state_update, **step, **sizes, dim=dim, device=device)
    if not softplus:
        tensors["A"] *= SLOW_GROWTH
    used = slots(tensors, "state_batch_indices", padding, indices)
    tensors = kind.finish(tensors, written)
    check_in_place(
        oxiscan.selective_state_update,
        reference.selective_state_update,
        tensors,
        {name: used for name in written if name in tensors},
        {"dt_softplus": softplus},
    )


@given(
    kinds(
        ("delta", "A", "B", "C", "D", "delta_bias", "initial_state"),
        ("D", "z", "delta_bias", "initial_state"),
        outputs=3,
    ),
    packings(),
    st.integers(1, 3),
    st.integers(1, 6) | st.sampled_from((16, 17, 33, 65)),
    SIZES | st.sampled_from((64, 130)),
    st.sampled_from(["", "", "B", "C", "BC"]),
    st.booleans(),
    DECAYS,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_selective_scan_fn(
    device, kind, packing, ngroups, group_size, dstate, fixed, groups, decay, softplus, last_state, varlen_states
):
    sizes = {"dim": ngroups * group_size, "ngroups": ngroups if groups else None, "dstate": dstate, "device": device}
    like = {**sizes, "fixed": fixed, "decay": decay if softplus else SLOW_GROWTH}
    tensors = kind.make(inputs.selective_scan, batch=packing.batch, seqlen=packing.seqlen, **like)
    states = kind.make(inputs.selective_scan, batch=packing.rows, seqlen=1, **like)
    tensors = packing.pack(tensors, {"initial_state": states["initial_state"]}, kind.seed, device)
    kind.float32.difference_update({"B", "C"} - set(fixed))
    options = {
        "delta_softplus": softplus,
        "return_last_state": last_state,
        "return_varlen_states": varlen_states and packing.lengths is not None,
    }
    check(oxiscan.selective_scan_fn, reference.selective_scan_fn, kind.finish(tensors), kind, options)


MAMBA_INNER_OPTIONAL = (
    "conv1d_bias",
    "out_proj_bias",
    "D",
    "delta_bias",
    "B_proj_bias",
    "C_proj_bias",
    "b_rms_weight",
    "c_rms_weight",
    "dt_rms_weight",
)
MAMBA_INNER_WEIGHTS = ("conv1d_weight", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "A")


@given(
    kinds(MAMBA_INNER_WEIGHTS + MAMBA_INNER_OPTIONAL, MAMBA_INNER_OPTIONAL),
    st.integers(0, 3),
    SEQLENS,
    SIZES,
    SIZES,
    st.integers(1, 4),
    st.integers(2, 8),
    st.sampled_from(["", "", "B", "C", "BC"]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([1e-6, 0.1]),
)
def test_mamba_inner_fn(
    device, kind, batch, seqlen, dim, dstate, delta_rank, width, given, softplus, checkpoint_lvl, eps
):
    dim *= 2 if given == "BC" else 1
    sizes = {"dim": dim, "dstate": dstate, "delta_rank": delta_rank, "width": width, "given": given, "norm": True}
    tensors = kind.make(inputs.mamba_inner, batch=batch, seqlen=seqlen, **sizes, device=device)
    if not softplus:
        tensors["A"] *= SLOW_GROWTH
    options = {"delta_softplus": softplus, "checkpoint_lvl": checkpoint_lvl, "b_c_dt_rms_eps": eps}
    options |= {name: None for name in ("conv1d_bias", "out_proj_bias") if name in kind.left_out}
    check(oxiscan.mamba_inner_fn, reference.mamba_inner_fn, kind.finish(tensors), kind, options)
