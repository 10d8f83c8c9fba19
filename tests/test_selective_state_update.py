"""selective_state_update, alone and against the scan."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, inputs
from oxiscan.testing.comparison import assert_equal, compare_in_place

WRITTEN = ("state", "intermediate_ssm_states")


def compare_update(tensors, **options):
    return compare_in_place(oxiscan.selective_state_update, reference.selective_state_update, tensors, options, WRITTEN)


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("seqlen", [None, 3])
def test_every_dtype(dtype, dt_softplus, seqlen, device):
    tensors = inputs.state_update(seqlen=seqlen, slots=6, intermediate=True, dtype=dtype, device=device)
    compare_update(tensors, dt_softplus=dt_softplus)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_and_state(dtype, device):
    compare_update(inputs.state_update(dtype=dtype, parameters=torch.float32, state=torch.float32, device=device))


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias"])
@pytest.mark.parametrize("seqlen", [None, 3])
def test_an_optional_argument_left_out(left_out, seqlen, exact, device):
    tensors = inputs.state_update(seqlen=seqlen, dtype=exact, device=device)
    del tensors[left_out]
    compare_update(tensors)


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"dim": 63}, {"dim": 64}, {"dim": 65, "dstate": 128}, {"ngroups": 1}, {"ngroups": 4}, {"dstate": 1}],
)
@pytest.mark.parametrize("seqlen", [None, 0, 1, 5])
def test_sizes(sizes, seqlen, exact, device):
    tensors = inputs.state_update(**sizes, seqlen=seqlen, slots=5, intermediate=True, dtype=exact, device=device)
    compare_update(tensors)


@pytest.mark.parametrize("seqlen", [None, 3])
def test_B_and_C_without_groups(seqlen, exact, device):
    compare_update(inputs.state_update(seqlen=seqlen, ngroups=None, dtype=exact, device=device))


@pytest.mark.parametrize("ngroups", [None, 1])
@pytest.mark.parametrize("dim", [5, 130])
def test_without_heads(ngroups, dim, exact, device):
    shape = {"nheads": None, "ngroups": ngroups, "dim": dim, "slots": 5, "intermediate": True}
    compare_update(inputs.state_update(**shape, dtype=exact, device=device))


def test_no_token_leaves_the_state_as_it_is(exact, device):
    tensors = inputs.state_update(seqlen=0, dtype=torch.float32, state=exact, device=device)
    before = tensors["state"].clone()
    assert oxiscan.selective_state_update(**tensors).shape == tensors["x"].shape
    assert torch.equal(tensors["state"], before)


def test_expanded_arguments_as_a_decoder_passes_them(device):
    # bfloat16 model: A alone is float32; one value a head of dt, A, D and dt_bias.
    tensors = inputs.state_update(seqlen=2, slots=5, intermediate=True, dtype=torch.bfloat16, device=device)
    tensors["A"] = tensors["A"].float()
    for name in ("dt", "D", "dt_bias"):
        tensors[name] = tensors[name][..., :1].expand_as(tensors[name])
    tensors["A"] = tensors["A"][:, :1, :1].expand_as(tensors["A"])
    compare_update(tensors, dt_softplus=True)


def test_every_input_expanded(exact, device):
    tensors = inputs.state_update(seqlen=3, dtype=exact, device=device)
    for name, tensor in tensors.items():
        if name not in WRITTEN:
            tensors[name] = tensor[(slice(1),) * tensor.dim()].expand_as(tensor)
    compare_update(tensors)


def test_strided_arguments(exact, device):
    tensors = inputs.state_update(seqlen=3, slots=5, intermediate=True, dtype=exact, device=device)
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    views["state_batch_indices"] = tensors["state_batch_indices"].repeat_interleave(2)[::2]
    outs = [oxiscan.selective_state_update(**arguments) for arguments in (tensors, views)]
    written = [{name: arguments[name] for name in WRITTEN} for arguments in (tensors, views)]
    assert_equal({"out": outs[1]} | written[1], {"out": outs[0]} | written[0])


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
def test_indices_reach_their_slots_and_no_other(indices, device):
    tensors = inputs.state_update(seqlen=2, slots=6, intermediate=True, dtype=torch.float32, device=device)
    tensors["state_batch_indices"] = torch.tensor([4, -1, 0], dtype=indices, device=device)
    used = [4, 0]
    for name in WRITTEN:
        tensors[name][[1, 2, 3, 5]] = float("nan")
    before = copies(tensors)
    out = oxiscan.selective_state_update(**tensors)
    assert (out[1] == 0).all()
    direct = {name: t[[0, 2]] for name, t in before.items() if name in ("x", "dt", "B", "C", "z")}
    direct |= {name: before[name] for name in ("A", "D", "dt_bias")} | {name: before[name][used] for name in WRITTEN}
    assert torch.equal(out[[0, 2]], oxiscan.selective_state_update(**direct))
    for name in WRITTEN:
        assert torch.equal(tensors[name][used], direct[name])
        assert tensors[name][[1, 2, 3, 5]].isnan().all()


def test_only_padding(device):
    tensors = inputs.state_update(slots=2, intermediate=True, dtype=torch.float32, device=device, batch=2)
    tensors["state_batch_indices"].fill_(-1)
    before = copies(tensors)
    assert (oxiscan.selective_state_update(**tensors) == 0).all()
    assert all(torch.equal(tensors[name], before[name]) for name in WRITTEN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_tokens_equal_one_by_one(dtype, device):
    tolerance = TOLERANCES[dtype][0]
    tensors = inputs.state_update(seqlen=7, slots=5, intermediate=True, dtype=dtype, device=device)
    single = copies(tensors)
    out = oxiscan.selective_state_update(**tensors)
    intermediate = single.pop("intermediate_ssm_states")
    slots = tensors["state_batch_indices"].long()
    for t in range(7):
        token = {name: single[name][:, t] for name in ("x", "dt", "B", "C", "z")}
        assert_close(f"out {t}", out[:, t], oxiscan.selective_state_update(**single | token), tolerance)
        intermediate[slots, t] = single["state"][slots]
    assert_close("state", tensors["state"], single["state"], tolerance)
    assert_close("intermediate_ssm_states", tensors["intermediate_ssm_states"], intermediate, tolerance)


def test_the_state_is_rounded_once_a_call(device):
    # At float32's tolerance: a state rounded to bfloat16 after each token would be off by 1e-3.
    tensors = inputs.state_update(seqlen=9, dtype=torch.float32, state=torch.bfloat16, device=device)
    compare_update(tensors)


def test_intermediate_states_in_a_dtype_of_their_own(exact, device):
    tensors = inputs.state_update(seqlen=4, state=exact, dtype=exact, device=device)
    tensors["intermediate_ssm_states"] = inputs.normal(3, 4, 4, 5, 7, dtype=torch.bfloat16, device=device)
    compare_update(tensors)
    last = tensors["intermediate_ssm_states"][:, -1]
    assert torch.equal(last, tensors["state"].float().bfloat16())


def test_bits_do_not_depend_on_run_batch_or_threads(device):
    shape = {"batch": 5, "seqlen": 3, "dim": 130, "intermediate": True}
    tensors = inputs.state_update(**shape, dtype=torch.float32, device=device)
    again, alone = copies(tensors), copies(tensors)
    alone = {name: t if name in ("A", "D", "dt_bias") else t[2:3] for name, t in alone.items()}
    out = oxiscan.selective_state_update(**tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(oxiscan.selective_state_update(**again), out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(oxiscan.selective_state_update(**alone), out[2:3])
    for name in WRITTEN:
        assert torch.equal(again[name], tensors[name])
        assert torch.equal(alone[name], tensors[name][2:3])


def test_the_result_carries_no_gradient(device):
    tensors = inputs.state_update(dtype=torch.float32, device=device)
    tensors["x"].requires_grad_()
    assert not oxiscan.selective_state_update(**tensors).requires_grad


def test_the_written_states_are_noticed_by_autograd(device):
    step = inputs.state_update(intermediate=True, dtype=torch.float32, device=device)
    loss = (torch.ones(7, device=device, requires_grad=True) * step["intermediate_ssm_states"]).sum()
    oxiscan.selective_state_update(**step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    tensors = inputs.ssd(seqlen=6, dtype=torch.float32, device=device)
    tensors["A"].requires_grad_()
    out = oxiscan.mamba_chunk_scan_combined(**tensors, chunk_size=8)
    step = inputs.state_update(batch=2, dim=8, dstate=12, dtype=torch.float32, device=device)
    oxiscan.selective_state_update(**step | {"state": tensors["initial_states"]})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7])
def test_steps_equal_the_scan(dtype, parameters, tokens, device):
    tensors = inputs.ssd(seqlen=70, dtype=dtype, parameters=parameters, D="elements", device=device)
    out, final_states = oxiscan.mamba_chunk_scan_combined(
        **tensors, chunk_size=16, dt_softplus=True, return_final_states=True
    )
    _, _, nheads, headdim = tensors["x"].shape
    dstate = tensors["B"].shape[-1]
    state = tensors["initial_states"].to(final_states.dtype, copy=True)
    steps = []
    for begin in range(0, 70, tokens):
        part = begin if tokens == 1 else slice(begin, begin + tokens)
        dt = tensors["dt"][:, part, :, None]
        step = oxiscan.selective_state_update(
            state,
            tensors["x"][:, part],
            dt.expand(*dt.shape[:-1], headdim),
            tensors["A"][:, None, None].expand(-1, headdim, dstate),
            tensors["B"][:, part],
            tensors["C"][:, part],
            tensors["D"],
            z=tensors["z"][:, part],
            dt_bias=tensors["dt_bias"][:, None].expand(-1, headdim),
            dt_softplus=True,
        )
        steps.append(step.unsqueeze(1) if tokens == 1 else step)
    assert_close("out", torch.cat(steps, dim=1), out, TOLERANCES[dtype][0])
    assert_close("state", state, final_states, TOLERANCES[final_states.dtype][0])


def test_written_states_that_share_memory_are_refused(device):
    tensors = inputs.state_update(batch=3, dtype=torch.float32, device=device)
    buffer = torch.zeros(4, *tensors["state"].shape[1:], device=device)
    shared = tensors | {"state": buffer[:3], "intermediate_ssm_states": buffer[1:].unsqueeze(1)}
    with pytest.raises(ValueError, match="intermediate_ssm_states: got memory that it shares with state"):
        oxiscan.selective_state_update(**shared)
    # Side by side in one pool they are apart.
    pool = torch.zeros(3, 2, *tensors["state"].shape[1:], device=device)
    oxiscan.selective_state_update(**tensors | {"state": pool[:, 0], "intermediate_ssm_states": pool[:, 1:]})
    assert torch.equal(pool[:, 0], pool[:, 1]) and pool.any()
