"""Documents given by cu_seqlens, in every op that takes it: each one as if it were alone."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import oxiscan
from oxiscan import reference
from oxiscan.testing import compare, inputs, peak_memory, run

LENGTHS = [
    (64, 65, 1),
    (0, 30, 0, 70, 0),  # documents without tokens: first, inside, last
    (1, 1, 2, 3, 130, 0, 5),
    (0, 0),
    (12,),
]


class Op(NamedTuple):
    """How an op is called with packed documents, and how its arguments lie along the sequence."""

    name: str
    case: Any
    options: dict[str, Any]
    token_dim: dict[str, int]
    states: tuple[str, ...]
    # Outputs by token; by sequence; by document.
    out_dim: int
    by_sequence: tuple[str, ...]
    by_document: tuple[str, ...]

    @property
    def op(self) -> Any:
        return getattr(oxiscan, self.name)

    @property
    def reference(self) -> Any:
        return getattr(reference, self.name)

    def inputs(
        self, lengths: tuple[int, ...], padding: int = 0, *, dtype: torch.dtype | None = None, device: Any
    ) -> dict[str, Tensor]:
        """Arguments of packed documents, with a state for each; in the backend's widest dtype by default."""
        dtype = dtype or inputs.floats(device)[0]
        seqlen = sum(lengths) + padding
        tensors = self.case(batch=1, seqlen=seqlen, dtype=dtype, device=device)
        states = self.case(batch=len(lengths), seqlen=1, dtype=dtype, device=device)
        tensors |= {name: states[name] for name in self.states}
        return tensors | {"cu_seqlens": inputs.cu_seqlens(*lengths, device=device)}


SSD = Op(
    "mamba_chunk_scan_combined",
    inputs.ssd,
    {"chunk_size": 64, "dt_softplus": True, "return_final_states": True, "return_varlen_states": True},
    {"x": 1, "dt": 1, "B": 1, "C": 1, "z": 1},
    ("initial_states",),
    1,
    ("out1",),
    ("out2",),
)
#: In bfloat16 CUDA has another kernel for these sizes.
SSD_WIDE = SSD._replace(case=partial(inputs.ssd, headdim=64, dstate=64))
CONV = Op(
    "causal_conv1d_fn",
    inputs.conv,
    {"activation": "silu", "return_final_states": True},
    {"x": 2},
    ("initial_states",),
    2,
    (),
    ("out1",),
)
SPLIT = Op(
    "mamba_split_conv1d_scan_combined",
    inputs.split_conv1d_scan,
    {
        "chunk_size": 64,
        "ngroups": 2,
        "return_final_states": True,
        "return_final_conv_states": True,
        "return_varlen_states": True,
    },
    {"zxbcdt": 1},
    ("initial_states", "initial_conv_states"),
    1,
    ("out1",),
    ("out2", "out3"),
)
OPS = pytest.mark.parametrize("op", [SSD, CONV, SPLIT], ids=lambda op: op.name)


@OPS
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_lengths(op, lengths, padding, device):
    compare(op.op, op.reference, op.inputs(lengths, padding, device=device), op.options)


@OPS
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_every_dtype(op, dtype, device):
    tensors = op.inputs((30, 0, 64, 40), 3, dtype=dtype, device=device)
    tolerances = {}
    if op is SPLIT and dtype in (torch.bfloat16, torch.float16):
        tolerances = {"dA": 5e-2}  # as in test_split_conv1d_scan: a small sum of large terms behind roundings
    compare(op.op, op.reference, tensors, op.options, tolerances)


@pytest.mark.parametrize("op", [SSD, SSD_WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_lengths_of_scans_in_bfloat16(op, lengths, padding, device):
    tensors = op.inputs(lengths, padding, dtype=torch.bfloat16, device=device)
    compare(op.op, op.reference, tensors, op.options)
    tensors["initial_states"] = tensors["initial_states"][:1].float()  # the first document's
    compare(op.op, op.reference, tensors, op.options)


@OPS
def test_one_initial_state_belongs_to_the_first_document(op, device):
    for lengths in ((20, 70), (0, 20, 70)):
        tensors = op.inputs(lengths, device=device)
        tensors |= {name: tensors[name][:1].clone() for name in op.states}
        compare(op.op, op.reference, tensors, op.options)


@OPS
def test_no_initial_states(op, device):
    tensors = {k: t for k, t in op.inputs((20, 0, 70), 5, device=device).items() if k not in op.states}
    compare(op.op, op.reference, tensors, op.options)


@OPS
@pytest.mark.parametrize("lengths", [(20, 70), (5, 0, 66, 3)])
def test_boundaries_are_the_union_with_seq_idx(op, lengths, device):
    tensors = op.inputs(lengths, 4, device=device)
    # Cuts inside the documents; across their bounds the id stays the same.
    tensors["seq_idx"] = torch.zeros(1, sum(lengths) + 4, dtype=torch.int32, device=device)
    tensors["seq_idx"][:, 11:50] = 3
    tensors["seq_idx"][:, 72:] = 1
    compare(op.op, op.reference, tensors, op.options)


@OPS
def test_int64_and_strided_cu_seqlens(op, device):
    tensors = op.inputs((20, 70), device=device)
    expected = run(op.op, tensors, op.options)
    bounds = tensors["cu_seqlens"].long().repeat_interleave(2)[::2]
    actual = run(op.op, tensors | {"cu_seqlens": bounds}, op.options)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("op", [SSD, SSD_WIDE, CONV, SPLIT], ids=["scan", "wide_scan", "conv", "split"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_document_gives_the_same_bits_packed_and_alone(op, dtype, device):
    lengths = (7, 100, 0, 64, 33)
    tensors = op.inputs(lengths, 6, dtype=dtype, device=device)
    packed = run(op.op, tensors, op.options)
    gradients = [torch.randn_like(value) for name, value in packed.items() if name.startswith("out")]
    packed = run(op.op, tensors, op.options, gradients)
    bounds = tensors["cu_seqlens"].tolist()
    for document, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = {
            k: t.narrow(op.token_dim[k], begin, end - begin) if k in op.token_dim else t for k, t in tensors.items()
        }
        alone |= {k: tensors[k][document : document + 1] for k in op.states}
        alone["cu_seqlens"] = inputs.cu_seqlens(end - begin, device=device)
        # The state after the last token is not this document's in the pack: no gradient through it.
        outputs = dict(zip([name for name in packed if name.startswith("out")], gradients, strict=True))
        outputs["out0"] = outputs["out0"].narrow(op.out_dim, begin, end - begin)
        outputs |= {name: outputs[name][document : document + 1] for name in op.by_document}
        outputs |= {name: torch.zeros_like(outputs[name]) for name in op.by_sequence}
        single = run(op.op, alone, op.options, list(outputs.values()))
        where = {"out0": op.out_dim} | {f"d{name}": dim for name, dim in op.token_dim.items()}
        for name in where.keys() & packed.keys():
            part = packed[name].narrow(where[name], begin, end - begin)
            assert torch.equal(part, single[name]), (name, document)
        for name in {*op.by_document, *(f"d{name}" for name in op.states)} & packed.keys():
            assert torch.equal(packed[name][document : document + 1], single[name]), (name, document)


@pytest.mark.parametrize("op", [SSD, SSD_WIDE, CONV, SPLIT], ids=["scan", "wide_scan", "conv", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_its_document(op, dtype, device):
    tensors = op.inputs((30, 40, 90), 5, dtype=dtype, device=device)
    before = run(op.op, tensors, op.options)
    name, dim = next(iter(op.token_dim.items()))
    changed = tensors | {name: tensors[name].clone()}
    changed[name].select(dim, 50).fill_(float("nan"))
    after = run(op.op, changed, op.options)
    assert after["out0"].select(op.out_dim, 50).isnan().any()
    where = {"out0": op.out_dim, f"d{name}": dim}
    for result in where.keys() & before.keys():
        for begin, length in ((0, 30), (70, 95)):
            parts = [results[result].narrow(where[result], begin, length) for results in (before, after)]
            assert torch.equal(*parts), result
    for result in op.by_document:
        for document in (0, 2):
            assert torch.equal(before[result][document], after[result][document]), result


@OPS
def test_gradients_through_the_documents_states_alone(op, exact, device):
    tensors = op.inputs((30, 0, 70), 5, device=device)
    values = run(op.op, tensors, op.options)
    outputs = {name: torch.zeros_like(value) for name, value in values.items() if name.startswith("out")}
    for name in op.by_document:
        outputs[name] = torch.randn_like(outputs[name])
    actual = run(op.op, tensors, op.options, list(outputs.values()))
    expected = run(op.reference, tensors, op.options, list(outputs.values()))
    close = 1e-9 if exact == torch.float64 else 1e-4
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=close, atol=close)


@OPS
def test_gradcheck(op, float64, device):
    lengths = (2, 0, 3)
    case = {"nheads": 2, "headdim": 2, "ngroups": 1, "dstate": 2} if op is not CONV else {"dim": 2, "width": 3}
    small = op._replace(case=lambda **sizes: op.case(**sizes, **case))
    tensors = small.inputs(lengths, 2, dtype=float64, device=device)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    options = op.options | ({"ngroups": 1} if op is SPLIT else {})
    for function in (op.op, op.reference):
        torch.autograd.gradcheck(
            lambda *values, f=function: f(**dict(zip(leaves, values, strict=True)), **options), tuple(leaves.values())
        )


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_varlen_states_have_the_state_dtype(state_dtype, device):
    tensors = SSD.inputs((30, 70), dtype=torch.float16, device=device)
    options = SSD.options | {"state_dtype": state_dtype}
    varlen_states = oxiscan.mamba_chunk_scan_combined(**tensors, **options)[2]
    assert varlen_states.dtype == (state_dtype or torch.float16)
    exact = oxiscan.mamba_chunk_scan_combined(**tensors, **options | {"state_dtype": torch.float32})[2]
    assert torch.equal(varlen_states, exact.to(varlen_states.dtype))


@pytest.mark.parametrize("lengths", [(5, 7), (0, 0)])
def test_varlen_states_without_final_states(lengths, device):
    tensors = SSD.inputs(lengths, device=device)
    options = SSD.options | {"return_final_states": False}
    out, varlen_states = oxiscan.mamba_chunk_scan_combined(**tensors, **options)
    everything = oxiscan.mamba_chunk_scan_combined(**tensors, **SSD.options)
    assert torch.equal(out, everything[0]) and torch.equal(varlen_states, everything[2])


def test_many_short_documents_keep_no_state_for_each(device):
    # 3000 documents of one token, each with a state of 64 x 512, on CUDA 64 x 256, the most that it has kernels for: as
    # one float32 for each element of a state 393 MB, or 197.
    tensors = inputs.ssd(
        batch=1,
        seqlen=3000,
        nheads=1,
        headdim=64,
        ngroups=1,
        dstate=512 if device.type == "cpu" else 256,
        optional=False,
        dtype=torch.float32,
        device=device,
    )
    tensors["cu_seqlens"] = inputs.cu_seqlens(*[1] * 3000, device=device)

    def call():
        return run(oxiscan.mamba_chunk_scan_combined, tensors, {"chunk_size": 64})

    call()  # threads and their memory are there
    assert (peak_memory(call) if device.type == "cpu" else peak_device_memory(call, device)) < 150e6


def peak_device_memory(call, device):
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before
