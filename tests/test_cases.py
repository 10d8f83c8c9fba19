"""The list of cases that tests and benchmarks share."""

import inspect
import math

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import CASES, assert_close, compare, inputs, peak_memory, relative_rms

SMALL = [case for name, case in CASES.items() if name.startswith("small/")]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_cases_are_the_reference(case, dtype, device):
    compare(getattr(oxiscan, case.op), getattr(reference, case.op), case.tensors(dtype, device), case.options)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_every_case_is_a_call(case, device):
    # The sizes of its model, but no tokens: a decode step has one for each row of the batch.
    sizes = {"batch": 1, "seqlen": 0} if "seqlen" in case.sizes else {"batch": 0}
    tensors = case.tensors(torch.bfloat16, device, **sizes)
    inspect.signature(getattr(oxiscan, case.op)).bind(**tensors, **case.options)
    for op in (getattr(oxiscan, case.op), getattr(reference, case.op)):
        out = op(**tensors, **case.options)
        assert out.numel() == 0 and out.dtype == torch.bfloat16


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_seed_decides(case, device):
    first, again, other = (case.tensors(torch.float32, device, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts_hold_the_same_values(layout, device):
    tensor = torch.randn(3, 4, 5, device=device)
    view = inputs.laid_out(tensor, layout)
    assert torch.equal(view, tensor)
    assert view.is_contiguous() == (layout in ("contiguous", "rows"))


def test_what_is_off_is_named():
    expected = torch.ones(8)
    with pytest.raises(AssertionError, match=r"dA: relative RMS error 0.01, allowed 0.001"):
        assert_close("dA", expected * 1.01, expected, 1e-3)
    with pytest.raises(AssertionError, match="relative RMS error nan"):
        assert_close("dA", expected * float("nan"), expected, 1e-3)
    with pytest.raises(AssertionError, match=r"shape \(4,\), expected \(8,\)"):
        assert_close("dA", expected[:4], expected, 1e-3)
    tensors = {"x": torch.randn(3, 8), "weight": torch.randn(8)}
    with pytest.raises(AssertionError, match="dweight"):
        compare(oxiscan.rmsnorm_gated, lambda x, weight: reference.rmsnorm_gated(x, weight.detach()), tensors, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_float32_has_no_digits_for_counts_as_zero(dtype):
    actual, expected = torch.tensor([1e-40, -1.0], dtype=dtype), torch.tensor([-9e-41, -1.0]).double()
    assert relative_rms(actual, expected) == relative_rms(actual[:1], expected[:1]) == 0
    assert relative_rms(actual.double()[:1], expected[:1]) > 2
    assert relative_rms(2 * actual, expected) == 1
    assert math.isnan(relative_rms(actual * float("nan"), expected))


def test_peak_memory_sees_what_is_freed_again():
    assert 50e6 < peak_memory(lambda: torch.ones(25_000_000).numel()) < 150e6
