"""What torch users expect of every op: grad modes, repeated backward, checkpointing, no double backward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import oxiscan
from oxiscan.testing import assert_close, inputs
from oxiscan.testing.comparison import tolerance

CPU = torch.device("cpu")


def conv_case(dtype, device):
    tensors = inputs.conv(seqlen=20, dim=5, dtype=dtype, device=device)
    return lambda **t: oxiscan.causal_conv1d_fn(**t, activation="silu"), tensors


def ssd_case(dtype, device):
    tensors = inputs.ssd(seqlen=20, dtype=dtype, device=device)
    return lambda **t: oxiscan.mamba_chunk_scan_combined(**t, chunk_size=8, dt_softplus=True), tensors


def scan_case(dtype, device):
    tensors = inputs.selective_scan(seqlen=20, dtype=dtype, device=device)
    return lambda **t: oxiscan.selective_scan_fn(**t, delta_softplus=True), tensors


def inner_case(dtype, device):
    tensors = inputs.mamba_inner(seqlen=20, norm=True, dtype=dtype, device=device)
    return oxiscan.mamba_inner_fn, tensors


def passing_case(dtype, device):
    tensors = {
        "states": inputs.normal(2, 3, 2, 4, 5, dtype=dtype, device=device),
        "decay": -inputs.normal(2, 3, 2, dtype=dtype, device=device).abs(),
    }
    return lambda **t: oxiscan.state_passing(**t)[1], tensors


def norm_case(dtype, device):
    tensors = {name: inputs.normal(6, 8, dtype=dtype, device=device) for name in ("x", "z")}
    tensors["weight"] = inputs.normal(8, dtype=dtype, device=device)
    return oxiscan.rmsnorm_gated, tensors


def split_case(dtype, device):
    tensors = inputs.split_conv1d_scan(seqlen=20, norm=True, outproj=True, dtype=dtype, device=device)
    return lambda **t: oxiscan.mamba_split_conv1d_scan_combined(**t, chunk_size=8, ngroups=2), tensors


CASES = [conv_case, ssd_case, scan_case, inner_case, passing_case, norm_case, split_case]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__.removesuffix("_case"))
def case(request, exact, device):
    op, tensors = request.param(exact, device)
    return op, {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(case, mode):
    op, tensors = case
    with mode():
        out = op(**tensors)
    assert not out.requires_grad
    expected = op(**tensors)
    assert expected.requires_grad
    for other in (op(**{name: t.detach() for name, t in tensors.items()}), expected):
        if op is oxiscan.mamba_inner_fn:  # with projections by torch, whose bits depend on what needs a gradient
            assert_close("out", out, other, tolerance(out.dtype, 1e-13))
        else:
            assert torch.equal(out, other)


def test_backward_twice_with_retain_graph(case):
    op, tensors = case
    loss = op(**tensors).square().sum()
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate(case):
    op, tensors = case
    for _ in range(2):
        op(**tensors).sum().backward()
    once = torch.autograd.grad(op(**tensors).sum(), list(tensors.values()))
    for tensor, gradient in zip(tensors.values(), once, strict=True):
        assert torch.equal(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(case, use_reentrant):
    op, tensors = case
    names = list(tensors)
    direct = torch.autograd.grad(op(**tensors).square().sum(), list(tensors.values()))
    out = checkpoint(
        lambda *values: op(**dict(zip(names, values, strict=True))), *tensors.values(), use_reentrant=use_reentrant
    )
    out.square().sum().backward()
    for tensor, gradient in zip(tensors.values(), direct, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("loss", [lambda out: out.square().sum(), torch.sum], ids=["square", "sum"])
def test_double_backward_raises(case, loss):
    op, tensors = case
    first = torch.autograd.grad(loss(op(**tensors)), list(tensors.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        first[0].sum().backward()


def test_only_some_arguments_need_a_gradient(case):
    op, tensors = case
    name, leaf = next(iter(tensors.items()))
    full = torch.autograd.grad(op(**tensors).square().sum(), leaf)
    frozen = {k: t if k == name else t.detach() for k, t in tensors.items()}
    part = torch.autograd.grad(op(**frozen).square().sum(), leaf)
    if op is oxiscan.mamba_inner_fn:  # torch's products of its projections may depend on what needs a gradient
        assert_close(name, part[0], full[0], 1e-13)
    else:
        assert torch.equal(full[0], part[0])


def test_changing_a_saved_input_in_place_is_noticed(case):
    op, tensors = case
    name = next(iter(tensors))
    leaf = tensors[name].detach().clone()
    loss = op(**tensors | {name: leaf}).sum()
    leaf.mul_(2)
    if name != "states":  # state_passing keeps its result, not its input
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
