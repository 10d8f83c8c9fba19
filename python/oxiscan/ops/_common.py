"""What the ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

_transforms_active = torch._C._are_functorch_transforms_active


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, by which differentiating a backward raises; here also where no incoming gradient needs one.

    torch's own then takes the gradients for constants, though they depend on the arguments.
    """
    raising = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Any:
        if not is_grad_enabled():
            return backward(ctx, *gradients)
        if not torch.compiler.is_compiling():
            gradients = tuple(None if g is None else g.detach().requires_grad_() for g in gradients)
        return raising(ctx, *gradients)

    return wrapper


class Function(torch.autograd.Function):
    """torch's, with `record`: its `apply` without the Python around torch's function transforms."""

    record: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.record = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


class _NoGraph:
    """Stands for an autograd function's context where nothing is recorded."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep nothing."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nobody asks for gradients."""


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)` at less cost: that of torch is about two kernel launches.

    `record` is half of it, and enough outside transforms; where nothing requires a gradient all of it is left out.
    """
    if is_dynamo_compiling() or _transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    if is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function.record(*arguments)
    return function.forward(_NoGraph(), *arguments)


def expect_cpu(op: str, name: str, tensor: Tensor) -> None:
    """Refuse CUDA tensors of an op that is made of others, which have kernels for them."""
    if isinstance(tensor, Tensor) and tensor.is_cuda:
        got = f"a tensor on {tensor.device}"
        raise NotImplementedError(f"{name}: got {got}; allowed: cpu, the only backend of {op} so far")


def empty_like(tensor: Tensor | None) -> Tensor | None:
    """An uninitialised tensor for the gradient of an optional argument."""
    return None if tensor is None else torch.empty_like(tensor)


def results(out: Tensor, *states: Tensor | None) -> Any:
    """What an op returns: out alone, or a tuple with the states that were asked for."""
    returned = [state for state in states if state is not None]
    return (out, *returned) if returned else out
