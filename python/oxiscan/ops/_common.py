"""What the ops share."""

import torch
from torch import Tensor


def written(tensor: Tensor) -> None:
    """Let autograd know that `tensor` was written in place: a graph that saved it must not use it any more."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def empty_like(tensor: Tensor | None) -> Tensor | None:
    """An uninitialised tensor for the gradient of an optional argument."""
    return None if tensor is None else torch.empty_like(tensor)
