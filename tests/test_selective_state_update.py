"""selective_state_update, alone and against the scan."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, inputs


def update_inputs(*, dtype, device, batch=3, nheads=4, dim=5, ngroups=2, dstate=7, parameters=None, state=None):
    like = {"dtype": dtype, "device": device}
    parameter = {"dtype": parameters or dtype, "device": device}
    return {
        "state": inputs.normal(batch, nheads, dim, dstate, dtype=state or dtype, device=device),
        "x": inputs.normal(batch, nheads, dim, **like),
        "dt": inputs.normal(batch, nheads, dim, **like),
        "A": -inputs.normal(nheads, dim, dstate, **parameter).abs(),
        "B": inputs.normal(batch, ngroups, dstate, **like),
        "C": inputs.normal(batch, ngroups, dstate, **like),
        "D": inputs.normal(nheads, dim, **parameter),
        "z": inputs.normal(batch, nheads, dim, **like),
        "dt_bias": inputs.normal(nheads, dim, **parameter),
    }


def compare_update(tensors, **options):
    exact = {name: tensor.clone().double() for name, tensor in tensors.items()}
    expected = reference.selective_state_update(**exact, **options)
    out = oxiscan.selective_state_update(**tensors, **options)
    assert out.dtype == tensors["x"].dtype
    assert_close("out", out, expected, TOLERANCES[out.dtype][0])
    assert_close("state", tensors["state"], exact["state"], TOLERANCES[tensors["state"].dtype][0])


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_every_dtype(dtype, dt_softplus, device):
    compare_update(update_inputs(dtype=dtype, device=device), dt_softplus=dt_softplus)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_and_state(dtype, device):
    compare_update(update_inputs(dtype=dtype, parameters=torch.float32, state=torch.float32, device=device))


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias"])
def test_an_optional_argument_left_out(left_out, device):
    tensors = update_inputs(dtype=torch.float64, device=device)
    del tensors[left_out]
    compare_update(tensors)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"dim": 80, "dstate": 128}, {"ngroups": 1}, {"ngroups": 4}, {"dstate": 1}]
)
def test_sizes(sizes, device):
    compare_update(update_inputs(**sizes, dtype=torch.float64, device=device))


def test_B_and_C_without_groups(device):
    tensors = update_inputs(ngroups=1, dtype=torch.float64, device=device)
    compare_update(tensors | {name: tensors[name][:, 0] for name in ("B", "C")})


def test_without_heads(device):
    tensors = update_inputs(nheads=1, ngroups=1, dtype=torch.float64, device=device)
    headless = {name: t[0] if name in ("A", "D", "dt_bias") else t[:, 0] for name, t in tensors.items()}
    compare_update(headless)


def test_expanded_arguments_as_a_decoder_passes_them(device):
    tensors = update_inputs(dtype=torch.float32, device=device)
    for name in ("dt", "D", "dt_bias"):
        tensors[name] = tensors[name][..., :1].expand_as(tensors[name])
    tensors["A"] = tensors["A"][:, :1, :1].expand_as(tensors["A"])
    compare_update(tensors, dt_softplus=True)


def test_strided_arguments(device):
    tensors = update_inputs(dtype=torch.float64, device=device)
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    assert torch.equal(oxiscan.selective_state_update(**tensors), oxiscan.selective_state_update(**views))
    assert torch.equal(tensors["state"], views["state"])


def test_the_result_carries_no_gradient(device):
    tensors = update_inputs(dtype=torch.float32, device=device)
    tensors["x"].requires_grad_()
    assert not oxiscan.selective_state_update(**tensors).requires_grad


def test_the_written_state_is_noticed_by_autograd(device):
    tensors = inputs.ssd(seqlen=6, dtype=torch.float32, device=device)
    tensors["A"].requires_grad_()
    out = oxiscan.mamba_chunk_scan_combined(**tensors, chunk_size=8)
    step = update_inputs(batch=2, dim=8, dstate=12, dtype=torch.float32, device=device)
    oxiscan.selective_state_update(**step | {"state": tensors["initial_states"]})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_steps_equal_the_scan(dtype, parameters, device):
    tensors = inputs.ssd(seqlen=70, dtype=dtype, parameters=parameters, D="elements", device=device)
    out, final_states = oxiscan.mamba_chunk_scan_combined(
        **tensors, chunk_size=16, dt_softplus=True, return_final_states=True
    )
    _, _, nheads, headdim = tensors["x"].shape
    dstate = tensors["B"].shape[-1]
    state = tensors["initial_states"].to(final_states.dtype, copy=True)
    steps = []
    for t in range(70):
        steps.append(
            oxiscan.selective_state_update(
                state,
                tensors["x"][:, t],
                tensors["dt"][:, t, :, None].expand(-1, -1, headdim),
                tensors["A"][:, None, None].expand(-1, headdim, dstate),
                tensors["B"][:, t],
                tensors["C"][:, t],
                tensors["D"],
                z=tensors["z"][:, t],
                dt_bias=tensors["dt_bias"][:, None].expand(-1, headdim),
                dt_softplus=True,
            )
        )
    assert_close("out", torch.stack(steps, dim=1), out, TOLERANCES[dtype][0])
    assert_close("state", state, final_states, TOLERANCES[final_states.dtype][0])
