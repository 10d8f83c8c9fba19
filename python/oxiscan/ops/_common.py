"""What the ops share."""

from typing import Any

import torch
from torch import Tensor


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
