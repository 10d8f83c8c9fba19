"""What one would write in plain torch today, with its autograd: the other side of benchmarks/cpu.py.

Each function is checked against the float64 reference before it is timed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int
) -> Tensor:
    """Mamba-2's scan as batched matrix products over chunks; seqlen has to be a multiple of chunk_size.

    With a the sum of A dt within a chunk: Y = ((C B^T) o exp(a[t] - a[s]) dt) X + exp(a) C H^T + D X, where the states
    H before each chunk are a product of the decays between chunks and what each chunk adds.
    """
    batch, seqlen, nheads, headdim = x.shape
    heads = nheads // B.shape[2]
    nchunks = seqlen // chunk_size

    def chunks(tensor: Tensor) -> Tensor:  # (batch, seqlen, n, size) -> (batch, n, nchunks, chunk_size, size)
        return tensor.unflatten(1, (nchunks, chunk_size)).permute(0, 3, 1, 2, 4)

    dt = chunks(F.softplus(dt + dt_bias).unsqueeze(-1)).squeeze(-1)
    a = (A[:, None, None] * dt).cumsum(-1)
    X, B, C = chunks(x), chunks(B), chunks(C)
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool).tril()
    L = (a[..., :, None] - a[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    CB = (C @ B.mT).repeat_interleave(heads, dim=1)
    B, C = B.repeat_interleave(heads, dim=1), C.repeat_interleave(heads, dim=1)
    Y = (CB * L * dt[..., None, :]) @ X

    added = (X * (dt * (a[..., -1:] - a).exp())[..., None]).mT @ B
    total = F.pad(a[..., -1], (1, 0)).cumsum(-1)  # decay up to the start of each chunk
    between = total[..., :-1, None] - total[..., None, 1:]
    before = torch.ones(nchunks, nchunks, dtype=torch.bool).tril(-1)
    between = between.masked_fill(~before, float("-inf")).exp()
    H = (between @ added.flatten(-2)).unflatten(-1, added.shape[-2:])
    Y = Y + a.exp()[..., None] * (C @ H.mT) + D[:, None, None, None] * X
    return Y.permute(0, 2, 3, 1, 4).reshape(batch, seqlen, nheads, headdim)


def token_loop_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Mamba-1's scan, token by token; what does not depend on the state is computed for all tokens at once."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A))
    added = torch.einsum("bdl,bnl->lbdn", delta * u, B)
    state = torch.zeros_like(decay[0])
    y = []
    for decay_t, added_t, C_t in zip(decay.unbind(0), added.unbind(0), C.unbind(-1), strict=True):
        state = decay_t * state + added_t
        y.append((state @ C_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, dim=-1) + D[:, None] * u


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's own convolution, padded on the left, and SiLU."""
    width = weight.shape[1]
    return F.silu(F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=x.shape[1]))


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    """torch's own RMSNorm, gated by silu(z)."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(z)
