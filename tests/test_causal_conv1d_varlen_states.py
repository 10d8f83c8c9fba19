"""causal_conv1d_varlen_states."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import inputs

LENGTHS = (3, 0, 1, 17, 0)


def compare_states(x, cu_seqlens, state_len):
    states = oxiscan.causal_conv1d_varlen_states(x, cu_seqlens, state_len)
    expected = reference.causal_conv1d_varlen_states(x, cu_seqlens, state_len)
    assert states.dtype == x.dtype
    assert torch.equal(states, expected)
    return states


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
def test_every_dtype(dtype, indices, device):
    x = inputs.normal(24, 70, dtype=dtype, device=device)
    compare_states(x, inputs.cu_seqlens(*LENGTHS, device=device, dtype=indices), 4)


@pytest.mark.parametrize("state_len", [0, 1, 3, 20])
@pytest.mark.parametrize("dim", [0, 1, 64, 65])
def test_sizes(state_len, dim, device):
    x = inputs.normal(21, dim, dtype=torch.float32, device=device)
    compare_states(x, inputs.cu_seqlens(*LENGTHS, device=device), state_len)


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_tokens(lengths, device):
    x = torch.empty(0, 5, device=device)
    assert (compare_states(x, inputs.cu_seqlens(*lengths, device=device), 3) == 0).all()


def test_tokens_past_the_last_document_belong_to_none(device):
    x = inputs.normal(9, 5, dtype=torch.float32, device=device)
    cu_seqlens = inputs.cu_seqlens(2, 4, device=device)
    before = compare_states(x, cu_seqlens, 3)
    x[6:] = float("nan")
    assert torch.equal(compare_states(x, cu_seqlens, 3), before)


def test_documents_do_not_leak(device):
    x = inputs.normal(21, 5, dtype=torch.float32, device=device)
    cu_seqlens = inputs.cu_seqlens(*LENGTHS, device=device)
    x[3] = float("nan")
    states = oxiscan.causal_conv1d_varlen_states(x, cu_seqlens, 4)
    assert states[[0, 1, 3, 4]].isfinite().all()
    assert states[2, :, 3].isnan().all() and (states[2, :, :3] == 0).all()


def test_strided_x(device):
    x = inputs.normal(21, 70, dtype=torch.float32, device=device)
    cu_seqlens = inputs.cu_seqlens(*LENGTHS, device=device)
    expected = oxiscan.causal_conv1d_varlen_states(x, cu_seqlens, 4)
    for view in (inputs.strided(x), x.T.contiguous().T):
        assert torch.equal(oxiscan.causal_conv1d_varlen_states(view, cu_seqlens, 4), expected)
    one = x[:1].expand(21, -1)
    compare_states(one, cu_seqlens, 4)


def test_they_are_where_decoding_goes_on(device):
    tensors = inputs.conv(batch=1, seqlen=12, dtype=torch.float32, device=device)
    x, weight = tensors["x"], tensors["weight"]
    states = oxiscan.causal_conv1d_varlen_states(x[0, :, :10].T, inputs.cu_seqlens(4, 6, device=device), 3)
    whole = oxiscan.causal_conv1d_fn(x[..., 4:], weight)
    out = oxiscan.causal_conv1d_update(x[..., 10:], states[1:], weight)
    assert torch.equal(out, whole[..., 6:])


def test_the_result_carries_no_gradient(device):
    x = torch.ones(4, 5, device=device, requires_grad=True)
    assert not oxiscan.causal_conv1d_varlen_states(x, inputs.cu_seqlens(4, device=device), 3).requires_grad
