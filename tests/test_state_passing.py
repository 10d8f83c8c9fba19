"""state_passing."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import assert_close, compare, inputs, run
from oxiscan.testing.comparison import assert_equal, tolerance


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("initial", [False, True])
def test_every_dtype(dtype, initial, device):
    tensors = inputs.state_passing(dtype=dtype, initial=initial, device=device)
    compare(oxiscan.state_passing, reference.state_passing, tensors, {})


@pytest.mark.parametrize("sizes", [{"nchunks": 0}, {"nchunks": 1}, {"batch": 0}, {"headdim": 80, "dstate": 128}])
def test_sizes(sizes, exact, device):
    compare(
        oxiscan.state_passing,
        reference.state_passing,
        inputs.state_passing(**sizes, dtype=exact, device=device),
        {},
    )


def test_strong_decay(device):
    tensors = inputs.state_passing(dtype=torch.float32, device=device)
    tensors["decay"][:, 1::2] *= 1e4
    compare(oxiscan.state_passing, reference.state_passing, tensors, {})


def test_strided_inputs_and_gradients(exact, device):
    tensors = inputs.state_passing(dtype=exact, device=device)
    gradients = [torch.randn_like(tensors["states"]), torch.randn_like(tensors["initial_states"])]
    dense = run(oxiscan.state_passing, tensors, {}, gradients)
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    view = run(oxiscan.state_passing, views, {}, [inputs.strided(g) for g in gradients])
    assert_equal(view, dense)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(output, exact, device):
    def gradients(op):
        leaves = [t.detach().requires_grad_() for t in inputs.state_passing(dtype=exact, device=device).values()]
        op(*leaves)[output].square().sum().backward()
        return [leaf.grad for leaf in leaves]

    actual = gradients(oxiscan.state_passing)
    for i, (gradient, wanted) in enumerate(zip(actual, gradients(reference.state_passing), strict=True)):
        assert_close(f"gradient {i}", gradient, wanted, tolerance(exact, 1e-10, gradient=True))


def test_two_calls_equal_one(exact, device):
    tensors = inputs.state_passing(dtype=exact, device=device)
    before, final = oxiscan.state_passing(**tensors)
    first = oxiscan.state_passing(tensors["states"][:, :2], tensors["decay"][:, :2], tensors["initial_states"])
    second = oxiscan.state_passing(tensors["states"][:, 2:], tensors["decay"][:, 2:], first[1])
    assert torch.equal(torch.cat([first[0], second[0]], dim=1), before)
    assert torch.equal(second[1], final)


@pytest.mark.parametrize("op", [oxiscan.state_passing, reference.state_passing])
def test_gradcheck(op, float64, device):
    tensors = inputs.state_passing(nheads=2, headdim=2, dstate=3, dtype=float64, device=device)
    torch.autograd.gradcheck(op, tuple(tensor.requires_grad_() for tensor in tensors.values()))
