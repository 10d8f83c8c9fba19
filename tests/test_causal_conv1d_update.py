"""causal_conv1d_update, alone and against the convolution."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, inputs
from oxiscan.testing.comparison import assert_equal

WRITTEN = ("conv_state", "intermediate_conv_states")
FORMS = [{}, {"circular": True}]


def compare_update(tensors, activation="silu"):
    exact = {name: t.clone().double() if t.is_floating_point() else t for name, t in tensors.items()}
    expected = reference.causal_conv1d_update(**exact, activation=activation)
    out = oxiscan.causal_conv1d_update(**tensors, activation=activation)
    assert out.dtype == tensors["x"].dtype
    assert_close("out", out, expected, TOLERANCES[out.dtype][0])
    for name in WRITTEN:
        if name in tensors:
            assert torch.equal(tensors[name].double(), exact[name]), name
    return out


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("seqlen", [None, 1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype(dtype, seqlen, form, device):
    compare_update(inputs.conv_update(seqlen=seqlen, slots=6, intermediate=True, dtype=dtype, device=device, **form))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_parameters(dtype, device):
    compare_update(inputs.conv_update(seqlen=2, dtype=dtype, parameters=torch.float32, device=device))


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("extra", [0, 1, 4])
@pytest.mark.parametrize("seqlen", [None, 0, 1, 2, 5, 17])
@pytest.mark.parametrize("form", FORMS)
def test_width_state_len_and_seqlen(width, extra, seqlen, form, exact, device):
    shape = {"dim": 3, "width": width, "state_len": width - 1 + extra, "seqlen": seqlen}
    compare_update(inputs.conv_update(**shape, intermediate=True, dtype=exact, device=device, **form))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("dim", [1, 64, 65])
def test_batch_and_dim(batch, dim, exact, device):
    compare_update(inputs.conv_update(batch=batch, dim=dim, seqlen=3, dtype=exact, device=device))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_activation_and_no_bias(activation, exact, device):
    compare_update(inputs.conv_update(optional=False, dtype=exact, device=device), activation)


@pytest.mark.parametrize("form", FORMS)
def test_strided_arguments(form, exact, device):
    tensors = inputs.conv_update(seqlen=5, state_len=6, slots=5, intermediate=True, dtype=exact, device=device, **form)
    views = {name: inputs.strided(t) if t.is_floating_point() else t.repeat(2)[:3] for name, t in tensors.items()}
    outs = [oxiscan.causal_conv1d_update(**arguments) for arguments in (tensors, views)]
    assert_equal({"out": outs[1]}, {"out": outs[0]})
    for name in WRITTEN:
        assert torch.equal(tensors[name], views[name])


def test_every_input_expanded(exact, device):
    tensors = inputs.conv_update(seqlen=3, circular=True, dtype=exact, device=device)
    for name, tensor in tensors.items():
        if name not in WRITTEN:
            tensors[name] = tensor[(slice(1),) * tensor.dim()].expand_as(tensor)
    compare_update(tensors)


def test_tokens_innermost_or_channels_innermost(device):
    tensors = inputs.conv_update(seqlen=5, dtype=torch.float32, device=device)
    turned = copies(tensors)
    turned["x"] = turned["x"].transpose(1, 2).contiguous().transpose(1, 2)
    out = oxiscan.causal_conv1d_update(**turned)
    assert out.stride() == turned["x"].stride()
    assert_equal({"out": out}, {"out": oxiscan.causal_conv1d_update(**tensors)})


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
def test_indices_reach_their_slots_and_no_other(indices, form, device):
    tensors = inputs.conv_update(
        seqlen=2, state_len=4, slots=6, intermediate=True, dtype=torch.float32, device=device, **form
    )
    tensors["conv_state_indices"] = torch.tensor([4, -1, 0], dtype=indices, device=device)
    used = [4, 0]
    for name in WRITTEN:
        tensors[name][[1, 2, 3, 5]] = float("nan")
    before = copies(tensors)
    out = oxiscan.causal_conv1d_update(**tensors)
    assert (out[1] == 0).all()
    direct = {name: t[[0, 2]] for name, t in before.items() if name in ("x", "cache_seqlens")}
    direct |= {name: before[name] for name in ("weight", "bias")} | {name: before[name][used] for name in WRITTEN}
    assert torch.equal(out[[0, 2]], oxiscan.causal_conv1d_update(**direct))
    for name in WRITTEN:
        assert torch.equal(tensors[name][used], direct[name])
        assert tensors[name][[1, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_circular_buffer_keeps_inputs_where_they_are(dtype, exact, device):
    tensors = inputs.conv_update(state_len=5, seqlen=2, batch=1, optional=False, dtype=exact, device=device)
    state, x = tensors["conv_state"], tensors["x"]
    tensors["cache_seqlens"] = torch.tensor([2**40 + 3 if dtype == torch.int64 else 14], dtype=dtype, device=device)
    positions = [int(tensors["cache_seqlens"]) % 5, (int(tensors["cache_seqlens"]) + 1) % 5]
    before = state.clone()
    oxiscan.causal_conv1d_update(**tensors)
    others = [index for index in range(5) if index not in positions]
    assert torch.equal(state[..., positions], x)
    assert torch.equal(state[..., others], before[..., others])


@pytest.mark.parametrize("state_len", [3, 4, 10])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_circular_and_shifted_agree(state_len, tokens, device):
    shape = {"batch": 2, "state_len": state_len, "seqlen": 9, "optional": False}
    tensors = inputs.conv_update(**shape, dtype=torch.float32, device=device)
    x, weight = tensors["x"], tensors["weight"]
    shifted, circular = (torch.zeros_like(tensors["conv_state"]) for _ in range(2))
    for begin in range(0, 9, tokens):
        part = x[..., begin : begin + tokens]
        seen = torch.full((2,), begin, dtype=torch.int32, device=device)
        out = oxiscan.causal_conv1d_update(part, shifted, weight)
        assert torch.equal(oxiscan.causal_conv1d_update(part, circular, weight, cache_seqlens=seen), out)
    order = [(9 + index) % state_len for index in range(state_len)]
    assert torch.equal(circular[..., order], shifted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tokens_equal_one_by_one(form, dtype, device):
    tensors = inputs.conv_update(seqlen=7, state_len=5, slots=5, intermediate=True, dtype=dtype, device=device, **form)
    single = copies(tensors)
    out = oxiscan.causal_conv1d_update(**tensors)
    intermediate = single.pop("intermediate_conv_states")
    slots = tensors["conv_state_indices"].long()
    for t in range(7):
        token = {"x": single["x"][..., t]}
        if "cache_seqlens" in single:
            token["cache_seqlens"] = single["cache_seqlens"] + t
        assert torch.equal(oxiscan.causal_conv1d_update(**single | token), out[..., t])
        intermediate[slots, t] = single["conv_state"][slots]
    assert torch.equal(tensors["conv_state"], single["conv_state"])
    assert torch.equal(tensors["intermediate_conv_states"], intermediate)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_steps_equal_the_convolution(dtype, parameters, tokens, device):
    tensors = inputs.conv(seqlen=9, dtype=dtype, parameters=parameters, device=device)
    out, final_states = oxiscan.causal_conv1d_fn(**tensors, activation="silu", return_final_states=True)
    state = tensors["initial_states"].clone()
    for begin in range(0, 9, tokens):
        part = slice(begin, begin + tokens)
        x = tensors["x"][..., part]
        step = oxiscan.causal_conv1d_update(x, state, tensors["weight"], tensors["bias"], "silu")
        assert torch.equal(step, out[..., part])
    assert torch.equal(state, final_states)


def test_bits_do_not_depend_on_run_batch_or_threads(device):
    tensors = inputs.conv_update(batch=5, seqlen=3, dim=130, intermediate=True, dtype=torch.float32, device=device)
    again, alone = copies(tensors), copies(tensors)
    alone = {name: t if name in ("weight", "bias") else t[2:3] for name, t in alone.items()}
    out = oxiscan.causal_conv1d_update(**tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(oxiscan.causal_conv1d_update(**again), out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(oxiscan.causal_conv1d_update(**alone), out[2:3])
    for name in WRITTEN:
        assert torch.equal(again[name], tensors[name])
        assert torch.equal(alone[name], tensors[name][2:3])


def test_the_result_carries_no_gradient(device):
    tensors = inputs.conv_update(dtype=torch.float32, device=device)
    tensors["x"].requires_grad_()
    assert not oxiscan.causal_conv1d_update(**tensors).requires_grad


@pytest.mark.parametrize("name", WRITTEN)
def test_the_written_states_are_noticed_by_autograd(name, device):
    tensors = inputs.conv_update(intermediate=True, dtype=torch.float32, device=device)
    loss = (torch.ones(3, device=device, requires_grad=True) * tensors[name]).sum()
    oxiscan.causal_conv1d_update(**tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        oxiscan.causal_conv1d_update(**copies(tensors))


def test_an_input_within_the_state_is_refused(device):
    tensors = inputs.conv_update(batch=3, slots=3, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="conv_state: got memory that it shares with x"):
        oxiscan.causal_conv1d_update(**tensors | {"x": tensors["conv_state"][:, :, 0]})


def test_the_position_of_a_padding_row_is_not_looked_at(device):
    tensors = inputs.conv_update(batch=2, slots=3, circular=True, dtype=torch.float32, device=device)
    tensors["conv_state_indices"] = torch.tensor([-1, 2], device=device)
    tensors["cache_seqlens"] = torch.tensor([-1, 5], device=device)
    assert (oxiscan.causal_conv1d_update(**tensors)[0] == 0).all()
