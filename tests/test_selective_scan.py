"""selective_scan_fn against the token-by-token recurrence."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, compare, inputs, run, seeded_gradients
from oxiscan.testing.comparison import assert_equal, tolerance

OP, REFERENCE = oxiscan.selective_scan_fn, reference.selective_scan_fn
OPTIONS = {"delta_softplus": True, "return_last_state": True}
PACKED = OPTIONS | {"return_varlen_states": True}
BY_TOKEN = ("u", "delta", "z", "B", "C")
CHANNELS = ("A", "D", "delta_bias")


def compare_scan(tensors, **options):
    return compare(OP, REFERENCE, tensors, OPTIONS | options)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("fixed", ["", "B", "C", "BC"])
def test_every_dtype(dtype, seq_idx, fixed, device):
    compare_scan(inputs.selective_scan(fixed=fixed, seq_idx=seq_idx, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_float32_parameters(dtype, fixed, device):
    compare_scan(inputs.selective_scan(fixed=fixed, dtype=dtype, parameters=torch.float32, device=device))


def test_float32_delta_alone(device):
    tensors = inputs.selective_scan(dtype=torch.bfloat16, device=device)
    compare_scan(tensors | {"delta": tensors["delta"].float()})


@pytest.mark.parametrize("seqlen", [0, 1, 2, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_seqlen(seqlen, seq_idx, exact, device):
    compare_scan(inputs.selective_scan(seqlen=seqlen, seq_idx=seq_idx, dtype=exact, device=device))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_batch(batch, fixed, exact, device):
    compare_scan(inputs.selective_scan(batch=batch, fixed=fixed, dtype=exact, device=device))


@pytest.mark.parametrize(
    ("dim", "ngroups", "dstate"),
    [(1, 1, 1), (16, 1, 16), (17, 1, 3), (6, 6, 2), (96, 3, 5), (150, 1, 4), (3, None, 256)],
)
def test_sizes(dim, ngroups, dstate, exact, device):
    shape = {"dim": dim, "ngroups": ngroups, "dstate": dstate}
    compare_scan(inputs.selective_scan(seqlen=70, **shape, dtype=exact, device=device))


@pytest.mark.parametrize("fixed", ["B", "C"])
def test_one_fixed_beside_one_without_groups(fixed, exact, device):
    compare_scan(inputs.selective_scan(ngroups=None, fixed=fixed, dtype=exact, device=device))


def test_without_groups_beside_one_group(exact, device):
    tensors = inputs.selective_scan(ngroups=1, dtype=exact, device=device)
    compare_scan(tensors | {"B": tensors["B"][:, 0]})


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state"])
def test_an_optional_argument_left_out(left_out, exact, device):
    tensors = inputs.selective_scan(seq_idx=True, dtype=exact, device=device)
    del tensors[left_out]
    compare_scan(tensors)


def test_no_optional_arguments(exact, device):
    tensors = inputs.selective_scan(optional=False, dtype=exact, device=device)
    tensors["delta"] = tensors["delta"].abs()
    result = compare_scan(tensors, delta_softplus=False, return_last_state=False)
    assert "out1" not in result


@pytest.mark.parametrize("fixed", ["", "BC"])
def test_strided_inputs_and_gradients(fixed, exact, device):
    tensors = inputs.selective_scan(seqlen=70, fixed=fixed, seq_idx=True, dtype=exact, device=device)
    dense = run(OP, tensors, OPTIONS)
    gradients = seeded_gradients([dense["out0"], dense["out1"]])
    seq_idx = tensors.pop("seq_idx")
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    views["seq_idx"] = seq_idx.repeat(1, 2)[:, : seq_idx.shape[1]]
    view = run(OP, views, OPTIONS, [inputs.strided(gradient) for gradient in gradients])
    assert_equal(view, dense)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_channels_innermost_in_memory(dtype, device):
    tensors = inputs.selective_scan(dtype=dtype, device=device)
    dense = run(OP, tensors, OPTIONS)
    views = {
        name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if name in BY_TOKEN else t
        for name, t in tensors.items()
    }
    view = run(OP, views, OPTIONS)
    assert_equal(view, dense)
    assert view["out0"].transpose(1, 2).is_contiguous()


def test_expanded_inputs_and_gradients(exact, device):
    tensors = inputs.selective_scan(batch=1, seqlen=20, dtype=exact, device=device)
    for name in ("u", "delta", "B", "initial_state"):
        tensors[name] = tensors[name].expand(2, *tensors[name].shape[1:])
    for name in ("C", "z"):
        tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1))
    tensors["A"] = tensors["A"][:, :1].expand(-1, tensors["A"].shape[1])
    tensors["D"] = tensors["D"][:1].expand(tensors["D"].shape)
    compare_scan(tensors)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    OP(**leaves).sum().backward()
    expected = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    REFERENCE(**expected).sum().backward()
    assert_close("du", leaves["u"].grad, expected["u"].grad, TOLERANCES[exact][1])


@pytest.mark.parametrize("use", [0, 1, 2])
def test_gradient_through_one_output_alone(use, exact, device):
    tensors = inputs.selective_scan(
        batch=1, seqlen=80, lengths=(0, 30, 0, 41), seq_idx=True, dtype=exact, device=device
    )

    def gradients(op):
        leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
        op(**leaves, **PACKED)[use].square().sum().backward()
        return {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items() if t.requires_grad}

    expected = gradients(REFERENCE)
    for name, gradient in gradients(OP).items():
        assert_close(f"d{name}", gradient, expected[name], TOLERANCES[exact][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [30.0, 1e4])
def test_strong_decay_is_finite_and_accurate(dtype, decay, device):
    compare_scan(inputs.selective_scan(dtype=dtype, parameters=torch.float32, decay=decay, device=device))


def test_strong_decay_mixed_with_weak_tokens(device):
    tensors = inputs.selective_scan(seqlen=200, dtype=torch.float32, device=device)
    tensors["delta"] = torch.where(torch.rand_like(tensors["delta"]) < 0.2, 50.0, -6.0)
    compare_scan(tensors)


@pytest.mark.parametrize("decay", [0.01, 1.0])
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_a_long_sequence_in_float32(decay, fixed, device):
    compare_scan(
        inputs.selective_scan(batch=1, seqlen=2000, fixed=fixed, decay=decay, dtype=torch.float32, device=device)
    )


def test_no_decay_at_all(exact, device):
    compare_scan(inputs.selective_scan(dtype=exact, decay=0.0, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softplus_above_its_linear_bound(dtype, device):
    tensors = inputs.selective_scan(seqlen=20, dtype=dtype, decay=0.01, device=device)
    compare_scan(tensors | {"delta": tensors["delta"] + 20.0})


def test_softplus_of_large_negative_values(device):
    # delta from 1e-9 to 1e-5: 1 - exp(-delta), another form of softplus' derivative, would lose all digits.
    tensors = inputs.selective_scan(dtype=torch.float32, device=device)
    compare_scan(tensors | {"delta": tensors["delta"] - 16.0})


def test_negative_ids_are_documents_like_any_other(exact, device):
    tensors = inputs.selective_scan(seq_idx=True, dtype=exact, device=device)
    compare_scan(tensors | {"seq_idx": tensors["seq_idx"] - 1})


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_nan_stays_in_its_document(name, device):
    tensors = inputs.selective_scan(batch=1, seqlen=160, dtype=torch.float32, device=device)
    seq_idx = torch.zeros(1, 160, dtype=torch.int32, device=device)
    seq_idx[:, 30:100] = 1  # the first document's id comes back: still another document
    tensors["seq_idx"] = seq_idx
    before = run(OP, tensors, OPTIONS)
    changed = tensors | {name: tensors[name].clone()}
    changed[name][..., 70] = float("nan")
    after = run(OP, changed, OPTIONS)
    assert after["out0"][..., 70].isnan().any()
    for result in ("out0", *(f"d{name}" for name in BY_TOKEN)):
        for part in (slice(0, 30), slice(100, 160)):
            assert torch.equal(before[result][..., part], after[result][..., part]), result
    for result in ("out1", "dinitial_state"):
        assert torch.equal(before[result], after[result]), result


@pytest.mark.parametrize(
    "lengths",
    [(80,), (0,), (30, 50), (30, 20), (0, 1, 0, 0, 64, 15, 0), (0, 0, 65), (1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("initial", ["none", "first", "each"])
def test_cu_seqlens(lengths, seq_idx, initial, exact, device):
    tensors = inputs.selective_scan(batch=1, seqlen=80, lengths=lengths, seq_idx=seq_idx, dtype=exact, device=device)
    if initial == "none":
        del tensors["initial_state"]
    elif initial == "first":
        tensors["initial_state"] = tensors["initial_state"][:1].clone()
    result = compare_scan(tensors, return_varlen_states=True)
    assert result["out2"].shape[0] == len(lengths)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_cu_seqlens_in_every_dtype(dtype, device):
    tensors = inputs.selective_scan(batch=1, lengths=(0, 70, 20), dtype=dtype, device=device)
    tensors["cu_seqlens"] = tensors["cu_seqlens"].long()
    compare_scan(tensors, return_varlen_states=True)
    compare_scan(tensors, return_last_state=False, return_varlen_states=True)


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_cu_seqlens_without_tokens(lengths, exact, device):
    tensors = inputs.selective_scan(batch=1, seqlen=0, lengths=lengths, dtype=exact, device=device)
    result = compare_scan(tensors, return_varlen_states=True)
    assert torch.equal(result["out1"], tensors["initial_state"][:1])
    assert torch.equal(result["out2"], tensors["initial_state"])


def test_packed_documents_equal_documents_alone(device):
    lengths = (1, 69, 27)
    tensors = inputs.selective_scan(batch=1, lengths=lengths, dtype=torch.float32, device=device)
    bounds = tensors.pop("cu_seqlens")
    packed = OP(**tensors, cu_seqlens=bounds, **PACKED)
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = {name: t[..., begin:end] if name in BY_TOKEN else t for name, t in tensors.items()}
        part["initial_state"] = tensors["initial_state"][i : i + 1]
        out, state = OP(**part, **OPTIONS)
        assert torch.equal(packed[0][..., begin:end], out)
        assert torch.equal(packed[2][i : i + 1], state)
    assert torch.equal(packed[1], packed[2][-1:])


@pytest.mark.parametrize("cut", [1, 50, 64, 96])
def test_two_calls_with_a_carried_state_equal_one(cut, exact, device):
    tensors = inputs.selective_scan(dtype=exact, device=device)

    def two_calls(initial_state, **tensors):
        options = {"delta_softplus": True, "return_last_state": True}
        del tensors["delta_softplus"], tensors["return_last_state"]
        halves = [
            {name: t[..., tokens] if name in BY_TOKEN else t for name, t in tensors.items()}
            for tokens in (slice(0, cut), slice(cut, None))
        ]
        first, state = OP(**halves[0], initial_state=initial_state, **options)
        second, state = OP(**halves[1], initial_state=state, **options)
        return torch.cat([first, second], dim=-1), state

    once, twice = run(OP, tensors, OPTIONS), run(two_calls, tensors, OPTIONS)
    for name, value in once.items():
        assert_close(name, twice[name], value, tolerance(exact, 1e-11, gradient=name.startswith("d")))


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_steps_equal_the_scan(dtype, device):
    tensors = inputs.selective_scan(ngroups=None, seqlen=70, dtype=dtype, device=device)
    out, last_state = OP(**tensors, **OPTIONS)
    state = tensors["initial_state"].to(last_state.dtype, copy=True)
    steps = []
    for t in range(70):
        u, delta, B, C, z = (tensors[name][..., t] for name in ("u", "delta", "B", "C", "z"))
        parameters = {"D": tensors["D"], "dt_bias": tensors["delta_bias"], "dt_softplus": True}
        steps.append(oxiscan.selective_state_update(state, u, delta, tensors["A"], B, C, z=z, **parameters))
    allowed = 1e-10 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-3
    assert_close("out", torch.stack(steps, dim=-1), out, allowed)
    assert_close("state", state, last_state, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_bits_do_not_depend_on_run_batch_or_threads(dtype, fixed, device):
    # 150 channels: more than one part of a sequence in backward.
    tensors = inputs.selective_scan(batch=3, dim=150, fixed=fixed, seq_idx=True, dtype=dtype, device=device)
    first = run(OP, tensors, OPTIONS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = run(OP, tensors, OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in first)
    shared = (*CHANNELS, *fixed)
    alone = {name: t if name in shared else t[1:2] for name, t in tensors.items()}
    gradients = seeded_gradients([first["out0"], first["out1"]])
    single = run(OP, alone, OPTIONS, [g[1:2] for g in gradients])
    for name in single:
        if name[1:] not in shared:
            assert torch.equal(first[name][1:2], single[name]), name


@pytest.mark.parametrize("op", [OP, REFERENCE])
@pytest.mark.parametrize("fixed", ["", "B", "C", "BC"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(op, fixed, packed, float64, device):
    seqlen = 67 if op is OP else 7
    tensors = inputs.selective_scan(
        batch=1,
        seqlen=seqlen,
        dim=2,
        ngroups=1,
        dstate=2,
        fixed=fixed,
        lengths=(0, 1, seqlen - 2) if packed else None,
        dtype=float64,
        device=device,
    )
    tensors["seq_idx"] = inputs.documents(1, seqlen, mean_length=5, device=device)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    options = PACKED if packed else OPTIONS
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True)), **options),
        tuple(leaves.values()),
        fast_mode=op is OP,
    )


def test_a_state_that_nearly_stays_is_accurate(device):
    # delta A of -1e-4: a decay rounded to float32 would be off by 3e-4 of what it forgets, the same way at every token.
    tensors = inputs.selective_scan(batch=1, dim=3, seqlen=6000, dstate=2, optional=False, ngroups=1,
                                    dtype=torch.float32, device=device)  # fmt: skip
    tensors["delta"].fill_(1e-4)
    tensors["A"] = tensors["A"].abs().neg() - 0.5
    compare(oxiscan.selective_scan_fn, reference.selective_scan_fn, tensors, {"return_last_state": True},
            {name: 5e-6 for name in ("out0", "out1", "du", "ddelta", "dA", "dB", "dC")})  # fmt: skip
