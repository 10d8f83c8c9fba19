"""mamba_inner_fn against its composition of the references."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, compare, inputs, relative_rms, run
from oxiscan.testing.comparison import tolerance

OP, REFERENCE = oxiscan.mamba_inner_fn, reference.mamba_inner_fn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("given", ["", "B", "C", "BC"])
@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_float64_and_float32(dtype, norm, given, checkpoint_lvl, device):
    tensors = inputs.mamba_inner(norm=norm, given=given, dtype=dtype, device=device)
    compare(OP, REFERENCE, tensors, {"checkpoint_lvl": checkpoint_lvl})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision(dtype, parameters, norm, device):
    # Five results in a row are tensors of xz's dtype. Where that costs more than the tolerance of one op, the bound is
    # what the same roundings cost in plain torch.
    tensors = inputs.mamba_inner(norm=norm, dtype=dtype, parameters=parameters, device=device)
    rounded = run(REFERENCE, tensors, {})
    exact = run(REFERENCE, {k: t.double() for k, t in tensors.items()}, {})
    bounds = {
        name: max(TOLERANCES[dtype][name != "out0"], 1.15 * relative_rms(value, exact[name]))
        for name, value in rounded.items()
    }
    compare(OP, REFERENCE, tensors, {}, bounds)


@pytest.mark.parametrize("shape", ["(dim, dstate)", "(batch, dstate, seqlen)"])
@pytest.mark.parametrize("norm", [False, True])
def test_other_forms_of_given_B_and_C(shape, norm, exact, device):
    tensors = inputs.mamba_inner(given="BC", norm=norm, dtype=exact, device=device)
    for name in "BC":
        form = tensors[name][:, 0]
        if shape == "(dim, dstate)":
            form = form.flatten()[: 20 * 6].reshape(20, 6)
        tensors[name] = form.clone()
    compare(OP, REFERENCE, tensors, {})


@pytest.mark.parametrize("seqlen", [0, 1, 2, 65])
def test_seqlen(seqlen, exact, device):
    compare(OP, REFERENCE, inputs.mamba_inner(seqlen=seqlen, norm=True, dtype=exact, device=device), {})


@pytest.mark.parametrize("batch", [0, 1])
def test_batch(batch, exact, device):
    compare(OP, REFERENCE, inputs.mamba_inner(batch=batch, dtype=exact, device=device), {})


def test_no_optional_arguments(exact, device):
    tensors = inputs.mamba_inner(optional=False, dtype=exact, device=device)
    compare(OP, REFERENCE, tensors, {"conv1d_bias": None, "out_proj_bias": None})


@pytest.mark.parametrize("options", [{"delta_softplus": False}, {"b_c_dt_rms_eps": 0.1}])
def test_options(options, exact, device):
    tensors = inputs.mamba_inner(norm=True, dtype=exact, device=device)
    tensors["A"] *= 0.1  # a negative delta makes the state grow
    compare(OP, REFERENCE, tensors, options)


def test_a_convolution_weight_of_two_dimensions(exact, device):
    tensors = inputs.mamba_inner(dtype=exact, device=device)
    expected = run(OP, tensors, {})
    flat = run(OP, tensors | {"conv1d_weight": tensors["conv1d_weight"].squeeze(1)}, {})
    expected["dconv1d_weight"] = expected["dconv1d_weight"].squeeze(1)
    assert all(torch.equal(expected[name], flat[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["", "B"])
def test_checkpointing_changes_no_bit_and_keeps_less(dtype, given, device):
    tensors = inputs.mamba_inner(norm=True, given=given, dtype=dtype, device=device)
    results = [run(OP, tensors, {"checkpoint_lvl": level}) for level in (0, 1)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def kept(level):
        inside = {t.untyped_storage().data_ptr() for t in tensors.values()}
        sizes = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in inside:
                sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            OP(**{name: t.detach().requires_grad_() for name, t in tensors.items()}, checkpoint_lvl=level)
        return sum(sizes)

    scan_result = tensors["xz"].nbytes // 2
    assert kept(1) < 2 * scan_result < kept(0)


def test_strided_inputs_and_gradients(exact, device):
    tensors = inputs.mamba_inner(norm=True, dtype=exact, device=device)
    gradient = torch.randn(2, 75, 5, dtype=exact, device=device)
    dense = run(OP, tensors, {}, [gradient])
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    view = run(OP, views, {}, [inputs.strided(gradient)])
    for name, value in dense.items():
        assert_close(
            name, view[name], value, tolerance(exact, 1e-12, gradient=name != "out0")
        )  # torch's products may sum in another order


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_autocast(checkpoint_lvl, device):
    tensors = inputs.mamba_inner(norm=True, dtype=torch.float32, device=device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = OP(**leaves, checkpoint_lvl=checkpoint_lvl)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    expected = REFERENCE(**exact)
    expected.square().sum().backward()
    assert_close("out", out, expected, 2e-2)
    # The projections round, the scan and the norms do not.
    assert 1e-3 < relative_rms(out, expected)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert_close(f"d{name}", leaf.grad, exact[name].grad, 6e-2)


def test_the_dtype_of_a_narrow_result_under_a_wider_weight(device):
    tensors = inputs.mamba_inner(dtype=torch.bfloat16, parameters=torch.float32, device=device)
    assert OP(**tensors).dtype == torch.bfloat16


def test_sequences_do_not_depend_on_each_other(exact, device):
    tensors = inputs.mamba_inner(batch=3, dtype=exact, device=device)
    out = OP(**tensors)
    alone = OP(**tensors | {"xz": tensors["xz"][1:2]})
    assert_close("out", alone, out[1:2], tolerance(exact, 1e-13))


@pytest.mark.parametrize("op", [OP, REFERENCE])
@pytest.mark.parametrize("given", ["", "BC"])
def test_gradcheck(op, given, float64, device):
    tensors = inputs.mamba_inner(
        batch=1, seqlen=5, dim=4, dstate=2, delta_rank=2, norm=True, given=given, dtype=float64, device=device
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True))), tuple(leaves.values()), fast_mode=op is OP
    )


@pytest.mark.parametrize("norm", [False, True])
def test_a_given_B_that_does_not_fit_is_named(norm, device):
    tensors = inputs.mamba_inner(given="B", norm=norm, dtype=torch.float32, device=device)
    for B, error in (
        (torch.ones(4, device=device), ValueError),
        ([1], TypeError),
        (tensors["B"][:, :, :-1], ValueError),
    ):
        with pytest.raises(error, match="^B: got"):
            oxiscan.mamba_inner_fn(**tensors | {"B": B})


def test_an_error_that_is_kept_changes_no_later_backward(device):
    tensors = inputs.mamba_inner(dtype=torch.float32, device=device)
    tensors["xz"].requires_grad_()
    with pytest.raises(ValueError, match="^D: got shape") as kept:
        OP(**tensors | {"D": tensors["D"][:-1]})
    leaf = torch.ones(3, device=device, requires_grad=True)
    leaf.exp().sum().backward()
    assert torch.equal(leaf.grad, leaf.exp()) and kept.value is not None
