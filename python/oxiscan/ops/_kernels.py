"""The kernels of `_C`, each also an op of torch.library: what the public ops call.

A call goes straight to `_C`. Where torch traces (torch.compile, torch.export, make_fx, FakeTensorMode) it goes through
the op `torch.ops.oxiscan.<name>`, which a trace records without looking inside. The public ops allocate outputs with
torch and pass them in, so an op here returns nothing, and nothing says a second time which shapes come out.

A new kernel, or a new argument of one, is a line of the table below: `name = _register(_C.name, *arguments)`, the
arguments as the kernel of `_C` takes them, in the notation of torch's schemas, a tuple where it takes a tuple.
What is written is `Tensor(name!) name`, or `Tensor(name!)? name` if it may be None; sizes are `SymInt`, not `int`.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from oxiscan import _C

_Kernel = TypeVar("_Kernel", bound=Callable[..., None])

_library = torch.library.Library("oxiscan", "DEF")
_dispatch_modes = torch._C._len_torch_dispatch_stack
_TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def _traces() -> bool:
    """Whether one of the dispatch modes records calls or runs them without memory.

    Others do not count: selective activation checkpointing would take an op that returns nothing for one whose results
    it has saved, and not run it again.
    """
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES)


def _fake(*arguments: Any) -> None:
    """Every op on tensors without memory."""


_library.define("copy(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("copy", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("oxiscan::copy", torch.empty_like, lib=_library)


def _functionalize(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Where an op was to write to a view at a symbolic offset, have it write to a copy, and copy that back.

    torch's inductor takes the offset of what an op writes, or torch's clone reads, for 0 unless it is a constant
    (https://github.com/pytorch/pytorch/issues/198068): another part of the tensor that was viewed.
    """
    written = [
        i
        for i, argument in enumerate(op._schema.arguments)
        if argument.is_write and isinstance(args[i], Tensor) and isinstance(args[i].storage_offset(), torch.SymInt)
    ]
    with mode:
        copies = {i: torch.ops.oxiscan.copy(args[i]) for i in written}
    mode.__torch_dispatch__(op, types, tuple(copies.get(i, value) for i, value in enumerate(args)), kwargs)
    with mode:
        for i in written:
            args[i].copy_(copies[i])


def _register(kernel: _Kernel, *arguments: str | tuple[str, ...], in_place: tuple[str, ...] = ()) -> _Kernel:
    """Define the op of a kernel's name. Returns what the public ops call: takes what the kernel takes, by position.

    Args:
        in_place: the caller's own tensors that are written. Autograd is told: a graph that saved one must not use it.
    """
    name = kernel.__name__
    names = [group.split(" ")[-1] if isinstance(group, str) else None for group in arguments]
    updated = [names.index(argument) for argument in in_place]
    schema = ", ".join(group if isinstance(group, str) else ", ".join(group) for group in arguments)

    def implementation(*flat: Any) -> None:
        values = iter(flat)
        kernel(*(next(values) if isinstance(group, str) else tuple(islice(values, len(group))) for group in arguments))

    _library.define(f"{name}({schema}) -> ()", tags=torch.Tag.pt2_compliant_tag)
    # For every backend: the kernel itself looks at the device, and refuses one that it does not know by name.
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"oxiscan::{name}", _fake, lib=_library)
    torch.library.register_torch_dispatch(f"oxiscan::{name}", FunctionalTensorMode, _functionalize, lib=_library)
    op = getattr(torch.ops.oxiscan, name).default

    # Every call pays for this. `is_compiling` and starting an empty loop would cost more; what the former says beyond
    # dynamo, the modes say too.
    def call(*values: Any) -> None:
        if is_dynamo_compiling() or (_dispatch_modes() and _traces()):
            # The kernel's own call records nothing for autograd either.
            with torch.no_grad():
                op(*(value for group in values for value in (group if isinstance(group, tuple) else (group,))))
            return
        kernel(*values)
        if updated:
            for i in updated:
                if values[i] is not None:
                    increment_version(values[i])

    return cast(_Kernel, call)


_CONV = (
    "Tensor x",
    "Tensor weight",
    "Tensor? bias",
    "Tensor? seq_idx",
    "Tensor? cu_seqlens",
    "Tensor? initial_states",
)

causal_conv1d_forward = _register(
    _C.causal_conv1d_forward, _CONV, "bool silu", "Tensor(out!) out", "Tensor(final_states!)? final_states"
)
causal_conv1d_backward = _register(
    _C.causal_conv1d_backward,
    _CONV,
    "bool silu",
    "Tensor? dout",
    "Tensor? dfinal_states",
    "Tensor(dx!) dx",
    "Tensor(dweight!) dweight",
    "Tensor(dbias!)? dbias",
    "Tensor(dinitial_states!)? dinitial_states",
    "Tensor(partials!)? partials",
)
causal_conv1d_update = _register(
    _C.causal_conv1d_update,
    "Tensor x",
    "Tensor(conv_state!) conv_state",
    "Tensor weight",
    "Tensor? bias",
    "bool silu",
    "Tensor? cache_seqlens",
    "Tensor? conv_state_indices",
    "Tensor(intermediate_conv_states!)? intermediate_conv_states",
    "Tensor(out!) out",
    in_place=("conv_state", "intermediate_conv_states"),
)
causal_conv1d_varlen_states = _register(
    _C.causal_conv1d_varlen_states, "Tensor x", "Tensor cu_seqlens", "Tensor(states!) states"
)

_NORM = ("Tensor x", "Tensor weight", "Tensor? bias", "Tensor? z")
_NORM_OPTIONS = ("float eps", "SymInt? group_size", "bool norm_before_gate")

rmsnorm_gated_forward = _register(_C.rmsnorm_gated_forward, _NORM, _NORM_OPTIONS, "Tensor(out!) out")
rmsnorm_gated_backward = _register(
    _C.rmsnorm_gated_backward,
    _NORM,
    _NORM_OPTIONS,
    "Tensor dout",
    "Tensor(dx!) dx",
    "Tensor(dweight!) dweight",
    "Tensor(dbias!)? dbias",
    "Tensor(dz!)? dz",
    "Tensor(partials!)? partials",
)

selective_state_update = _register(
    _C.selective_state_update,
    "Tensor(state!) state",
    "Tensor x",
    "Tensor dt",
    "Tensor A",
    "Tensor B",
    "Tensor C",
    "Tensor? D",
    "Tensor? z",
    "Tensor? dt_bias",
    "bool dt_softplus",
    "Tensor? state_batch_indices",
    "Tensor(intermediate_ssm_states!)? intermediate_ssm_states",
    "Tensor(out!) out",
    in_place=("state", "intermediate_ssm_states"),
)

_SCAN = (
    "Tensor u",
    "Tensor delta",
    "Tensor A",
    "Tensor B",
    "Tensor C",
    "Tensor? D",
    "Tensor? z",
    "Tensor? delta_bias",
    "Tensor? initial_state",
    "Tensor? seq_idx",
    "Tensor? cu_seqlens",
)

selective_scan_forward = _register(
    _C.selective_scan_forward,
    _SCAN,
    "bool delta_softplus",
    "Tensor(out!) out",
    "Tensor(last_state!)? last_state",
    "Tensor(varlen_states!)? varlen_states",
)
selective_scan_backward = _register(
    _C.selective_scan_backward,
    _SCAN,
    "bool delta_softplus",
    "Tensor? dout",
    "Tensor? dlast_state",
    "Tensor? dvarlen_states",
    "Tensor(du!) du",
    "Tensor(ddelta!) ddelta",
    "Tensor(dA!) dA",
    "Tensor(dB!) dB",
    "Tensor(dC!) dC",
    "Tensor(dD!)? dD",
    "Tensor(dz!)? dz",
    "Tensor(ddelta_bias!)? ddelta_bias",
    "Tensor(dinitial_state!)? dinitial_state",
)

_SSD = (
    "Tensor x",
    "Tensor dt",
    "Tensor A",
    "Tensor B",
    "Tensor C",
    "Tensor? D",
    "Tensor? z",
    "Tensor? dt_bias",
    "Tensor? initial_states",
)
_PACKING = ("Tensor? seq_idx", "Tensor? cu_seqlens")
_DT_LIMIT = ("float dt_min", "float dt_max")

ssd_forward = _register(
    _C.ssd_forward,
    _SSD,
    _PACKING,
    "bool dt_softplus",
    _DT_LIMIT,
    "Tensor(out!) out",
    "Tensor(final_states!)? final_states",
    "Tensor(varlen_states!)? varlen_states",
    "Tensor(segments!)? segments",
    "Tensor(entry_states!)? entry_states",
)
ssd_backward = _register(
    _C.ssd_backward,
    _SSD,
    _PACKING,
    "bool dt_softplus",
    _DT_LIMIT,
    "Tensor? dout",
    "Tensor? dfinal_states",
    "Tensor? dvarlen_states",
    "Tensor(dx!) dx",
    "Tensor(ddt!) ddt",
    "Tensor(dA!) dA",
    "Tensor(dB!) dB",
    "Tensor(dC!) dC",
    "Tensor(dD!)? dD",
    "Tensor(dz!)? dz",
    "Tensor(ddt_bias!)? ddt_bias",
    "Tensor(dinitial_states!)? dinitial_states",
    (
        "Tensor(dy!)? dy",
        "Tensor(states!)? states",
        "Tensor(partials!)? partials",
        "Tensor(cuts!)? cuts",
        "Tensor(segments!)? segments",
    ),
    "Tensor? entry_states",
)


def _is_traced() -> bool:
    """What `call` in `_register` asks too, there without a call of its own."""
    return is_dynamo_compiling() or bool(_dispatch_modes() and _traces())


def ssd_backward_slot_tokens(*tensors: Tensor) -> int:
    """What `_C` says of these tensors; in a trace, where they have no memory yet, what is enough for any."""
    if _is_traced():
        return 64
    return _C._ssd_backward_slot_tokens(*tensors)


def ssd_keeps_states(x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, out: Tensor) -> bool:
    """What `_C` says of these tensors; not in a trace, where they have no memory yet."""
    if not x.is_cuda or _is_traced():
        return False
    return _C._ssd_keeps_states(x, B, C, z, out)


ssd_varlen_forward = _register(
    _C.ssd_varlen_forward,
    _SSD,
    ("Tensor cu_chunk_seqlens", "Tensor seq_idx"),
    "Tensor last_chunk_indices",
    "bool dt_softplus",
    _DT_LIMIT,
    "Tensor(out!) out",
    "Tensor(chunk_states!) chunk_states",
    in_place=("out",),
)

state_passing_forward = _register(
    _C.state_passing_forward,
    "Tensor states",
    "Tensor decay",
    "Tensor? initial_states",
    "Tensor(states_before!) states_before",
    "Tensor(final_states!) final_states",
)
state_passing_backward = _register(
    _C.state_passing_backward,
    "Tensor states_before",
    "Tensor decay",
    "Tensor? initial_states",
    "Tensor? dstates_before",
    "Tensor? dfinal_states",
    "Tensor(dstates!) dstates",
    "Tensor(ddecay!) ddecay",
    "Tensor(dinitial_states!)? dinitial_states",
    "Tensor(partials!)? partials",
)
