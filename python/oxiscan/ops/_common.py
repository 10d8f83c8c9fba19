"""What the ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, by which differentiating a backward raises; here also where no incoming gradient needs one.

    torch's own then takes the gradients for constants, though they depend on the arguments.
    """
    raising = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = tuple(None if g is None else g.detach().requires_grad_() for g in gradients)
        return raising(ctx, *gradients)

    return wrapper


def written(*tensors: Tensor | None) -> None:
    """Let autograd know that `tensors` were written in place: a graph that saved one must not use it any more.

    Compiled code knows by the kernel's schema.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def empty_like(tensor: Tensor | None) -> Tensor | None:
    """An uninitialised tensor for the gradient of an optional argument."""
    return None if tensor is None else torch.empty_like(tensor)


def results(out: Tensor, *states: Tensor | None) -> Any:
    """What an op returns: out alone, or a tuple with the states that were asked for."""
    returned = [state for state in states if state is not None]
    return (out, *returned) if returned else out
