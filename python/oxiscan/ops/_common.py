"""What the autograd functions share."""

import torch
from torch import Tensor


def empty_like(tensor: Tensor | None) -> Tensor | None:
    """An uninitialised tensor for the gradient of an optional argument."""
    return None if tensor is None else torch.empty_like(tensor)
