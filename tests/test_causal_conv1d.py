"""causal_conv1d_fn."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import assert_close, compare, inputs, run
from oxiscan.testing.comparison import assert_equal, tolerance

OPTIONS = {"activation": "silu", "return_final_states": True}


def compare_conv(tensors, **options):
    return compare(oxiscan.causal_conv1d_fn, reference.causal_conv1d_fn, tensors, OPTIONS | options)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("channel_last", [False, True])
def test_every_dtype(dtype, seq_idx, channel_last, device):
    compare_conv(inputs.conv(seq_idx=seq_idx, channel_last=channel_last, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_parameters(dtype, device):
    compare_conv(inputs.conv(dtype=dtype, parameters=torch.float32, device=device))


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("seqlen", [0, 1, 2, 5, 127, 128, 129])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_width_and_seqlen(width, seqlen, seq_idx, exact, device):
    compare_conv(inputs.conv(width=width, seqlen=seqlen, dim=3, seq_idx=seq_idx, dtype=exact, device=device))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("dim", [1, 64, 65])
def test_batch_and_dim(batch, dim, exact, device):
    compare_conv(inputs.conv(batch=batch, dim=dim, seqlen=20, dtype=exact, device=device))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("return_final_states", [False, True])
@pytest.mark.parametrize("seqlen", [0, 131])
def test_options(activation, return_final_states, seqlen, exact, device):
    tensors = inputs.conv(optional=False, seqlen=seqlen, dtype=exact, device=device)
    compare_conv(tensors, activation=activation, return_final_states=return_final_states)


def test_matches_torch_conv1d(exact, device):
    tensors = inputs.conv(optional=False, dtype=exact, device=device)
    x, weight = tensors["x"], tensors["weight"]
    expected = torch.nn.functional.conv1d(x.double(), weight[:, None].double(), padding=3, groups=x.shape[1])
    assert_close("out", oxiscan.causal_conv1d_fn(x, weight), expected[..., : x.shape[2]], tolerance(exact, 1e-12))


@pytest.mark.parametrize("optional", [False, True])
def test_layout_of_the_result_is_that_of_x(optional, device):
    tensors = inputs.conv(channel_last=True, optional=optional, dtype=torch.float32, device=device)
    assert oxiscan.causal_conv1d_fn(**tensors).stride() == tensors["x"].stride()


def test_split_view_of_a_larger_tensor(exact, device):
    buffer = inputs.normal(2, 40, 100, dtype=exact, device=device)
    tensors = inputs.conv(dim=30, seqlen=40, dtype=exact, device=device)
    tensors["x"] = buffer[:, :, 13:43].transpose(1, 2)
    compare_conv(tensors)


def test_strided_inputs_and_gradients(exact, device):
    tensors = inputs.conv(dtype=exact, device=device)
    shape = tensors["x"].shape
    gradients = [inputs.normal(*shape, dtype=exact, device=device) for shape in (shape, (2, shape[1], 3))]
    dense = run(oxiscan.causal_conv1d_fn, tensors, OPTIONS, gradients)
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    view = run(oxiscan.causal_conv1d_fn, views, OPTIONS, [inputs.strided(g) for g in gradients])
    for name in ("dweight", "dbias"):  # sums over tokens, which go along lines of tokens in one layout only
        assert_close(name, view.pop(name), dense.pop(name), tolerance(exact, 1e-14, gradient=True))
    assert_equal(view, dense)


def test_expanded_gradient(exact, device):
    x = inputs.normal(2, 5, 9, dtype=exact, device=device).requires_grad_()
    weight = inputs.normal(5, 4, dtype=exact, device=device)
    oxiscan.causal_conv1d_fn(x, weight).sum().backward()
    expected = x.detach().requires_grad_()
    reference.causal_conv1d_fn(expected, weight).sum().backward()
    assert_close("dx", x.grad, expected.grad, tolerance(exact, 1e-12, gradient=True))


def test_negative_ids_give_zero_and_take_no_gradient(exact, device):
    tensors = inputs.conv(seqlen=30, dtype=exact, device=device)
    seq_idx = torch.zeros(2, 30, dtype=torch.int32, device=device)
    seq_idx[:, 10:14] = -1
    seq_idx[:, 14:] = 3
    tensors["seq_idx"] = seq_idx
    result = compare_conv(tensors)
    assert (result["out0"][:, :, 10:14] == 0).all()
    assert (result["dx"][:, :, 10:14] == 0).all()


def test_documents_do_not_leak(exact, device):
    tensors = inputs.conv(batch=1, seqlen=160, dim=5, dtype=exact, device=device)
    bounds = [0, 30, 32, 64, 127, 160]
    seq_idx = torch.zeros(1, 160, dtype=torch.int32, device=device)
    for document, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        seq_idx[:, begin:end] = document % 2
    tensors["seq_idx"] = seq_idx
    before = run(oxiscan.causal_conv1d_fn, tensors, OPTIONS)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        changed = tensors | {"x": tensors["x"].clone()}
        changed["x"][:, :, begin:end] += 1.0
        after = run(oxiscan.causal_conv1d_fn, changed, OPTIONS)
        for name in ("out0", "dx"):
            same = torch.ones(160, dtype=torch.bool)
            same[begin:end] = False
            assert torch.equal(before[name][:, :, same], after[name][:, :, same])
            assert not torch.equal(before[name][:, :, ~same], after[name][:, :, ~same])
        assert torch.equal(before["out1"], after["out1"]) == (end != 160)


@pytest.mark.parametrize("cut", [1, 2, 3, 60])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_two_calls_with_a_carried_state_equal_one(cut, seq_idx, exact, device):
    tensors = inputs.conv(dtype=exact, device=device)
    ids = inputs.documents(2, 131, device=device) if seq_idx else None
    if ids is not None:
        ids[:, cut - 1 : cut + 1] = 7  # the cut is inside a document, whose start the first call sees

    def two_calls(x, weight, bias, initial_states, activation, return_final_states):
        def call(part, states):
            return oxiscan.causal_conv1d_fn(
                x[..., part],
                weight,
                bias,
                None if ids is None else ids[:, part],
                states,
                return_final_states,
                activation=activation,
            )

        first = call(slice(0, cut), initial_states)
        second = call(slice(cut, None), first[1])
        return torch.cat([first[0], second[0]], dim=-1), second[1]

    once = run(oxiscan.causal_conv1d_fn, tensors, OPTIONS | {"seq_idx": ids})
    twice = run(two_calls, tensors, OPTIONS)
    for name, value in once.items():
        assert_close(name, twice[name], value, tolerance(exact, 1e-12, gradient=name.startswith("d")))


def test_final_states_out_is_written_and_differentiable(exact, device):
    tensors = inputs.conv(dtype=exact, device=device)
    x = tensors["x"].requires_grad_()
    buffer = torch.empty(2, 70, 3, dtype=exact, device=device)
    _, states = oxiscan.causal_conv1d_fn(x, tensors["weight"], return_final_states=True, final_states_out=buffer)
    assert states is buffer
    assert torch.equal(buffer, x[..., -3:])
    states.sum().backward()
    assert (x.grad[..., -3:] == 1).all() and (x.grad[..., :-3] == 0).all()


def test_bits_do_not_depend_on_run_batch_or_threads(device):
    tensors = inputs.conv(batch=3, seqlen=300, dtype=torch.float32, device=device)
    gradients = [torch.randn(3, 70, length).to(device) for length in (300, 3)]
    first = run(oxiscan.causal_conv1d_fn, tensors, OPTIONS, gradients)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = run(oxiscan.causal_conv1d_fn, tensors, OPTIONS, gradients)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = tensors | {name: tensors[name][1:2] for name in ("x", "initial_states")}
    single = run(oxiscan.causal_conv1d_fn, alone, OPTIONS, [g[1:2] for g in gradients])
    for name in ("out0", "out1", "dx", "dinitial_states"):
        assert torch.equal(first[name][1:2], single[name]), name


@pytest.mark.parametrize("op", [oxiscan.causal_conv1d_fn, reference.causal_conv1d_fn])
@pytest.mark.parametrize("seqlen", [2, 9])
def test_gradcheck(op, seqlen, float64, device):
    tensors = inputs.conv(batch=2, dim=2, seqlen=seqlen, dtype=float64, device=device)
    tensors["seq_idx"] = inputs.documents(2, seqlen, mean_length=4, device=device)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True)), **OPTIONS), tuple(leaves.values())
    )
