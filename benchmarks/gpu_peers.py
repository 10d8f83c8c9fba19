"""The other side of `benchmarks.run` on a GPU: other packages' functions, called as oxiscan's are.

A new one is a line of `PEERS`. A package that cannot be imported is left out.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from oxiscan.testing import Case


class Peer(NamedTuple):
    """A package's function for one of oxiscan's ops."""

    package: str
    op: str
    #: Imports it; returns a function that takes the op's arguments by name.
    load: Callable[[], Callable[..., Any]]
    takes: Callable[[Case], bool] = lambda case: True


def _mamba_ssm_norm() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return partial(rmsnorm_fn, bias=None)


def _mamba_ssm_scan() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined


def _mamba_ssm_step() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return selective_state_update


def _fla_norm() -> Callable[..., Any]:
    from fla.modules.fused_norm_gate import rms_norm_gated

    def norm(x: Tensor, weight: Tensor, z: Tensor, eps: float = 1e-6, **whole_rows_then_gate: Any) -> Tensor:
        return rms_norm_gated(x, z, weight, None, eps=eps)

    return norm


def _whole_rows_then_gate(case: Case) -> bool:
    whole = case.options.get("group_size") in (None, case.sizes["dim"])
    return whole and case.sizes.get("z", True) and case.options.get("norm_before_gate", True)


PEERS = [
    Peer("mamba_ssm", "rmsnorm_gated", _mamba_ssm_norm),
    Peer("fla", "rmsnorm_gated", _fla_norm, _whole_rows_then_gate),
    Peer("mamba_ssm", "mamba_chunk_scan_combined", _mamba_ssm_scan),
    Peer("mamba_ssm", "selective_state_update", _mamba_ssm_step),
]


@cache
def _loaded(peer: Peer) -> Callable[..., Any] | None:
    """The peer's function, None if it cannot be imported, which is said once."""
    try:
        return peer.load()
    except Exception as error:  # a package built for another torch fails in ways of its own
        print(f"{peer.package}: absent for {peer.op}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        return None


def load(case: Case) -> dict[str, Callable[..., Any]]:
    """By package, the functions for a case."""
    found = {peer.package: _loaded(peer) for peer in PEERS if peer.op == case.op and peer.takes(case)}
    return {package: function for package, function in found.items() if function is not None}
