"""mamba_split_conv1d_scan_combined."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, compare, inputs, relative_rms, run
from oxiscan.testing.comparison import assert_equal, tolerance

OP, REFERENCE = oxiscan.mamba_split_conv1d_scan_combined, reference.mamba_split_conv1d_scan_combined
OPTIONS = {"chunk_size": 32, "ngroups": 2, "return_final_states": True, "return_final_conv_states": True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_float64_and_float32(dtype, norm, norm_before_gate, seq_idx, device):
    tensors = inputs.split_conv1d_scan(norm=norm, seq_idx=seq_idx, dtype=dtype, device=device)
    compare(OP, REFERENCE, tensors, OPTIONS | {"norm_before_gate": norm_before_gate})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_half_precision(dtype, norm, norm_before_gate, device):
    # The convolution's and the scan's results are tensors of x's dtype, so dA, a small sum of large terms, loses more
    # than one rounding. Its bound is what the same roundings cost in plain torch.
    tensors = inputs.split_conv1d_scan(norm=norm, dtype=dtype, parameters=torch.float32, device=device)
    options = OPTIONS | {"norm_before_gate": norm_before_gate}
    rounded = run(REFERENCE, tensors, options)["dA"]
    exact = run(REFERENCE, {k: t.double() for k, t in tensors.items()}, options)["dA"]
    bounds = {"dA": max(TOLERANCES[dtype][1], 1.15 * relative_rms(rounded, exact))}
    compare(OP, REFERENCE, tensors, options, bounds)


@pytest.mark.parametrize("batch", [0, 1])
def test_batch_and_negative_ids(batch, exact, device):
    tensors = inputs.split_conv1d_scan(batch=batch, seq_idx=True, dtype=exact, device=device)
    tensors["seq_idx"] -= 1
    compare(OP, REFERENCE, tensors, OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_run_or_batch(dtype, device):
    tensors = inputs.split_conv1d_scan(batch=3, norm=True, seq_idx=True, dtype=dtype, device=device)
    gradients = [
        torch.randn(3, 75, 32).to(device, dtype),
        torch.randn(3, 4, 8, 10).to(device),
        torch.randn(3, 72, 3).to(device, dtype),
    ]
    first, again = (run(OP, tensors, OPTIONS, gradients) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    by_sequence = ("zxbcdt", "initial_states", "initial_conv_states", "seq_idx")
    alone = {name: t[1:2] if name in by_sequence else t for name, t in tensors.items()}
    single = run(OP, alone, OPTIONS, [g[1:2] for g in gradients])
    for name in ("out0", "out1", "out2", "dzxbcdt", "dinitial_states", "dinitial_conv_states"):
        assert torch.equal(first[name][1:2], single[name]), name


@pytest.mark.parametrize("seqlen", [0, 1, 2, 3, 64, 65])
def test_seqlen(seqlen, exact, device):
    compare(OP, REFERENCE, inputs.split_conv1d_scan(seqlen=seqlen, dtype=exact, device=device), OPTIONS)


@pytest.mark.parametrize("norm", [False, True])
def test_output_projection(norm, exact, device):
    tensors = inputs.split_conv1d_scan(norm=norm, outproj=True, dtype=exact, device=device)
    compare(OP, REFERENCE, tensors, OPTIONS)


def test_float32_output_projection_of_a_narrower_result(device):
    tensors = inputs.split_conv1d_scan(outproj=True, dtype=torch.bfloat16, device=device)
    for name in ("outproj_weight", "outproj_bias"):
        tensors[name] = tensors[name].float()
    out = OP(**tensors, chunk_size=32, ngroups=2)
    assert out.dtype == torch.bfloat16
    assert_close("out", out, REFERENCE(**{k: t.double() for k, t in tensors.items()}, chunk_size=32, ngroups=2), 1.2e-2)


def test_output_projection_follows_autocast(device):
    tensors = inputs.split_conv1d_scan(outproj=True, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = OP(**tensors, chunk_size=32, ngroups=2)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"activation": None}, {"dt_limit": (0.1, 1.0)}, {"rmsnorm_eps": 0.1}])
def test_options(options, exact, device):
    tensors = inputs.split_conv1d_scan(norm=True, dtype=exact, device=device)
    compare(OP, REFERENCE, tensors, OPTIONS | options)


def test_D_by_head_and_no_states(exact, device):
    tensors = inputs.split_conv1d_scan(states=False, dtype=exact, device=device)
    tensors["D"] = tensors["D"][:, 0].clone()
    del tensors["conv1d_bias"]
    options = {"chunk_size": 32, "ngroups": 2, "headdim": 8, "conv1d_bias": None}
    result = compare(OP, REFERENCE, tensors, options)
    assert list(result)[:1] == ["out0"] and "out1" not in result


def test_seqlen_first_in_memory_needs_no_copy_and_gives_the_same(exact, device):
    tensors = inputs.split_conv1d_scan(norm=True, dtype=exact, device=device)
    gradient = inputs.normal(2, 75, 32, dtype=exact, device=device)
    options = {"chunk_size": 32, "ngroups": 2}
    dense = run(OP, tensors, options, [gradient])
    seqlen_first = tensors | {"zxbcdt": tensors["zxbcdt"].transpose(0, 1).contiguous().transpose(0, 1)}
    view = run(OP, seqlen_first, options, [inputs.strided(gradient)])
    assert_equal(view, dense)
    assert view["out0"].transpose(0, 1).is_contiguous()
    assert view["dzxbcdt"].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_gradient_through_one_output_alone(norm, output, exact, device):
    tensors = inputs.split_conv1d_scan(norm=norm, dtype=exact, device=device)

    def gradients(op):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        op(**leaves, **OPTIONS)[output].square().sum().backward()
        return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}

    expected = gradients(REFERENCE)
    for name, gradient in gradients(OP).items():
        assert_close(f"d{name}", gradient, expected[name], TOLERANCES[exact][1])


def test_documents_do_not_leak(exact, device):
    tensors = inputs.split_conv1d_scan(batch=1, seqlen=100, norm=True, dtype=exact, device=device)
    seq_idx = torch.zeros(1, 100, dtype=torch.int32, device=device)
    seq_idx[:, 37:70] = 1
    tensors["seq_idx"] = seq_idx
    before = run(OP, tensors, OPTIONS)
    changed = tensors | {"zxbcdt": tensors["zxbcdt"].clone()}
    changed["zxbcdt"][:, 37:70] += 1.0
    after = run(OP, changed, OPTIONS)
    for name in ("out0", "dzxbcdt"):
        for part in (slice(0, 37), slice(70, 100)):
            assert torch.equal(before[name][:, part], after[name][:, part])
        assert not torch.equal(before[name][:, 37:70], after[name][:, 37:70])
    for name in ("out1", "out2", "dinitial_states", "dinitial_conv_states"):
        assert torch.equal(before[name], after[name])


def test_carried_states_equal_one_call(exact, device):
    tensors = inputs.split_conv1d_scan(dtype=exact, device=device)
    once = OP(**tensors, **OPTIONS)
    zxbcdt = tensors.pop("zxbcdt")
    first = OP(zxbcdt[:, :41], **tensors, **OPTIONS)
    tensors |= {"initial_states": first[1], "initial_conv_states": first[2]}
    second = OP(zxbcdt[:, 41:], **tensors, **OPTIONS)
    assert_close("out", torch.cat([first[0], second[0]], dim=1), once[0], tolerance(exact, 1e-12))
    assert_close("final_states", second[1], once[1], tolerance(exact, 1e-12))
    assert torch.equal(second[2], once[2])


@pytest.mark.parametrize("op", [OP, REFERENCE])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(op, norm, float64, device):
    tensors = inputs.split_conv1d_scan(
        batch=1, seqlen=5, nheads=2, headdim=2, ngroups=1, dstate=2, norm=norm, dtype=float64, device=device
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32, device=device)
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True)), seq_idx=seq_idx, **OPTIONS | {"ngroups": 1}),
        tuple(leaves.values()),
    )
