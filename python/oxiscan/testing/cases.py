"""The list of cases: calls of ops by name, the same in tests, benchmarks and results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import inputs


class Case(NamedTuple):
    """A call of an op: arguments that `make` of `inputs` makes in these sizes, and the other options."""

    name: str
    #: Its name in `oxiscan` and `oxiscan.reference`.
    op: str
    make: Callable[..., dict[str, Tensor]]
    sizes: dict[str, Any]
    options: dict[str, Any]

    def tensors(self, dtype: torch.dtype, device: torch.device, seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
        """The tensor arguments; `sizes` replace the case's own."""
        return self.make(**self.sizes | sizes, dtype=dtype, device=device, seed=seed)


def _norm(*, batch: int, seqlen: int, dim: int, **rest: Any) -> dict[str, Tensor]:
    return inputs.rmsnorm_gated(batch, seqlen, dim, bias=False, **rest)


def _mamba2_scan(**sizes: Any) -> dict[str, Tensor]:
    """A sequence as a Mamba-2 mixer passes it in training: the norm that follows gates, and no state enters."""
    tensors = inputs.ssd(**sizes)
    del tensors["z"], tensors["initial_states"]
    return tensors


def _mamba1_step(**sizes: Any) -> dict[str, Tensor]:
    """A token as a Mamba-1 decoder passes it: no heads, A in float32."""
    tensors = inputs.state_update(nheads=None, ngroups=None, **sizes)
    return tensors | {"A": tensors["A"].float()}


def _mamba2_step(*, headdim: int, **sizes: Any) -> dict[str, Tensor]:
    """A token as a Mamba-2 decoder passes it: dt, A, D and dt_bias one value a head, expanded, A in float32.

    No z: the norm that follows gates.
    """
    tensors = inputs.state_update(dim=headdim, **sizes)
    del tensors["z"]
    for name in ("dt", "D", "dt_bias"):
        tensors[name] = tensors[name][..., :1].contiguous().expand_as(tensors[name])
    A = tensors["A"]
    return tensors | {"A": A[:, :1, :1].float().contiguous().expand_as(A)}


_HYBRID8B_TP4 = {
    "batch": 4, "seqlen": 4096, "nheads": 32, "headdim": 64, "ngroups": 2, "dstate": 128, "chunk_size": 128,
}  # fmt: skip


def _mamba2(name: str, *, width: int = 4, **ssd: Any) -> list[Case]:
    """A Mamba-2 mixer's ops in the sizes of its scan."""
    chunk_size = ssd.pop("chunk_size")
    dim = ssd["nheads"] * ssd["headdim"]
    tokens = {"batch": ssd["batch"], "seqlen": ssd["seqlen"]}
    conv = tokens | {"dim": dim + 2 * ssd["ngroups"] * ssd["dstate"], "width": width}
    norm = {"group_size": dim // ssd["ngroups"]}
    scan = {"chunk_size": chunk_size}
    split = scan | {"ngroups": ssd["ngroups"]}
    return [
        Case(f"{name}/ssd", "mamba_chunk_scan_combined", _mamba2_scan, ssd, scan | {"dt_softplus": True}),
        Case(f"{name}/split", "mamba_split_conv1d_scan_combined", inputs.split_conv1d_scan, ssd, split),
        Case(f"{name}/conv", "causal_conv1d_fn", inputs.conv, conv, {"activation": "silu"}),
        Case(
            f"{name}/conv_channel_last",
            "causal_conv1d_fn",
            inputs.conv,
            conv | {"channel_last": True},
            {"activation": "silu"},
        ),
        Case(f"{name}/norm", "rmsnorm_gated", _norm, tokens | {"dim": dim}, norm),
        # The order of Megatron's Mamba-2, then its training call, in which the scan gates.
        Case(
            f"{name}/norm_gate_first",
            "rmsnorm_gated",
            _norm,
            tokens | {"dim": dim},
            norm | {"norm_before_gate": False},
        ),
        Case(
            f"{name}/norm_no_z",
            "rmsnorm_gated",
            _norm,
            tokens | {"dim": dim, "z": False},
            norm | {"norm_before_gate": False},
        ),
    ]


def _scan_sizes(*other: tuple[str, int]) -> list[Case]:
    """The scan of hybrid8b_tp4 with one size other than there, for each of these."""
    scan = _mamba2("hybrid8b_tp4", **_HYBRID8B_TP4)[0]
    return [scan._replace(name=f"{name}{size}/ssd", sizes=scan.sizes | {name: size}) for name, size in other]


def _mamba1(name: str, **scan: Any) -> list[Case]:
    sizes = {"ngroups": None} | scan
    return [Case(f"{name}/selective_scan", "selective_scan_fn", inputs.selective_scan, sizes, {"delta_softplus": True})]


def _step(name: str, make: Callable[..., dict[str, Tensor]], *batches: int, **sizes: Any) -> list[Case]:
    """The decode step of the state, for batches of these sizes."""
    return [
        Case(
            f"{name}/state_update_batch{batch}",
            "selective_state_update",
            make,
            sizes | {"batch": batch},
            {"dt_softplus": True},
        )
        for batch in batches
    ]


def _conv_step(name: str, *batches: int, **sizes: Any) -> list[Case]:
    """The decode step of the convolution, on a state of `width` inputs, as decoders keep it."""
    return [
        Case(
            f"{name}/conv_update_batch{batch}",
            "causal_conv1d_update",
            inputs.conv_update,
            sizes | {"batch": batch, "state_len": 4},
            {"activation": "silu"},
        )
        for batch in batches
    ]


_CASES = [
    # Small ones, for tests against the reference.
    *_mamba2("small", batch=2, seqlen=75, nheads=4, headdim=8, ngroups=2, dstate=12, chunk_size=32),
    *_mamba1("small", batch=2, seqlen=75, dim=20, dstate=7),
    # For the CPU backend's speed.
    *_mamba2("cpu", batch=1, seqlen=2048, nheads=8, headdim=64, ngroups=1, dstate=64, chunk_size=64),
    *_mamba1("cpu", batch=1, seqlen=2048, dim=512, dstate=16),
    *_step("cpu", _mamba2_step, 8, nheads=8, headdim=64, ngroups=1, dstate=64),
    # arXiv 2406.07887's 8B hybrid: at tensor parallel 4 and micro-batch 4, on one GPU, in a long context. Mamba-2 2.7B.
    *_mamba2("hybrid8b_tp4", **_HYBRID8B_TP4),
    *_mamba2("hybrid8b_tp1", batch=1, seqlen=4096, nheads=128, headdim=64, ngroups=8, dstate=128, chunk_size=128),
    *_mamba2("long128k", batch=1, seqlen=131072, nheads=32, headdim=64, ngroups=2, dstate=128, chunk_size=128),
    *_mamba2("mamba2_2p7b", batch=8, seqlen=2048, nheads=80, headdim=64, ngroups=1, dstate=128, chunk_size=256),
    *_scan_sizes(("headdim", 80), ("headdim", 96), ("headdim", 128), ("dstate", 64), ("dstate", 256)),
    # The paper's 8B Mamba at tensor parallel 4; Mamba 2.8B.
    *_mamba1("mamba1_8b_tp4", batch=4, seqlen=4096, dim=2048, dstate=128),
    *_mamba1("mamba1_2p8b", batch=8, seqlen=2048, dim=5120, dstate=16),
    # Decoding: the 8B hybrid on one GPU, Mamba 2.8B.
    *_step("decode8b", _mamba2_step, 1, 8, 64, 256, nheads=128, headdim=64, ngroups=8, dstate=128),
    *_conv_step("decode8b", 1, 64, 256, dim=10240),
    *_step("mamba1_2p8b", _mamba1_step, 64, dim=5120, dstate=16),
]

#: By name: "<model>/<what>".
CASES: dict[str, Case] = {case.name: case for case in _CASES}
