"""Which ops the mixer calls, and the names it needs bound in Megatron's own mixer module.

Megatron's `MambaMixer.__init__` refuses to run without mamba_ssm and takes its gated norm from there. Three names in
its module decide that; they are bound to ours while one of our mixers is built and put back afterwards, so that a plain
`MambaMixer` in the same process behaves as if this package were not there. The ops themselves are called by our mixer's
own methods and need no binding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from megatron.core.ssm import mamba_mixer

from oxiscan import ops as default_ops

_OPS = (
    "causal_conv1d_update",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_gated",
    "selective_state_update",
)

for _name in ("HAVE_MAMBA_SSM", "ExtendedRMSNorm"):
    if _name not in vars(mamba_mixer):
        raise ImportError(f"{mamba_mixer.__name__} has no {_name}", name=mamba_mixer.__name__)

_current: ModuleType = default_ops


def current_ops() -> ModuleType:
    """The module whose functions the mixers call: `oxiscan.ops`, unless within `use_ops`."""
    return _current


@contextmanager
def use_ops(namespace: ModuleType) -> Iterator[None]:
    """Within the block every mixer, whenever it was built, calls the ops of `namespace`.

    `oxiscan.reference` runs a model on the plain-torch recurrences. Not per thread: the choice is the process's.

    Raises:
        TypeError: `namespace` lacks one of the ops that a mixer calls.
    """
    global _current
    missing = [name for name in _OPS if not callable(getattr(namespace, name, None))]
    if missing:
        raise TypeError(f"namespace: {namespace!r} lacks {', '.join(missing)}; pass oxiscan.ops or oxiscan.reference")
    previous, _current = _current, namespace
    try:
        yield
    finally:
        _current = previous


@contextmanager
def mixer_names(norm: type) -> Iterator[None]:
    """Within the block Megatron's mixer module takes `norm` as its gated norm and does not ask for mamba_ssm."""
    names: dict[str, Any] = {
        "HAVE_MAMBA_SSM": True,  # the guard in __init__
        "ExtendedRMSNorm": norm,
        # From 0.17 on: whether the scans take `state_dtype`, checked against the config in __init__. Ours do.
        "MAMBA_HAS_STATE_DTYPE": True,
    }
    module = vars(mamba_mixer)
    before = {name: module[name] for name in names if name in module}
    module.update({name: names[name] for name in before})
    try:
        yield
    finally:
        module.update(before)
