"""mamba_chunk_scan_combined against the token-by-token recurrence."""

import itertools
from functools import partial

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, compare, inputs, run, seeded_gradients
from oxiscan.testing.comparison import assert_equal, tolerance

OPTIONS = {"chunk_size": 64, "dt_softplus": True, "return_final_states": True}

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
#: Sizes that CUDA has one kernel for in these dtypes, and sizes that it has another for.
SIZES = pytest.mark.parametrize(("headdim", "dstate"), [(8, 12), (64, 128)])
#: A call for each of its kernels: the dtype, `exact` where None, and such sizes.
KERNELS = pytest.mark.parametrize(
    ("dtype", "headdim", "dstate"), [(None, 8, 12), (torch.bfloat16, 8, 12), (torch.bfloat16, 64, 128)]
)
#: Results that go with a token.
BY_TOKEN = {"out0", "dx", "ddt", "dB", "dC", "dz"}


def compare_ssd(tensors, **options):
    return compare(oxiscan.mamba_chunk_scan_combined, reference.mamba_chunk_scan_combined, tensors, OPTIONS | options)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("seq_idx", [False, True])
def test_every_dtype(dtype, seq_idx, device):
    compare_ssd(inputs.ssd(seqlen=150, seq_idx=seq_idx, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_parameters(dtype, device):
    compare_ssd(inputs.ssd(dtype=dtype, parameters=torch.float32, device=device))


@pytest.mark.parametrize("seqlen", [0, 1, 2, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_seqlen(seqlen, seq_idx, exact, device):
    compare_ssd(inputs.ssd(seqlen=seqlen, seq_idx=seq_idx, dtype=exact, device=device))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(batch, exact, device):
    compare_ssd(inputs.ssd(batch=batch, seqlen=70, dtype=exact, device=device))


@pytest.mark.parametrize(
    ("nheads", "ngroups", "headdim", "dstate"),
    [(1, 1, 1, 1), (3, 1, 64, 128), (6, 3, 80, 16), (4, 4, 5, 7), (8, 2, 96, 33)],
)
def test_sizes(nheads, ngroups, headdim, dstate, exact, device):
    shape = {"nheads": nheads, "ngroups": ngroups, "headdim": headdim, "dstate": dstate}
    compare_ssd(inputs.ssd(batch=1, seqlen=70, **shape, dtype=exact, device=device))


@HALF
@pytest.mark.parametrize(
    ("headdim", "dstate"),
    [*itertools.product((64, 80, 96, 128), (64, 128, 256)), (1, 1), (8, 12), (100, 200), (256, 33)],
)
def test_sizes_in_half_precision(headdim, dstate, dtype, device):
    shape = {"batch": 1, "nheads": 2, "ngroups": 1, "headdim": headdim, "dstate": dstate}
    compare_ssd(inputs.ssd(seqlen=150, seq_idx=True, **shape, dtype=dtype, device=device))


@pytest.mark.parametrize("headdim", [5, 64])
@pytest.mark.parametrize("dstate", [16, 33, 100, 256])
def test_sizes_in_float32(headdim, dstate, device):
    shape = {"batch": 1, "nheads": 2, "ngroups": 1, "headdim": headdim, "dstate": dstate}
    compare_ssd(inputs.ssd(seqlen=150, seq_idx=True, **shape, dtype=torch.float32, device=device))


@SIZES
@pytest.mark.parametrize("seqlen", [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_seqlen_in_bfloat16(headdim, dstate, seqlen, seq_idx, device):
    shape = {"batch": 2, "nheads": 2, "headdim": headdim, "dstate": dstate}
    compare_ssd(inputs.ssd(seqlen=seqlen, seq_idx=seq_idx, **shape, dtype=torch.bfloat16, device=device))


@HALF
@SIZES
@pytest.mark.parametrize("D", ["heads", "elements", None])
@pytest.mark.parametrize("z", [False, True])
def test_D_and_z_in_half_precision(D, z, headdim, dstate, dtype, device):
    shape = {"batch": 1, "seqlen": 70, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(D=D or "heads", **shape, dtype=dtype, parameters=torch.float32, device=device)
    left_out = {name for name, given in (("D", D), ("z", z)) if not given}
    tensors = {name: t for name, t in tensors.items() if name not in left_out}
    compare_ssd(tensors)
    compare_ssd(tensors, dt_limit=(0.3, 1.1))


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_states"])
def test_an_optional_argument_left_out(left_out, exact, device):
    tensors = inputs.ssd(seq_idx=True, dtype=exact, device=device)
    del tensors[left_out]
    compare_ssd(tensors)


def test_no_optional_arguments(exact, device):
    tensors = inputs.ssd(optional=False, dtype=exact, device=device)
    tensors["dt"] = tensors["dt"].abs()
    compare_ssd(tensors, dt_softplus=False, return_final_states=False)


def test_D_by_element(exact, device):
    compare_ssd(inputs.ssd(D="elements", dtype=exact, device=device))


def test_dt_limit_clamps_after_softplus_and_stops_the_gradient(exact, device):
    tensors = inputs.ssd(dtype=exact, device=device)
    result = compare_ssd(tensors, dt_limit=(0.3, 1.1))
    dt = torch.nn.functional.softplus(tensors["dt"] + tensors["dt_bias"])
    clamped = (dt < 0.3) | (dt > 1.1)
    assert 0 < clamped.sum() < clamped.numel()
    assert (result["ddt"][clamped] == 0).all()
    assert (result["ddt"][~clamped] != 0).all()


def test_strided_inputs_and_gradients(exact, device):
    tensors = inputs.ssd(seqlen=70, seq_idx=True, dtype=exact, device=device)
    dense = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS)
    gradients = [torch.randn_like(dense["out0"]), torch.randn_like(dense["out1"])]
    dense = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS, gradients)
    seq_idx = tensors.pop("seq_idx")
    views = {name: inputs.strided(tensor) for name, tensor in tensors.items()}
    views["seq_idx"] = seq_idx.repeat(1, 2)[:, : seq_idx.shape[1]]
    gradients = [inputs.strided(gradient) for gradient in gradients]
    view = run(oxiscan.mamba_chunk_scan_combined, views, OPTIONS, gradients)
    assert_equal(view, dense)


def test_expanded_inputs_and_gradients(exact, device):
    tensors = inputs.ssd(batch=1, seqlen=20, dtype=exact, device=device)
    for name in ("x", "dt", "B"):
        tensors[name] = tensors[name].expand(2, *tensors[name].shape[1:])
    for name in ("C", "z", "initial_states"):
        tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1))
    compare_ssd(tensors)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    oxiscan.mamba_chunk_scan_combined(**leaves, chunk_size=8).sum().backward()
    expected = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    reference.mamba_chunk_scan_combined(**expected, chunk_size=8).sum().backward()
    assert_close("dx", leaves["x"].grad, expected["x"].grad, TOLERANCES[exact][1])


def shifted(tensor, elements):
    """The same values, so many elements past where memory was allocated."""
    return tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape).copy_(tensor)


def between_others(tensor, elements):
    """The same values, a part of rows that are so many elements longer at either end."""
    *shape, dim = tensor.shape
    return tensor.new_empty(*shape, elements + dim + elements)[..., elements:][..., :dim].copy_(tensor)


def expanded(tensor):
    """Other values: the first element's along the first and the last but one dimension (of heads, of groups)."""
    return tensor[:1].narrow(-2, 0, 1).expand_as(tensor) if tensor.dim() > 1 else tensor[:1].expand_as(tensor)


#: CUDA copies rows in packs as large as their alignment allows.
VIEWS = {
    "1 element off": partial(shifted, elements=1),
    "4 elements off": partial(shifted, elements=4),
    "between 3 others": partial(between_others, elements=3),
    "between 8 others": partial(between_others, elements=8),
    "expanded": expanded,
    **{layout: partial(inputs.laid_out, layout=layout) for layout in inputs.LAYOUTS if layout != "contiguous"},
}


@SIZES
@pytest.mark.parametrize("view", VIEWS)
def test_views_in_bfloat16(view, headdim, dstate, device):
    shape = {"seqlen": 70, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(**shape, D="elements", seq_idx=True, dtype=torch.bfloat16, device=device)
    for changed in (("x",), ("B",), ("C",), ("z",), tuple(tensors)):
        views = {n: VIEWS[view](t) if n in changed and n != "seq_idx" else t for n, t in tensors.items()}
        compare_ssd(views)


@HALF
@pytest.mark.parametrize("elements", [1, 4])
def test_alignment_changes_nothing_but_roundings(elements, dtype, device):
    """On CUDA these are two kernels."""
    tensors = inputs.ssd(seqlen=200, headdim=64, dstate=128, seq_idx=True, dtype=dtype, device=device)
    aligned = compare_ssd(tensors)
    unaligned = compare_ssd(tensors | {name: shifted(tensors[name], elements) for name in ("x", "B", "C", "z")})
    for name, value in aligned.items():
        assert_close(name, unaligned[name], value, tolerance(dtype, 0.0, gradient=name.startswith("d")))


@pytest.mark.parametrize("use", ["out", "final_states"])
def test_gradient_through_one_output_alone(use, exact, device):
    tensors = inputs.ssd(seq_idx=True, dtype=exact, device=device)

    def loss(op):
        leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
        out, final_states = op(**leaves, **OPTIONS)
        (out if use == "out" else final_states).square().sum().backward()
        return {k: t.grad for k, t in leaves.items() if t.requires_grad}

    actual, expected = loss(oxiscan.mamba_chunk_scan_combined), loss(reference.mamba_chunk_scan_combined)
    for name, gradient in actual.items():
        wanted = expected[name]
        assert_close(
            f"d{name}", gradient, torch.zeros_like(gradient) if wanted is None else wanted, TOLERANCES[exact][1]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [30.0, 1e4])
@SIZES
def test_strong_decay_is_finite_and_accurate(dtype, decay, headdim, dstate, device):
    shape = {"seqlen": 200, "headdim": headdim, "dstate": dstate}
    compare_ssd(inputs.ssd(**shape, dtype=dtype, parameters=torch.float32, decay=decay, device=device))


def test_strong_decay_mixed_with_weak_tokens(device):
    # dt from 1e-4 to 1e2 in one tile: decay sums of thousands, of which neighbours differ by little.
    tensors = inputs.ssd(seqlen=200, dtype=torch.float32, device=device)
    tensors["dt"] = torch.where(torch.rand_like(tensors["dt"]) < 0.2, 50.0, -6.0)
    compare_ssd(tensors)


def test_no_decay_at_all(exact, device):
    tensors = inputs.ssd(dtype=exact, decay=0.0, device=device)
    compare_ssd(tensors)


def test_a_nan_in_dt_is_not_clamped_away(device):
    tensors = inputs.ssd(batch=1, nheads=2, ngroups=1, dtype=torch.float32, device=device)
    tensors["dt"][0, 40, 0] = float("nan")
    out = oxiscan.mamba_chunk_scan_combined(**tensors, **OPTIONS)[0]
    assert out[0, :40].isfinite().all() and out[0, :, 1].isfinite().all()
    assert out[0, 40:, 0].isnan().all()


@KERNELS
def test_documents_do_not_leak(dtype, headdim, dstate, exact, device):
    tensors = inputs.ssd(batch=1, seqlen=160, headdim=headdim, dstate=dstate, dtype=dtype or exact, device=device)
    bounds = [0, 30, 64, 101, 160]
    seq_idx = torch.zeros(1, 160, dtype=torch.int32, device=device)
    for document, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        seq_idx[:, begin:end] = document % 2  # ids come back: still another document
    tensors["seq_idx"] = seq_idx
    before = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in ("x", "dt", "B", "C", "z"):
            changed[name][:, begin:end] += 1.0
        after = run(oxiscan.mamba_chunk_scan_combined, changed, OPTIONS)
        for name in BY_TOKEN:
            same = torch.ones(160, dtype=torch.bool)
            same[begin:end] = False
            assert torch.equal(before[name][:, same], after[name][:, same]), name
            assert not torch.equal(before[name][:, ~same], after[name][:, ~same]), name
        assert torch.equal(before["out1"], after["out1"]) == (end != 160)
        assert torch.equal(before["dinitial_states"], after["dinitial_states"]) == (begin != 0)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@KERNELS
def test_a_nan_stays_in_its_document(name, dtype, headdim, dstate, device):
    shape = {"batch": 1, "seqlen": 160, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(**shape, dtype=dtype or torch.float32, device=device)
    seq_idx = torch.zeros(1, 160, dtype=torch.int32, device=device)
    seq_idx[:, 30:100] = 1
    tensors["seq_idx"] = seq_idx
    before = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS)
    changed = tensors | {name: tensors[name].clone()}
    changed[name][:, 70] = float("nan")
    after = run(oxiscan.mamba_chunk_scan_combined, changed, OPTIONS)
    assert after["out0"][:, 70].isnan().any()
    for result in BY_TOKEN:
        for part in (slice(0, 30), slice(100, 160)):
            assert torch.equal(before[result][:, part], after[result][:, part]), result
    for result in ("out1", "dinitial_states"):
        assert torch.equal(before[result], after[result]), result


def test_negative_ids_are_documents_like_any_other(exact, device):
    tensors = inputs.ssd(seqlen=80, seq_idx=True, dtype=exact, device=device)
    tensors["seq_idx"] -= 1
    compare_ssd(tensors)


def test_softplus_above_its_linear_bound(exact, device):
    tensors = inputs.ssd(seqlen=20, dtype=exact, decay=0.01, device=device)
    tensors["dt"] = tensors["dt"] + 20.0
    compare_ssd(tensors)


@KERNELS
def test_packed_documents_equal_documents_alone(dtype, headdim, dstate, exact, device):
    shape = {"batch": 1, "seqlen": 150, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(**shape, optional=False, dtype=dtype or exact, device=device)
    bounds = [0, 1, 70, 150]
    seq_idx = torch.zeros(1, 150, dtype=torch.int32, device=device)
    for document, (begin, end) in enumerate(itertools.pairwise(bounds)):
        seq_idx[:, begin:end] = document
    dout, dfinal_states = torch.randn_like(tensors["x"]), torch.randn(1, 4, headdim, dstate, device=device)
    dfinal_states = dfinal_states.to(torch.promote_types(tensors["x"].dtype, torch.float32))
    packed = run(oxiscan.mamba_chunk_scan_combined, tensors | {"seq_idx": seq_idx}, OPTIONS, [dout, dfinal_states])
    for begin, end in itertools.pairwise(bounds):
        part = {k: t if k == "A" else t[:, begin:end] for k, t in tensors.items()}
        gradients = [dout[:, begin:end], dfinal_states if end == 150 else None]
        alone = run(oxiscan.mamba_chunk_scan_combined, part, OPTIONS, gradients)
        for name in BY_TOKEN & alone.keys():
            assert torch.equal(packed[name][:, begin:end], alone[name]), name
    assert torch.equal(packed["out1"], alone["out1"])


@pytest.mark.parametrize("cut", [1, 50, 64, 149])
@KERNELS
def test_two_calls_with_a_carried_state_equal_one(cut, dtype, headdim, dstate, exact, device):
    dtype = dtype or exact
    shape = {"seqlen": 150, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(**shape, dtype=dtype, parameters=torch.promote_types(dtype, torch.float32), device=device)

    def two_calls(x, dt, A, B, C, D, z, dt_bias, initial_states, **options):
        first = oxiscan.mamba_chunk_scan_combined(
            x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D=D, z=z[:, :cut], dt_bias=dt_bias,
            initial_states=initial_states, **options,
        )  # fmt: skip
        second = oxiscan.mamba_chunk_scan_combined(
            x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D=D, z=z[:, cut:], dt_bias=dt_bias,
            initial_states=first[1], **options,
        )  # fmt: skip
        return torch.cat([first[0], second[0]], dim=1), second[1]

    once = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS)
    twice = run(two_calls, tensors, OPTIONS)
    for name, value in once.items():
        assert_close(name, twice[name], value, tolerance(dtype, 1e-11, gradient=name.startswith("d")))


#: CUDA walks so many tokens in four segments, which begin at a multiple of 128 above a quarter of them.
LONG, SEGMENT = 65536 + 100, 16512
#: The kernels that walk segments; that of float32 has one more for each number of elements that a thread has of a row.
LONG_KERNELS = pytest.mark.parametrize(
    ("dtype", "headdim", "dstate"),
    [
        *((torch.bfloat16, *size) for size in ((8, 12), (64, 128))),
        *((torch.float32, *size) for size in ((8, 12), (33, 40), (64, 128), (20, 200))),
    ],
)
#: Where documents of a long sequence begin.
STARTS = pytest.mark.parametrize(
    "starts",
    [(), (5000, SEGMENT, SEGMENT + 1, 2 * SEGMENT - 1, 3 * SEGMENT), (10, 60000), (SEGMENT + 1, 3 * SEGMENT - 64)],
)


def long_sequence(*, starts=(), batch=1, dtype=torch.bfloat16, device, **shape):
    """Weakly decaying states, seq_idx where documents start."""
    sizes = {"batch": batch, "seqlen": LONG, "nheads": 2, "ngroups": 1, "decay": 1e-3, **shape}
    tensors = inputs.ssd(**sizes, dtype=dtype, parameters=torch.float32, device=device)
    if starts:
        bounds = torch.tensor(starts, device=device)
        ids = torch.searchsorted(bounds, torch.arange(LONG, device=device), right=True, out_int32=True)
        tensors["seq_idx"] = ids.expand(batch, LONG)
    return tensors


def in_pieces(tensors, initial_states, begin, end):
    """The scan of tokens from `begin` to `end` in calls too short for segments, each from the last one's state."""
    outputs, states = [], initial_states
    for first in range(begin, end, 8192):
        tokens = slice(first, min(first + 8192, end))
        part = {n: t if n in ("A", "D", "dt_bias") else t[:, tokens] for n, t in tensors.items()}
        out, states = oxiscan.mamba_chunk_scan_combined(**part, initial_states=states, **OPTIONS)
        outputs.append(out)
    return torch.cat(outputs, dim=1), states


@LONG_KERNELS
@STARTS
def test_long_sequences(headdim, dstate, starts, dtype, device):
    tensors = long_sequence(starts=starts, batch=2, headdim=headdim, dstate=dstate, dtype=dtype, device=device)
    out, final_states = oxiscan.mamba_chunk_scan_combined(**tensors, **OPTIONS)
    tensors.pop("seq_idx", None)
    states = tensors.pop("initial_states")
    for begin, end in itertools.pairwise((0, *starts, LONG)):
        expected, states = in_pieces(tensors, states if begin == 0 else None, begin, end)
        assert_close(f"out from {begin}", out[:, begin:end], expected, TOLERANCES[dtype][0])
    assert_close("final_states", final_states, states, TOLERANCES[dtype][0])


@LONG_KERNELS
@STARTS
def test_long_sequences_with_cu_seqlens(headdim, dstate, starts, dtype, device):
    tensors = long_sequence(headdim=headdim, dstate=dstate, dtype=dtype, device=device)
    bounds = (0, 0, *starts, 3 * SEGMENT + 1, 3 * SEGMENT + 1, LONG - 70)  # two of no tokens, and tokens past the last
    each = inputs.ssd(batch=len(bounds) - 1, seqlen=1, nheads=2, headdim=headdim, dstate=dstate,
                      dtype=torch.float32, device=device)["initial_states"]  # fmt: skip
    packing = {"cu_seqlens": torch.tensor(sorted(bounds), device=device), "initial_states": each}
    out, varlen_states = oxiscan.mamba_chunk_scan_combined(
        **tensors | packing, **OPTIONS | {"return_final_states": False},
        return_varlen_states=True, state_dtype=torch.float32,
    )  # fmt: skip
    del tensors["initial_states"]
    for document, (begin, end) in enumerate(itertools.pairwise((*sorted(bounds), LONG))):
        if begin == end:
            assert torch.equal(varlen_states[document], each[document])
            continue
        initial = each[document : document + 1] if document < len(each) else None
        expected, states = in_pieces(tensors, initial, begin, end)
        assert_close(f"out from {begin}", out[:, begin:end], expected, TOLERANCES[dtype][0])
        if document < len(each):
            assert_close(f"state {document}", varlen_states[document], states[0], TOLERANCES[dtype][0])


#: The kernels of backward that walk segments.
LONG_BACKWARDS = pytest.mark.parametrize(
    ("dtype", "headdim", "dstate"), [(torch.bfloat16, 8, 12), (torch.bfloat16, 64, 128), (torch.float32, 33, 40)]
)


def assert_same_gradients(actual, expected, tensors):
    """Results, gradients among them, of one scan and of the same in pieces, each of which may err by the tolerance."""
    dtype = tensors["x"].dtype
    actual, expected = run(actual, tensors, {}), run(expected, tensors, {})
    for name, value in actual.items():
        assert_close(name, value, expected[name], 2 * TOLERANCES[dtype][name.startswith("d")])


@LONG_BACKWARDS
@STARTS
def test_gradients_of_long_sequences(headdim, dstate, starts, dtype, device):
    tensors = long_sequence(starts=starts, headdim=headdim, dstate=dstate, dtype=dtype, device=device)
    seq_idx = tensors.pop("seq_idx", None)

    def at_once(**tensors):
        return oxiscan.mamba_chunk_scan_combined(**tensors, seq_idx=seq_idx, **OPTIONS)

    def by_document(initial_states, **tensors):
        outputs, states = [], initial_states
        for begin, end in itertools.pairwise((0, *starts, LONG)):
            out, states = in_pieces(tensors, states if begin == 0 else None, begin, end)
            outputs.append(out)
        return torch.cat(outputs, dim=1), states

    assert_same_gradients(at_once, by_document, tensors)


@LONG_BACKWARDS
@STARTS
def test_gradients_of_long_sequences_with_cu_seqlens(headdim, dstate, starts, dtype, device):
    tensors = long_sequence(headdim=headdim, dstate=dstate, dtype=dtype, device=device)
    bounds = sorted((0, 0, *starts, 3 * SEGMENT + 1, 3 * SEGMENT + 1, LONG - 70))
    tensors["initial_states"] = inputs.ssd(batch=len(bounds) - 1, seqlen=1, nheads=2, headdim=headdim, dstate=dstate,
                                           dtype=torch.float32, device=device)["initial_states"]  # fmt: skip

    def at_once(**tensors):
        return oxiscan.mamba_chunk_scan_combined(
            **tensors, **OPTIONS | {"return_final_states": False}, cu_seqlens=torch.tensor(bounds, device=device),
            return_varlen_states=True, state_dtype=torch.float32,
        )  # fmt: skip

    def by_document(initial_states, **tensors):
        outputs, states = [], []
        for document, (begin, end) in enumerate(itertools.pairwise((*bounds, LONG))):
            state = initial_states[document : document + 1] if document < len(initial_states) else None
            if begin < end:
                out, state = in_pieces(tensors, state, begin, end)
                outputs.append(out)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states[:-1])

    assert_same_gradients(at_once, by_document, tensors)


@LONG_KERNELS
@pytest.mark.parametrize("name", ["x", "dt", "B"])
def test_a_nan_in_a_long_sequence_stays_in_its_document(name, headdim, dstate, dtype, device):
    bounds = (0, 5000, SEGMENT, 2 * SEGMENT + 7, LONG)
    tensors = long_sequence(starts=bounds[1:-1], headdim=headdim, dstate=dstate, dtype=dtype, device=device)
    before = oxiscan.mamba_chunk_scan_combined(**tensors, **OPTIONS)
    for begin, end in itertools.pairwise(bounds):
        changed = tensors | {name: tensors[name].clone()}
        changed[name][:, begin + 100] = float("nan")
        after = oxiscan.mamba_chunk_scan_combined(**changed, **OPTIONS)
        assert after[0][:, end - 1].isnan().all()
        for part in (slice(0, begin), slice(end, LONG)):
            assert torch.equal(before[0][:, part], after[0][:, part])
        assert end == LONG or torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SIZES
def test_bits_do_not_depend_on_run_batch_chunk_size_or_threads(dtype, headdim, dstate, device):
    shape = {"batch": 3, "seqlen": 150, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(**shape, seq_idx=True, dtype=dtype, device=device)
    first = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = run(oxiscan.mamba_chunk_scan_combined, tensors, OPTIONS | {"chunk_size": 17})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in first)
    parameters = ("A", "D", "dt_bias")
    alone = {name: t if name in parameters else t[1:2] for name, t in tensors.items()}
    gradients = seeded_gradients([first["out0"], first["out1"]])
    single = run(oxiscan.mamba_chunk_scan_combined, alone, OPTIONS, [g[1:2] for g in gradients])
    for name in single:
        if name[1:] not in parameters:
            assert torch.equal(first[name][1:2], single[name]), name


@pytest.mark.parametrize("op", [oxiscan.mamba_chunk_scan_combined, reference.mamba_chunk_scan_combined])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_gradcheck(op, seq_idx, float64, device):
    shape = {"batch": 1, "seqlen": 67, "nheads": 2, "headdim": 2, "ngroups": 1, "dstate": 2}
    if op is reference.mamba_chunk_scan_combined:
        shape["seqlen"] = 7
    tensors = inputs.ssd(**shape, dtype=float64, device=device)
    if seq_idx:
        tensors["seq_idx"] = inputs.documents(1, shape["seqlen"], mean_length=3, device=device)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    options = OPTIONS | {"dt_limit": (0.2, 2.0)}
    torch.autograd.gradcheck(
        lambda *values: op(**dict(zip(leaves, values, strict=True)), **options),
        tuple(leaves.values()),
        fast_mode=op is not reference.mamba_chunk_scan_combined,
    )
