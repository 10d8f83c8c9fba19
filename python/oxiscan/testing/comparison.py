"""Comparing an op with its reference: the measure, the tolerances and one function that runs both.

compare(oxiscan.rmsnorm_gated, oxiscan.reference.rmsnorm_gated, {"x": x, "weight": weight}, {"eps": 1e-5})
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import acc_dtype

#: Allowed relative RMS error against the float64 reference, (outputs, gradients), by the dtype of the inputs.
#: float64: a few hundred roundings of 1e-16, amplified by cancellation. float32: sums of some hundred terms of 6e-8
#: each, with the decay sums in float64; gradients pass through about twice as many. bfloat16 and float16: the result is
#: rounded once (2e-3 and 3e-4 RMS), intermediate results that are tensors themselves once more each.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (1.2e-2, 2.5e-2),
    torch.float16: (3e-3, 8e-3),
}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of actual - expected over RMS of expected, in float64. Zero where both are zero, NaN where either has one.

    Numbers that float32 has not with all its digits, and CUDA kernels take for zero, count as zeros, but where `actual`
    is float64.
    """
    least = 0.0 if actual.dtype == torch.float64 else torch.finfo(torch.float32).tiny
    actual, expected = (
        t.masked_fill(t.abs() < least, 0.0) for t in (actual.detach().double(), expected.detach().double())
    )
    error = (actual - expected).norm()
    return 0.0 if error == 0 else float(error / expected.norm())


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError naming `name` unless shapes agree and the relative RMS error is within `tolerance`."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = relative_rms(actual, expected)
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative RMS error {error:.3g}, allowed {tolerance:.3g}")


def tolerance(dtype: torch.dtype, float64: float, *, gradient: bool = False) -> float:
    """`float64` for that dtype, what `TOLERANCES` allows for narrower ones: for what float64 shows more closely."""
    return float64 if dtype == torch.float64 else TOLERANCES[dtype][gradient]


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise AssertionError unless both hold the same bits, of one call with its arguments laid out in two ways.

    On CUDA gradients, names of "d..." as `run` gives them, are only within `TOLERANCES`: each layout has its path, and
    a parameter's gradient is summed over as many blocks as fit on the GPU.
    """
    if actual.keys() != expected.keys():
        raise AssertionError(f"got {', '.join(actual)}, expected {', '.join(expected)}")
    for name, value in actual.items():
        if value.dtype != expected[name].dtype:
            raise AssertionError(f"{name}: {value.dtype}, expected {expected[name].dtype}")
        if value.device.type == "cuda" and name.startswith("d"):
            assert_close(name, value, expected[name], TOLERANCES[value.dtype][True])
        elif not torch.equal(value, expected[name]):
            raise AssertionError(f"{name}: not the same bits")


def seeded_gradients(outputs: list[Tensor]) -> list[Tensor]:
    """A random gradient for each output, in its dtype; the same ones for the same shapes."""
    generator = torch.Generator().manual_seed(len(outputs))
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]


def run(
    op: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    output_gradients: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Run `op(**tensors, **options)` forward and backward.

    Args:
        tensors: the tensor arguments. A gradient is taken for each floating one.
        output_gradients: one for each output, None for an output that is not used; `seeded_gradients` if left out.

    Returns:
        Outputs as "out0", "out1", ..., gradients as "d" + name.
    """
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    result = op(**leaves, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if output_gradients is None:
        output_gradients = seeded_gradients(outputs)
    names = [k for k, t in leaves.items() if t.requires_grad]
    wanted = [leaves[k] for k in names]
    # An output that no argument reaches (a final state of no tokens) passes no gradient on.
    reached = [
        (output, gradient)
        for output, gradient in zip(outputs, output_gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    gradients = torch.autograd.grad(
        [output for output, _ in reached],
        wanted,
        [gradient for _, gradient in reached],
        allow_unused=True,
        materialize_grads=True,
    )
    values = {f"out{i}": t.detach() for i, t in enumerate(outputs)}
    return values | {f"d{k}": t for k, t in zip(names, gradients, strict=True)}


def compare(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    tolerances: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Run `op` on `tensors` and `reference` on the same values in float64; compare every output and gradient.

    Args:
        tensors: tensor arguments; the first one's dtype sets the tolerance, for a gradient also its argument's.
        tolerances: for outputs ("out0") and gradients ("dA") by name, where they differ from `TOLERANCES`.

    Returns:
        op's outputs and gradients, as `run` names them.

    Raises:
        AssertionError: naming the output or gradient that is off, or whose dtype is not its argument's.
    """
    dtype = next(iter(tensors.values())).dtype
    actual = run(op, tensors, options)
    exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    # The reference is given the output gradients as they were rounded for the op.
    outputs = [t for k, t in actual.items() if k.startswith("out")]
    gradients = [gradient.double() for gradient in seeded_gradients(outputs)]
    expected = run(reference, exact, options, gradients)
    for name, value in actual.items():
        if name.startswith("out"):
            allowed = (dtype,) if name == "out0" else (dtype, acc_dtype(next(iter(tensors.values()))))
            if value.dtype not in allowed:
                raise AssertionError(f"{name}: {value.dtype}, expected {' or '.join(map(str, allowed))}")
            default = TOLERANCES[dtype][0]
        else:
            argument = tensors[name[1:]].dtype
            if value.dtype != argument:
                raise AssertionError(f"{name}: {value.dtype}, expected {argument}")
            default = max(TOLERANCES[dtype][1], TOLERANCES[argument][1])
            if name == "ddt_bias" and "ddt" in expected and dtype.itemsize == 2:
                # The sum of ddt over tokens: terms that err by the tolerance each give a sum that does by their size.
                default *= max(1.0, float(expected["ddt"].norm() / expected[name].norm()))
        assert_close(name, value, expected[name], (tolerances or {}).get(name, default))
    return actual


def compare_in_place(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    written: Sequence[str],
) -> Tensor:
    """Run a decode step `op` on `tensors` and `reference` on copies in float64; compare the result and what is written.

    Args:
        tensors: tensor arguments with x among them, whose dtype sets the tolerance. `op` updates them.
        written: arguments that are updated in place; those that are not given are passed over.

    Returns:
        op's result.

    Raises:
        AssertionError: naming what is off.
    """
    exact = {k: t.clone().double() if t.is_floating_point() else t for k, t in tensors.items()}
    expected = reference(**exact, **options)
    out = op(**tensors, **options)
    if out.dtype != tensors["x"].dtype:
        raise AssertionError(f"out: {out.dtype}, expected {tensors['x'].dtype}")
    assert_close("out", out, expected, TOLERANCES[out.dtype][0])
    for name in written:
        if name in tensors:
            allowed = max(TOLERANCES[dtype][0] for dtype in (out.dtype, tensors[name].dtype))
            assert_close(name, tensors[name], exact[name], allowed)
    return out
