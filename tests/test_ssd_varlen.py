"""mamba_chunk_scan_combined_varlen: packed prefill in the caller's chunks."""

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import TOLERANCES, assert_close, inputs
from oxiscan.testing.comparison import assert_equal

OPTIONS = {"dt_softplus": True, "return_raw_states": True}


def packed(lengths, chunk_size, *, padding=0, chunks=0, dtype=None, device, **sizes):
    """Arguments for documents of these lengths, then `padding` tokens in no chunk and `chunks` empty chunks."""
    dtype = dtype or inputs.floats(device)[0]
    seqlen = sum(lengths) + padding
    tensors = inputs.ssd(batch=1, seqlen=seqlen, dtype=dtype, device=device, **sizes)
    for name in ("x", "dt", "B", "C", "z"):
        tensors[name] = tensors[name].squeeze(0)
    states = inputs.ssd(batch=len(lengths), seqlen=1, dtype=dtype, device=device, **sizes)
    tensors["initial_states"] = states["initial_states"]
    bounds, ids, last = [0], [], []
    for document, length in enumerate(lengths):
        begin = bounds[-1]
        for chunk in range(max(-(-length // chunk_size), 1)):
            bounds.append(min(begin + (chunk + 1) * chunk_size, begin + length))
            ids.append(document)
        last.append(len(ids) - 1)
    bounds += [bounds[-1]] * chunks
    ids += [0] * chunks
    for name, values in {"cu_chunk_seqlens": bounds, "last_chunk_indices": last, "seq_idx": ids}.items():
        tensors[name] = torch.tensor(values, dtype=torch.int32, device=device)
    return tensors | {"out": torch.full_like(tensors["x"], 7.0), "chunk_size": chunk_size}


def compare_varlen(tensors, **options):
    dtype = tensors["x"].dtype
    floating = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    exact = tensors | {k: t.double() for k, t in floating.items()}
    expected = reference.mamba_chunk_scan_combined_varlen(**exact, **OPTIONS | options)
    actual = oxiscan.mamba_chunk_scan_combined_varlen(**tensors, **OPTIONS | options)
    assert_close("out", tensors["out"], exact["out"], TOLERANCES[dtype][0])
    for name, state, wanted in zip(("varlen_states", "raw_states"), actual, expected, strict=True):
        assert state.dtype == options.get("state_dtype", dtype)
        assert_close(name, state, wanted, max(TOLERANCES[dtype][0], TOLERANCES[state.dtype][0]))
    return actual


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("chunk_size", [8, 64, 100])
def test_every_dtype(dtype, chunk_size, device):
    compare_varlen(packed((30, 100, 1), chunk_size, dtype=dtype, device=device))


@pytest.mark.parametrize("lengths", [(0,), (0, 5, 0, 0, 70), (64, 128), (1, 1, 1), (200,)])
@pytest.mark.parametrize(("padding", "chunks"), [(0, 0), (5, 3)])
def test_lengths(lengths, padding, chunks, device):
    tensors = packed(lengths, 32, padding=padding, chunks=chunks, device=device)
    compare_varlen(tensors)
    assert (tensors["out"][sum(lengths) :] == 7.0).all()


def test_empty_chunks_inside_a_document_leave_its_state(device):
    tensors = packed((40,), 8, device=device)
    tensors["cu_chunk_seqlens"] = torch.tensor([0, 0, 3, 3, 3, 40, 40], dtype=torch.int64, device=device)
    tensors["seq_idx"] = torch.zeros(6, dtype=torch.int64, device=device)
    tensors["last_chunk_indices"] = torch.tensor([5], dtype=torch.int64, device=device)
    _, raw_states = compare_varlen(tensors)
    assert torch.equal(raw_states[0], tensors["initial_states"][0])
    assert torch.equal(raw_states[1], raw_states[3]) and torch.equal(raw_states[4], raw_states[5])


def test_documents_are_rows_of_initial_states_in_any_order(device):
    tensors = packed((20, 30, 5), 16, device=device)
    tensors["seq_idx"] = torch.tensor([2, 2, 0, 0, 2], dtype=torch.int32, device=device)
    compare_varlen(tensors)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_states"])
def test_an_optional_argument_left_out(left_out, device):
    tensors = packed((20, 0, 30), 16, device=device)
    del tensors[left_out]
    compare_varlen(tensors, dt_limit=(0.1, 2.0))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_state_dtype(state_dtype, device):
    compare_varlen(packed((20, 70), 16, dtype=torch.float16, device=device), state_dtype=state_dtype)


def test_equals_the_scan_with_cu_seqlens(device):
    tensors = packed((20, 70), 64, dtype=torch.float32, device=device)
    varlen_states = oxiscan.mamba_chunk_scan_combined_varlen(**tensors, dt_softplus=True)
    tokens = {k: tensors[k].unsqueeze(0) for k in ("x", "dt", "B", "C", "z")}
    parameters = {k: tensors[k] for k in ("A", "D", "dt_bias", "initial_states")}
    out, states = oxiscan.mamba_chunk_scan_combined(
        **tokens,
        **parameters,
        chunk_size=64,
        cu_seqlens=inputs.cu_seqlens(20, 70, device=device),
        dt_softplus=True,
        return_varlen_states=True,
    )
    assert torch.equal(tensors["out"], out[0]) and torch.equal(varlen_states, states)


def test_strided_arguments(device):
    tensors = packed((20, 70), 16, device=device)
    expected = oxiscan.mamba_chunk_scan_combined_varlen(**tensors, **OPTIONS)
    views = {k: t if k == "chunk_size" else inputs.strided(t) for k, t in tensors.items() if k != "out"}
    view = oxiscan.mamba_chunk_scan_combined_varlen(**views, out=(out := inputs.strided(tensors["out"] * 0)), **OPTIONS)
    actual = {"out": out, "varlen_states": view[0], "raw_states": view[1]}
    assert_equal(actual, {"out": tensors["out"], "varlen_states": expected[0], "raw_states": expected[1]})


def test_no_gradient_and_the_written_result_is_noticed(device):
    tensors = packed((20,), 16, dtype=torch.float32, device=device)
    weight = torch.ones_like(tensors["out"], requires_grad=True)
    loss = (weight * tensors["out"]).sum()
    tensors["x"].requires_grad_()
    assert not oxiscan.mamba_chunk_scan_combined_varlen(**tensors).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(1, 6, 4, 8)}, ValueError, "x: got shape"),
        ({"cu_chunk_seqlens": torch.tensor([0, 4, 3])}, ValueError, r"cu_chunk_seqlens: got \[0, 4, 3\]; allowed"),
        ({"cu_chunk_seqlens": torch.tensor([0, 4])}, ValueError, r"cu_chunk_seqlens: got shape \(2,\)"),
        ({"cu_chunk_seqlens": torch.ones(3)}, TypeError, "cu_chunk_seqlens: got float32; allowed: int32 or int64"),
        ({"seq_idx": torch.tensor([0, 2])}, ValueError, "seq_idx: got 2; allowed: values >= 0 and below 2"),
        ({"seq_idx": torch.tensor([-1, 0])}, ValueError, "seq_idx: got -1; allowed: values >= 0 and below 2"),
        ({"last_chunk_indices": torch.tensor([0, 2])}, ValueError, "last_chunk_indices: got 2; allowed: values"),
        ({"out": torch.ones(6, 4, 7)}, ValueError, "out: got shape"),
        ({"out": torch.ones(6, 4, 1).expand(6, 4, 8)}, ValueError, "out: got strides"),
        ({"seq_idx": torch.tensor([-1, 0]), "initial_states": None}, ValueError, "seq_idx: got -1; .* values >= 0$"),
        ({"dt": torch.ones(5, 4)}, ValueError, r"dt: got shape \(5, 4\); allowed: \(seqlen, nheads\) = \(6, 4\)"),
        ({"initial_states": torch.ones(2, 4, 8, 11)}, ValueError, "initial_states: got shape"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_write_nothing(changes, error, message):
    tensors = packed((3, 3), 8, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(error, match=message):
        oxiscan.mamba_chunk_scan_combined_varlen(**tensors | changes)
    assert (tensors["out"] == 7.0).all()


def test_the_result_may_be_x_or_z_itself_but_not_overlap_them(exact, device):
    tensors = packed((20, 70), 16, device=device)
    oxiscan.mamba_chunk_scan_combined_varlen(**tensors)
    for name in ("x", "z"):
        written = tensors[name].clone()
        oxiscan.mamba_chunk_scan_combined_varlen(**tensors | {name: written, "out": written})
        assert torch.equal(written, tensors["out"])
    buffer = torch.zeros(91, 4, 8, dtype=exact, device=device)
    for name in ("x", "z"):
        with pytest.raises(ValueError, match=f"out: got memory that it shares with {name}"):
            oxiscan.mamba_chunk_scan_combined_varlen(**tensors | {name: buffer[:-1], "out": buffer[1:]})
