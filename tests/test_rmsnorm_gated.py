"""rmsnorm_gated and RMSNormGated."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import compare, inputs, run
from oxiscan.testing.comparison import assert_equal


def compare_norm(tensors, **options):
    return compare(oxiscan.rmsnorm_gated, reference.rmsnorm_gated, tensors, options)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("z", [False, True])
def test_every_dtype(dtype, norm_before_gate, group_size, z, device):
    tensors = inputs.rmsnorm_gated(3, 37, 48, z=z, dtype=dtype, device=device)
    compare_norm(tensors, norm_before_gate=norm_before_gate, group_size=group_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_parameters(dtype, device):
    compare_norm(inputs.rmsnorm_gated(50, 48, parameters=torch.float32, dtype=dtype, device=device), group_size=24)


@pytest.mark.parametrize("shape", [(7,), (0, 5), (1, 1), (2, 3, 4, 33), (100, 65), (2, 65536)])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes(shape, bias, exact, device):
    eps = 0.1 if shape[-1] == 1 else 1e-5  # all that keeps the gradient of a single element from cancelling out
    compare_norm(inputs.rmsnorm_gated(*shape, bias=bias, dtype=exact, device=device), eps=eps)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_extreme_values(norm_before_gate, device):
    tensors = inputs.rmsnorm_gated(8, 32, dtype=torch.float32, device=device)
    tensors["x"][0] = 0.0
    tensors["x"][1] *= 1e15
    tensors["x"][2] *= 1e-15
    tensors["z"][3] *= 1e4
    tensors["z"][4] = 0.0
    compare_norm(tensors, norm_before_gate=norm_before_gate)


def test_strided_inputs_and_gradients(exact, device):
    tensors = inputs.rmsnorm_gated(5, 6, 24, dtype=exact, device=device)
    gradient = inputs.normal(5, 6, 24, dtype=exact, device=device)
    dense = run(oxiscan.rmsnorm_gated, tensors, {}, [gradient])
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    view = run(oxiscan.rmsnorm_gated, views, {}, [inputs.strided(gradient)])
    assert_equal(view, dense)


def test_bits_do_not_depend_on_run_or_threads(device):
    tensors = inputs.rmsnorm_gated(200, 40, dtype=torch.float32, device=device)
    first = run(oxiscan.rmsnorm_gated, tensors, {})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = run(oxiscan.rmsnorm_gated, tensors, {})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", [oxiscan.rmsnorm_gated, reference.rmsnorm_gated])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradcheck(op, norm_before_gate, float64, device):
    tensors = inputs.rmsnorm_gated(3, 6, dtype=float64, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True)), group_size=3, norm_before_gate=norm_before_gate),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_module(norm_before_gate, exact, device):
    module = oxiscan.RMSNormGated(
        24, eps=1e-3, group_size=8, norm_before_gate=norm_before_gate, device=device, dtype=exact
    )
    assert list(module.state_dict()) == ["weight"]
    assert (module.weight == 1).all()
    torch.nn.init.normal_(module.weight)
    tensors = inputs.rmsnorm_gated(5, 24, bias=False, dtype=exact, device=device)
    expected = oxiscan.rmsnorm_gated(
        tensors["x"], module.weight, None, tensors["z"], 1e-3, 8, norm_before_gate=norm_before_gate
    )
    assert torch.equal(module(tensors["x"], tensors["z"]), expected)
    module(tensors["x"]).sum().backward()
    assert module.weight.grad is not None


def test_module_refuses_a_group_size_that_does_not_divide():
    with pytest.raises(ValueError, match="group_size: got 5; allowed: a divisor of hidden_size = 24"):
        oxiscan.RMSNormGated(24, group_size=5)
