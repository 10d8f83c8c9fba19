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


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, without the Python that torch wraps around it for its function transforms.

    That takes about as long as launching a kernel.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def empty_like(tensor: Tensor | None) -> Tensor | None:
    """An uninitialised tensor for the gradient of an optional argument."""
    return None if tensor is None else torch.empty_like(tensor)


def results(out: Tensor, *states: Tensor | None) -> Any:
    """What an op returns: out alone, or a tuple with the states that were asked for."""
    returned = [state for state in states if state is not None]
    return (out, *returned) if returned else out
