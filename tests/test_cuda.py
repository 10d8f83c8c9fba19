"""The CUDA backend: what it promises beyond the results, which the files of the ops test by `--device cuda`.

Streams, graphs, threads, devices, forks, sizes above 2^31, edges of tiles and alignment, launches, synchronisation.
"""

import itertools
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

import oxiscan
from oxiscan import _C, reference
from oxiscan.ops import ssd
from oxiscan.testing import CASES as MODELS
from oxiscan.testing import TOLERANCES, assert_close, compare, inputs, run
from test_causal_conv1d_update import compare_update as compare_conv_update
from test_packed_documents import peak_device_memory
from test_selective_state_update import WRITTEN, compare_update

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def cuda(device):
    if device.type != "cuda":
        pytest.skip("tests of the CUDA backend: --device cuda")


class Case(NamedTuple):
    """A call of an op that every test of streams, graphs, threads and so on makes."""

    name: str
    #: Its name in `oxiscan`.
    op: str
    #: Arguments on a device, the same for the same seed.
    make: Callable[..., dict[str, Tensor]]
    options: dict[str, Any]
    #: Arguments of the outputs' shapes and dtypes, for their gradients; none for an op without gradients.
    like: tuple[str, ...] = ()
    #: Arguments that are updated in place.
    written: tuple[str, ...] = ()
    #: The argument that decides device and dtype of the others.
    first: str = "x"
    #: What the kernels' names start with, or one of several, in the order of their launches: of forward, of backward.
    forward: tuple[str | tuple[str, ...], ...] = ()
    backward: tuple[str | tuple[str, ...], ...] = ()

    def tensors(self, device: Any, seed: int = 0) -> dict[str, Tensor]:
        """The arguments, with those of the outputs' gradients as "gradient 0" and so on."""
        tensors = self.make(device=device, seed=seed)
        gradients = self.make(device=device, seed=seed + 1000)
        return tensors | {f"gradient {i}": gradients[name] for i, name in enumerate(self.like)}

    def results(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, gradients and what the call leaves in the arguments that it updates; nothing else is changed."""
        arguments = {name: t for name, t in tensors.items() if not name.startswith("gradient")}
        op = getattr(oxiscan, self.op)
        if not self.written:
            gradients = [t for name, t in tensors.items() if name.startswith("gradient")]
            return run(op, arguments, self.options, gradients)
        arguments |= {name: arguments[name].clone() for name in self.written}
        return {"out0": op(**arguments, **self.options)} | {name: arguments[name] for name in self.written}


def norm(*shape, strided=False, **sizes):
    def make(*, device, seed):
        tensors = inputs.rmsnorm_gated(*shape, **sizes, device=device, seed=seed)
        return {name: inputs.strided(t) for name, t in tensors.items()} if strided else tensors

    return make


def state_update(**sizes):
    def make(*, device, seed):
        return inputs.state_update(**sizes, device=device, seed=seed)

    return make


def conv(*, lengths=None, **sizes):
    def make(*, device, seed):
        tensors = inputs.conv(**sizes, device=device, seed=seed)
        if lengths is not None:
            tensors["cu_seqlens"] = inputs.cu_seqlens(*lengths, device=device)
            tensors["initial_states"] = inputs.normal(
                len(lengths), *tensors["initial_states"].shape[1:], dtype=sizes["dtype"], device=device
            )
        return tensors

    return make


def conv_update(**sizes):
    def make(*, device, seed):
        return inputs.conv_update(**sizes, device=device, seed=seed)

    return make


def passing(*, strided=False, **sizes):
    def make(*, device, seed):
        tensors = inputs.state_passing(**sizes, device=device, seed=seed)
        tensors["initial_states"] = tensors["initial_states"].float()  # also what final states' gradients are
        return {name: inputs.strided(t) for name, t in tensors.items()} if strided else tensors

    return make


def scan(*, strided=False, lengths=None, without=(), **sizes):
    def make(*, device, seed):
        tensors = inputs.ssd(**sizes, device=device, seed=seed)
        for name in without:
            del tensors[name]
        if lengths is not None:
            tensors["cu_seqlens"] = inputs.cu_seqlens(*lengths, device=device)
            states = inputs.ssd(**sizes | {"batch": len(lengths), "seqlen": 1}, device=device, seed=seed)
            tensors["initial_states"] = states["initial_states"]
        tensors["initial_states"] = tensors["initial_states"].float()  # also what final states' gradients are
        return {name: inputs.strided(t) for name, t in tensors.items()} if strided else tensors

    return make


CONV: dict[str, Any] = {
    "like": ("x", "initial_states"),
    "forward": ("causal_conv1d_fwd",),
    "backward": ("causal_conv1d_bwd", "causal_conv1d_bwd_parameters"),
}
CONV_OPTIONS = {"activation": "silu", "return_final_states": True}
CONV_UPDATE: dict[str, Any] = {"written": ("conv_state",), "forward": ("causal_conv1d_update",)}
NORM: dict[str, Any] = {
    "like": ("x",),
    "forward": ("rmsnorm_gated_fwd",),
    "backward": ("rmsnorm_gated_bwd", "rmsnorm_gated_bwd_parameters"),
}
PASSING: dict[str, Any] = {
    "like": ("states", "initial_states"),
    "first": "states",
    "forward": ("state_passing_fwd",),
    "backward": ("state_passing_bwd", "state_passing_bwd_decay"),
}
SCAN: dict[str, Any] = {"like": ("x", "initial_states")}
FAST_SCAN = ("ssd_fwd_wgmma__", "ssd_fwd_mma")
FAST_SCAN_BACKWARD = (
    ("ssd_bwd_wgmma_states", "ssd_bwd_mma_states"),
    ("ssd_bwd_wgmma__", "ssd_bwd_mma__"),
    "ssd_bwd_parameters",
)
OTHER_SCAN_BACKWARD = ("ssd_bwd_mma_states", "ssd_bwd_mma__", "ssd_bwd_parameters")
SCAN_OPTIONS = {"chunk_size": 64, "dt_softplus": True, "return_final_states": True}
UPDATE: dict[str, Any] = {"written": ("state",), "forward": ("selective_state_update",)}

CASES = [
    Case("conv", "causal_conv1d_fn", conv(batch=3, dim=300, seqlen=2500, dtype=BF16), CONV_OPTIONS, **CONV),
    Case(
        "conv_channel_last",
        "causal_conv1d_fn",
        conv(dim=320, seqlen=700, channel_last=True, dtype=BF16, parameters=F32),
        CONV_OPTIONS,
        **CONV,
    ),
    Case(
        "conv_seq_idx",
        "causal_conv1d_fn",
        conv(dim=77, seqlen=500, width=5, channel_last=True, seq_idx=True, dtype=F32),
        CONV_OPTIONS,
        **CONV,
    ),
    Case(
        "conv_cu_seqlens",
        "causal_conv1d_fn",
        conv(batch=1, dim=40, seqlen=1500, dtype=F16, lengths=(0, 3, 600, 0, 800)),
        CONV_OPTIONS,
        **CONV,
    ),
    Case(
        "conv_update",
        "causal_conv1d_update",
        conv_update(batch=6, dim=1000, state_len=4, slots=9, dtype=BF16),
        {"activation": "silu"},
        **CONV_UPDATE,
    ),
    Case(
        "conv_update_tokens",
        "causal_conv1d_update",
        conv_update(seqlen=4, state_len=5, slots=5, circular=True, intermediate=True, dtype=F32),
        {"activation": "silu"},
        **CONV_UPDATE | {"written": ("conv_state", "intermediate_conv_states")},
    ),
    Case("norm", "rmsnorm_gated", norm(4, 70, 1024, dtype=F32), {"group_size": 256}, **NORM),
    Case(
        "norm_gate_first",
        "rmsnorm_gated",
        norm(300, 4096, dtype=BF16, bias=False, parameters=F32),
        {"norm_before_gate": False},
        **NORM,
    ),
    Case("norm_odd", "rmsnorm_gated", norm(3, 50, 333, dtype=F16), {"group_size": 111}, **NORM),
    Case("norm_strided", "rmsnorm_gated", norm(5, 6, 128, dtype=BF16, strided=True), {}, **NORM),
    Case("passing", "state_passing", passing(nchunks=37, headdim=64, dstate=128, dtype=BF16), {}, **PASSING),
    Case(
        "passing_strided",
        "state_passing",
        passing(batch=3, nchunks=9, headdim=5, dstate=70, dtype=F32, strided=True),
        {},
        **PASSING,
    ),
    Case(
        "scan",
        "mamba_chunk_scan_combined",
        scan(batch=3, seqlen=300, headdim=64, dstate=128, seq_idx=True, dtype=BF16, parameters=F32),
        SCAN_OPTIONS,
        forward=(FAST_SCAN,),
        backward=(FAST_SCAN, "ssd_bwd_cuts", *FAST_SCAN_BACKWARD),
        **SCAN,
    ),
    Case(
        "scan_float32",
        "mamba_chunk_scan_combined",
        scan(batch=3, seqlen=300, headdim=20, dstate=40, D="elements", dtype=F32),
        SCAN_OPTIONS,
        forward=("ssd_fwd_recurrence",),
        backward=("ssd_fwd_recurrence", *OTHER_SCAN_BACKWARD),
        **SCAN,
    ),
    Case(
        "scan_odd",
        "mamba_chunk_scan_combined",
        scan(batch=3, seqlen=200, nheads=6, headdim=33, dstate=70, seq_idx=True, strided=True, dtype=F16),
        SCAN_OPTIONS,
        forward=("ssd_fwd_mma",),
        backward=("ssd_fwd_mma", "ssd_bwd_cuts", *OTHER_SCAN_BACKWARD),
        **SCAN,
    ),
    Case(
        "scan_cu_seqlens",
        "mamba_chunk_scan_combined",
        scan(batch=1, seqlen=300, headdim=80, dstate=64, lengths=(0, 3, 140, 0, 100), dtype=F16),
        {"chunk_size": 64, "dt_softplus": True, "return_varlen_states": True, "state_dtype": F32},
        forward=(FAST_SCAN,),
        backward=(FAST_SCAN, "ssd_bwd_cuts", *FAST_SCAN_BACKWARD),
        **SCAN,
    ),
    Case(
        "scan_segments",
        "mamba_chunk_scan_combined",
        scan(batch=2, seqlen=33000, nheads=1, ngroups=1, headdim=80, dstate=64, decay=1e-3, dtype=BF16),
        SCAN_OPTIONS,
        forward=(("ssd_fwd_wgmma_states", "ssd_fwd_mma"), FAST_SCAN),
        backward=(
            ("ssd_fwd_wgmma_states", "ssd_fwd_mma"),
            FAST_SCAN,
            ("ssd_bwd_wgmma_states", "ssd_bwd_mma_states"),
            *FAST_SCAN_BACKWARD,
        ),
        **SCAN,
    ),
    Case(
        "scan_segments_with_kept_states",
        "mamba_chunk_scan_combined",
        scan(batch=2, seqlen=33000, nheads=1, ngroups=1, headdim=64, dstate=64, decay=1e-3, without=("z",), dtype=BF16),
        SCAN_OPTIONS,
        forward=(("ssd_fwd_wgmma_states", "ssd_fwd_mma"), FAST_SCAN),
        backward=(("ssd_bwd_wgmma_states", "ssd_bwd_mma_states"), *FAST_SCAN_BACKWARD),
        **SCAN,
    ),
    Case(
        "state_update",
        "selective_state_update",
        state_update(batch=6, nheads=8, dim=64, dstate=128, slots=9, dtype=BF16, parameters=F32, state=F32),
        {"dt_softplus": True},
        **UPDATE,
    ),
    Case(
        "state_update_tokens",
        "selective_state_update",
        state_update(batch=3, seqlen=4, nheads=4, dim=65, dstate=19, slots=5, intermediate=True, dtype=F32),
        {"dt_softplus": True},
        **UPDATE | {"written": ("state", "intermediate_ssm_states")},
    ),
]
BY_NAME = {case.name: case for case in CASES}
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: One for each op.
ONE_EACH = pytest.mark.parametrize(
    "case",
    [BY_NAME[name] for name in ("conv", "conv_update", "norm", "passing", "scan", "state_update")],
    ids=lambda case: case.op,
)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # NaN, which memory around a strided result holds, is equal to itself here.
        assert torch.equal(actual[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
        assert torch.equal(actual[name].isnan(), value.isnan()), name


def run_here(function: str, *arguments: str, **environment: str) -> str:
    """Call a function of this file in a new process; what it prints."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_cuda; test_cuda.{function}"
    command = [sys.executable, "-c", f"{code}(*sys.argv[1:])", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_this_build_has_kernels_for_the_ops_tested_here():
    assert {case.op for case in CASES} <= set(_C.build_info()["cuda_ops"])


def test_an_op_without_kernels_says_so(device):
    """What `conftest` skips by. Every public op has either kernels or this message."""
    from test_compile import CASES as training
    from test_compile import UPDATES as inference

    on_cuda = _C.build_info()["cuda_ops"]
    for op, make, options in [*training.values(), *inference.values()]:
        if op.__name__ not in on_cuda:
            tensors = make(batch=2, seqlen=3, dtype=F32, device=device)
            with pytest.raises(
                NotImplementedError, match=r"got a tensor on cuda:\d+; allowed: cpu, the only backend of"
            ):
                op(**tensors, **options)


# --- Determinism, streams, graphs, threads


@EVERY
def test_runs_give_the_same_bits_also_beside_other_work(case, device):
    tensors = case.tensors(device)
    first = case.results(tensors)
    busy, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    for i in range(10):
        if i >= 5:
            with torch.cuda.stream(busy):
                matrix @ matrix
        assert_same_bits(case.results(tensors), first)
    torch.cuda.synchronize()


@EVERY
def test_no_element_is_left_unwritten(case, device):
    assert torch.empty(1000, device=device).isnan().all(), "uninitialised memory is not filled"
    tensors = case.tensors(device)
    for name, value in case.results(tensors).items():
        assert value.isfinite().all(), name


@EVERY
def test_work_goes_to_the_current_stream(case, device):
    tensors = case.tensors(device)
    expected = case.results(tensors)
    # The memory of strided arguments too, so that their layouts are the same.
    late = {name: in_memory_of_its_own(t) for name, t in tensors.items()}
    for t in late.values():
        t.fill_(float("nan") if t.is_floating_point() else -1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s, in which another stream would read the NaNs
        for name, t in late.items():
            t.copy_(tensors[name])
        actual = case.results(late)
    stream.synchronize()
    assert_same_bits(actual, expected)


def in_memory_of_its_own(tensor: Tensor) -> Tensor:
    memory = tensor.new_empty(0).set_(tensor.untyped_storage()).clone()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@EVERY
def test_a_captured_call_is_replayed_on_new_values(case, device):
    static = case.tensors(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.results(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.results(static)
    for seed in (0, 1, 2):
        new = case.tensors(device, seed)
        for name, t in static.items():
            t.copy_(new[name])
        graph.replay()
        assert_same_bits(actual, case.results(static))


@ONE_EACH
def test_the_first_call_of_a_process_may_be_captured(case):
    assert run_here("capture_the_first_call", case.name) == "the same"


def capture_the_first_call(name: str) -> None:
    """In a process of its own: the kernels are loaded during the capture."""
    case, device = BY_NAME[name], torch.device("cuda")
    tensors = case.tensors(device)
    # torch's own first calls.
    x = torch.ones(4, device=device, requires_grad=True)
    torch.autograd.grad((x * x).sum(), x)
    x.detach().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.results(tensors)
    graph.replay()
    assert_same_bits(actual, case.results(tensors))
    print("the same")


@EVERY
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_with_a_stream_each(case, threads, device):
    arguments = [case.tensors(device, seed) for seed in range(threads)]
    expected = [case.results(tensors) for tensors in arguments]
    torch.cuda.synchronize()

    def work(i):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            results = [case.results(arguments[i]) for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, range(threads)))
    for i, runs in enumerate(results):
        for values in runs:
            assert_same_bits(values, expected[i])


# --- Devices and processes


@pytest.fixture
def second():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    return torch.device("cuda:1")


@EVERY
def test_a_device_that_is_not_the_current_one(case, second):
    assert torch.cuda.current_device() == 0
    expected = case.results(case.tensors("cuda:0"))
    actual = case.results(case.tensors(second))
    assert torch.cuda.current_device() == 0
    assert all(value.device == second for value in actual.values())
    torch.cuda.synchronize(second)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits({name: value.to("cuda:0") for name, value in actual.items()}, expected)


@EVERY
def test_arguments_on_two_gpus_are_refused(case, second):
    assert_refuses_another_device(case, second, "cuda:1")


@EVERY
def test_an_argument_on_the_cpu_is_refused(case):
    assert_refuses_another_device(case, torch.device("cpu"), "cpu")


def assert_refuses_another_device(case, other, name):
    tensors = {n: t for n, t in case.tensors("cuda:0").items() if not n.startswith("gradient")}
    before = {n: t.clone() for n, t in tensors.items()}
    for argument in tensors:
        if argument != case.first:
            allowed = f"the device of {case.first}"
            with pytest.raises(ValueError, match=f"^{argument}: got a tensor on {name}; allowed: {allowed}"):
                getattr(oxiscan, case.op)(**tensors | {argument: tensors[argument].to(other)}, **case.options)
    assert_same_bits(tensors, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@ONE_EACH
def test_a_forked_child_uses_cuda(case):
    assert run_here("fork_then_use_cuda", case.name) == "the same"


def fork_then_use_cuda(name: str) -> None:
    """In a process of its own: the parent runs on the CPU alone, with threads, the child on the GPU."""
    case = BY_NAME[name]
    tensors = case.tensors("cpu")
    with torch.no_grad():
        out = getattr(oxiscan, case.op)(
            **{n: t.clone() for n, t in tensors.items() if not n.startswith("gradient")}, **case.options
        )
    assert not torch.cuda.is_initialized()
    child = os.fork()
    if child == 0:
        try:
            results = case.results({n: t.to("cuda") for n, t in tensors.items()})
            out = out[0] if isinstance(out, tuple) else out
            assert_close("out", results["out0"], out.to("cuda"), 2 * TOLERANCES[out.dtype][0])
            print("the same", flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


# --- Launches and synchronisation


@EVERY
def test_launches(case, device):
    tensors = case.tensors(device)
    case.results(tensors)
    arguments = {n: t.detach() for n, t in tensors.items() if not n.startswith("gradient")}
    if case.like:
        arguments = {n: t.requires_grad_(t.is_floating_point()) for n, t in arguments.items()}
    leaves = [t for t in arguments.values() if t.requires_grad]
    outputs = []

    def forward():
        results = getattr(oxiscan, case.op)(**arguments, **case.options)
        outputs.extend(results if isinstance(results, tuple) else [results])

    def backward():
        torch.autograd.grad(outputs, leaves, [t for n, t in tensors.items() if n.startswith("gradient")])

    assert_launches(case.forward, launches(forward))
    if case.like:
        assert_launches(case.backward, launches(backward))


def assert_launches(expected: tuple[str | tuple[str, ...], ...], actual: list[str]) -> None:
    """Nothing but these kernels; the last ones may be left out."""
    assert 1 <= len(actual) <= len(expected), actual
    assert all(name.startswith(prefix) for name, prefix in zip(actual, expected, strict=False)), actual


def launches(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches, without the filling of uninitialised memory."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler's own
            with torch.profiler.profile(activities=activities) as profile:
                call()
                torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    events.sort(key=lambda event: event.time_range.start)
    return [event.name for event in events]


@EVERY
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_host_waits_for_nothing(case, device):
    tensors = case.tensors(device)
    case.results(tensors)  # loads the kernels, and leaves memory for the next call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # a second: all of the call is queued behind it
        case.results(tensors)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# --- Errors


@EVERY
def test_float64_is_refused(case, device):
    tensors = {n: t for n, t in case.tensors(device).items() if not n.startswith("gradient")}
    before = {n: t.clone() for n, t in tensors.items()}
    op = getattr(oxiscan, case.op)
    with pytest.raises(TypeError, match=f"^{case.first}: got float64; allowed: float32, bfloat16, float16$"):
        op(**{n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, **case.options)
    for name, t in tensors.items():
        if name != case.first and t.is_floating_point():
            with pytest.raises(TypeError, match=f"^{name}: got float64; allowed: (?!.*float64)"):
                op(**tensors | {name: t.double()}, **case.options)
    assert_same_bits(tensors, before)


def test_a_state_that_is_too_wide_is_refused(device):
    tensors = inputs.state_update(dstate=257, dtype=F32, device=device)
    before = tensors["state"].clone()
    with pytest.raises(NotImplementedError, match="^state: got dstate = 257; allowed: dstate <= 256 on cuda$"):
        oxiscan.selective_state_update(**tensors)
    assert torch.equal(tensors["state"], before)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("argument", "size"), [("x", "headdim"), ("B", "dstate")])
def test_a_scan_that_is_too_wide_is_refused(argument, size, dtype, device):
    tensors = inputs.ssd(seqlen=3, **{size: 257}, dtype=dtype, device=device)
    with pytest.raises(NotImplementedError, match=f"^{argument}: got {size} = 257; allowed: {size} <= 256 on cuda$"):
        oxiscan.mamba_chunk_scan_combined(**tensors, **SCAN_OPTIONS)


WORKSPACES = ("dy", "states", "partials", "cuts", "segments", "entry_states")
CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda t: None,
    "larger": lambda t: torch.cat([t, t], dim=-1),
    "smaller": lambda t: t[..., 1:].contiguous(),
    "float64": lambda t: t.double(),
}


def change_workspaces(monkeypatch, change):
    """Have the scan's backward run with what `change` makes of each workspace and of kept states, by name."""
    make = ssd.backward_workspaces

    def changed(*arguments):
        workspaces, entry_states = make(*arguments)
        *workspaces, entry_states = (
            change(*named) for named in zip(WORKSPACES, (*workspaces, entry_states), strict=True)
        )
        return tuple(workspaces), entry_states

    monkeypatch.setattr(ssd, "backward_workspaces", changed)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", WORKSPACES)
def test_workspaces_of_the_scan_that_do_not_fit_are_refused(name, change, device, monkeypatch):
    if name == "entry_states" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("states are kept by wgmma alone")
    shape = {"batch": 1, "seqlen": 33000, "nheads": 1, "ngroups": 1, "headdim": 64, "dstate": 64}
    tensors = inputs.ssd(**shape, seq_idx=True, dtype=BF16, device=device)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out = oxiscan.mamba_chunk_scan_combined(**leaves, chunk_size=64)
    change_workspaces(monkeypatch, lambda n, t: CHANGES[change](t) if n == name else t)
    serves = {"dy": (), "segments": ("none", "larger")}.get(name, ("larger",))
    if change in serves:
        torch.autograd.grad(out.sum(), leaves["x"])
        return
    # Without kept states the workspace is not large enough.
    named = {"segments": "(partials|segments)", "entry_states": "(entry_)?states"}.get(name, name)
    with pytest.raises((TypeError, ValueError), match=f"^{named}: got "):
        torch.autograd.grad(out.sum(), leaves["x"])


# --- Convolution: edges of tiles, alignment, layouts


def compare_conv(tensors, gradients=None):
    """Outputs and gradients beside the float64 reference's."""
    gradients = gradients or [
        torch.randn(shape, device="cpu").to(tensors["x"]) for shape in (tensors["x"].shape, conv_states(tensors))
    ]
    actual = run(oxiscan.causal_conv1d_fn, tensors, CONV_OPTIONS, gradients)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    expected = run(reference.causal_conv1d_fn, exact, CONV_OPTIONS, [g.double() for g in gradients])
    for name, value in actual.items():
        assert_close(name, value, expected[name], TOLERANCES[tensors["x"].dtype][not name.startswith("out")])
    return actual


def conv_states(tensors):
    rows = tensors["cu_seqlens"].numel() - 1 if "cu_seqlens" in tensors else tensors["x"].shape[0]
    return rows, tensors["x"].shape[1], tensors["weight"].shape[1] - 1


LAYOUTS = pytest.mark.parametrize("channel_last", [False, True])


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seqlen", [1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2048, 2049, 4100])
@pytest.mark.parametrize("width", [4, 7])
def test_conv_seqlen(channel_last, dtype, seqlen, width, device):
    for dim, seq_idx in itertools.product((1, 24, 130), (False, True)):
        sizes = {"dim": dim, "seqlen": seqlen, "width": width, "channel_last": channel_last, "seq_idx": seq_idx}
        compare_conv(inputs.conv(**sizes, dtype=dtype, device=device))


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8, 63, 64, 127, 128, 129, 255, 256, 257, 640, 1000])
def test_conv_dim(channel_last, dtype, dim, device):
    for batch, width in itertools.product((1, 5), (2, 4)):
        sizes = {"batch": batch, "dim": dim, "seqlen": 70, "width": width, "channel_last": channel_last}
        compare_conv(inputs.conv(**sizes, dtype=dtype, parameters=F32, device=device))


@LAYOUTS
def test_conv_of_many_sequences(channel_last, device):
    compare_conv(inputs.conv(batch=3000, dim=9, seqlen=5, channel_last=channel_last, dtype=F32, device=device))


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("dim", "seqlen"), [(64, 96), (65, 97)])
def test_conv_views(channel_last, dtype, dim, seqlen, device):
    tensors = inputs.conv(dim=dim, seqlen=seqlen, channel_last=channel_last, seq_idx=True, dtype=dtype, device=device)
    tensors["dout"] = inputs.normal(2, dim, seqlen, dtype=dtype, device=device)
    tensors["dfinal_states"] = inputs.normal(2, dim, 3, dtype=dtype, device=device)

    def viewed(t, view):
        if t.dim() == 3 and t.shape[2] == seqlen and channel_last:
            return view(t.transpose(1, 2).contiguous()).transpose(1, 2)
        return view(t)

    dense = None
    for view in (lambda t: t, unaligned, odd_rows, part_of_a_projection, sequence_first, inputs.strided):
        for changed in (("x",), ("dout",), tuple(tensors)):
            views = {n: viewed(t, view) if n in changed and t.dim() == 3 else t for n, t in tensors.items()}
            gradients = [views.pop("dout"), views.pop("dfinal_states")]
            for seq_idx in (False, True):
                arguments = {n: t for n, t in views.items() if seq_idx or n != "seq_idx"}
                actual = compare_conv(arguments, gradients)
            for name in ("dweight", "dbias"):  # sums over tokens, in an order of each path
                actual.pop(name)
            dense = dense or actual
            assert_same_bits(actual, dense)


@LAYOUTS
def test_conv_expanded(channel_last, device):
    tensors = inputs.conv(channel_last=channel_last, dtype=BF16, device=device)
    one = [torch.ones(1, 1, 1, dtype=BF16, device=device).expand(shape) for shape in ((2, 70, 131), (2, 70, 3))]
    compare_conv(tensors, one)
    for name in ("x", "weight", "bias", "initial_states"):
        t = tensors[name]
        compare_conv(tensors | {name: t[(slice(1),) * t.dim()].expand_as(t)}, one)


@LAYOUTS
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "lengths", [(0,), (0, 0, 5), (1, 1, 1, 2, 0, 3), (2047, 1, 0, 2048, 7), (4096,), (300, 4, 4, 0, 1000)]
)
@pytest.mark.parametrize("padding", [0, 1, 9])
def test_conv_documents(channel_last, width, dtype, lengths, padding, device):
    seqlen = sum(lengths) + padding
    sizes = {"batch": 1, "dim": 37, "seqlen": seqlen, "width": width, "channel_last": channel_last}
    tensors = inputs.conv(**sizes, dtype=dtype, device=device)
    tensors["cu_seqlens"] = inputs.cu_seqlens(*lengths, device=device)
    one = tensors["initial_states"]
    each = inputs.normal(len(lengths), 37, width - 1, dtype=dtype, device=device)
    compare_conv(tensors | {"initial_states": one})
    compare_conv(tensors | {"initial_states": each})
    compare_conv(tensors | {"initial_states": each, "seq_idx": inputs.documents(1, seqlen, lowest=-1, device=device)})


@LAYOUTS
def test_cu_seqlens_that_make_no_sense_reach_nothing_else(channel_last, device):
    sizes = {"batch": 1, "dim": 16, "seqlen": 100, "channel_last": channel_last}
    tensors = inputs.conv(**sizes, optional=False, dtype=F32, device=device)
    for bounds in ([5, 2, -7, 2**31 - 1], [0, 200, 50, 100], [-1, -1, -1, -1]):
        tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        run(oxiscan.causal_conv1d_fn, tensors, {"activation": "silu", "return_final_states": True})
        oxiscan.causal_conv1d_varlen_states(tensors["x"][0].T, tensors["cu_seqlens"], 3)
    torch.cuda.synchronize(device)


# --- The convolution's steps: layouts, slots


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("parameters", [F32, None])
@pytest.mark.parametrize("dim", [1, 31, 128, 129, 1000])
def test_conv_update_of_one_token(dtype, parameters, dim, device):
    for view in (lambda t: t, unaligned, odd_rows, inputs.strided):
        for optional in (False, True):
            sizes = {"dim": dim, "state_len": 4, "slots": 5, "optional": optional, "parameters": parameters}
            tensors = inputs.conv_update(**sizes, dtype=dtype, device=device)
            compare_conv_update({n: view(t) if t.is_floating_point() else t for n, t in tensors.items()})


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_len", [4, 6])
def test_conv_slots_outside_the_state_give_nan_and_touch_nothing(indices, state_len, device):
    far = 2**31 - 1 if indices == torch.int32 else 2**40
    slots = [1, -1, 4, -2, far, -far, 3]
    tensors = inputs.conv_update(batch=7, state_len=state_len, slots=7, dtype=BF16, device=device)
    tensors["conv_state"] = tensors["conv_state"][:4].clone()
    tensors["conv_state_indices"] = torch.tensor(slots, dtype=indices, device=device)
    before = tensors["conv_state"].clone()
    out = oxiscan.causal_conv1d_update(**tensors)
    assert out[[0, 6]].isfinite().all()
    assert (out[1] == 0).all()
    assert out[2:6].isnan().all()
    assert torch.equal(tensors["conv_state"][[0, 2]], before[[0, 2]])
    assert not torch.equal(tensors["conv_state"][[1, 3]], before[[1, 3]])


# --- Norm: edges of tiles, alignment, layouts

NORM_DIMS = [
    1,
    2,
    7,
    8,
    31,
    32,
    33,
    63,
    64,
    65,
    255,
    256,
    257,
    1000,
    1023,
    1024,
    1025,
    2048,
    4096,
    8192,
    16384,
    32768,
    65536,
]
GATES = pytest.mark.parametrize("norm_before_gate", [False, True])


def compare_norm(tensors, group_size=None, **options):
    # eps: all that keeps the gradient of a group of one or two elements from cancelling out.
    options = {"eps": 0.1 if (group_size or tensors["x"].shape[-1]) <= 2 else 1e-6, "group_size": group_size} | options
    return compare(oxiscan.rmsnorm_gated, reference.rmsnorm_gated, tensors, options)


@pytest.mark.parametrize("dim", NORM_DIMS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@GATES
def test_norm_dims(dim, dtype, norm_before_gate, device):
    for rows, bias in itertools.product((1, 2, 3, 130), (False, True)):
        tensors = inputs.rmsnorm_gated(rows, dim, bias=bias, dtype=dtype, device=device)
        compare_norm(tensors, norm_before_gate=norm_before_gate)
    compare_norm(inputs.rmsnorm_gated(3, dim, z=False, bias=False, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("dim", "group_size"),
    [(21, 7), (33, 11), (64, 1), (66, 2), (264, 8), (399, 133), (1000, 125), (4095, 1365), (4096, 64), (8192, 4096),
     (65536, 32), (65534, 32767), (65536, 32768)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@GATES
def test_norm_groups(dim, group_size, dtype, norm_before_gate, device):
    for rows, bias in itertools.product((1, 130), (False, True)):
        tensors = inputs.rmsnorm_gated(rows, dim, bias=bias, dtype=dtype, parameters=F32, device=device)
        compare_norm(tensors, group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("bias", [False, True])
def test_norm_of_many_rows(bias, device):
    tensors = inputs.rmsnorm_gated(70_001, 40, bias=bias, dtype=BF16, parameters=F32, device=device)
    compare_norm(tensors, group_size=8)


def unaligned(tensor: Tensor) -> Tensor:
    """One element off 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def odd_rows(tensor: Tensor) -> Tensor:
    """Aligned data, lines whose stride is no multiple of 8."""
    dim = tensor.shape[-1]
    return tensor.new_empty(*tensor.shape[:-1], dim + 3)[..., :dim].copy_(tensor)


def part_of_a_projection(tensor: Tensor) -> Tensor:
    """Aligned lines, between others."""
    dim = tensor.shape[-1]
    return tensor.new_empty(*tensor.shape[:-1], 8 + dim + 16 * dim).split([8, dim, 16 * dim], dim=-1)[1].copy_(tensor)


def sequence_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def one_row_for_all(tensor: Tensor) -> Tensor:
    """Other values: the first row's for every row."""
    return tensor[:1, :1].expand_as(tensor)


def one_element_for_all(tensor: Tensor) -> Tensor:
    """Other values: the first element's for every element."""
    return tensor[:1, :1, :1].expand_as(tensor)


VIEWS = [
    unaligned,
    odd_rows,
    part_of_a_projection,
    sequence_first,
    one_row_for_all,
    one_element_for_all,
    inputs.strided,
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("dim", "group_size"), [(64, 64), (100, 50), (1024, 1024), (4096, 1024), (8192, 8192)])
@GATES
@pytest.mark.parametrize("bias", [False, True])
def test_norm_views(view, dtype, dim, group_size, norm_before_gate, bias, device):
    options = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    tensors = inputs.rmsnorm_gated(3, 5, dim, bias=bias, dtype=dtype, device=device)
    tensors["dout"] = inputs.normal(3, 5, dim, dtype=dtype, device=device)
    for changed in (("x",), ("z",), ("dout",), ("x", "z", "dout")):
        views = {name: view(t) if name in changed else t for name, t in tensors.items()}
        gradient = views.pop("dout")
        actual = run(oxiscan.rmsnorm_gated, views, options, [gradient])
        exact = {name: t.double() for name, t in views.items()}
        expected = run(reference.rmsnorm_gated, exact, options, [gradient.double()])
        for name, value in actual.items():
            assert_close(name, value, expected[name], TOLERANCES[dtype][name != "out0"])


@pytest.mark.parametrize("view", [lambda t: t.repeat_interleave(2)[::2], unaligned, lambda t: t[:1].expand_as(t)])
@pytest.mark.parametrize(("dtype", "parameters"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)])
@pytest.mark.parametrize("dim", [65, 1024])
def test_norm_views_of_parameters(view, dtype, parameters, dim, device):
    tensors = inputs.rmsnorm_gated(7, dim, dtype=dtype, parameters=parameters, device=device)
    compare_norm(tensors | {"weight": view(tensors["weight"])})
    compare_norm({n: view(t) if n == "weight" else t for n, t in tensors.items() if n != "bias"})
    compare_norm(tensors | {"bias": view(tensors["bias"])}, norm_before_gate=False)
    compare_norm(tensors | {name: view(tensors[name]) for name in ("weight", "bias")})


@pytest.mark.parametrize(("weight", "bias"), [(F32, BF16), (BF16, F32)])
def test_norm_parameters_of_two_dtypes(weight, bias, device):
    tensors = inputs.rmsnorm_gated(7, 100, dtype=BF16, device=device)
    compare_norm(tensors | {"weight": tensors["weight"].to(weight), "bias": tensors["bias"].to(bias)})


@GATES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [64, 2048])
def test_the_norm_has_the_same_bits_in_every_layout(dim, bias, norm_before_gate, device):
    tensors = inputs.rmsnorm_gated(9, dim, bias=bias, dtype=BF16, device=device)
    gradient = inputs.normal(9, dim, dtype=BF16, device=device)
    options = {"group_size": dim // 2, "norm_before_gate": norm_before_gate}
    dense = run(oxiscan.rmsnorm_gated, tensors, options, [gradient])
    strided = {name: inputs.strided(t) for name, t in tensors.items()}
    view = run(oxiscan.rmsnorm_gated, strided, options, [inputs.strided(gradient)])
    row = {name: t if name in ("weight", "bias") else t[3:4].clone() for name, t in tensors.items()}
    alone = run(oxiscan.rmsnorm_gated, row, options, [gradient[3:4].clone()])
    for name in ("out0", "dx", "dz"):  # gradients of parameters are sums over rows, in an order of each path
        assert torch.equal(dense[name], view[name]), name
        assert torch.equal(dense[name][3:4], alone[name]), name


# --- State passing: edges of warps and of chunks under way, alignment, layouts


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("headdim", "dstate"),
    [(1, 1), (70, 1), (1, 128), (2, 4), (3, 7), (5, 100), (33, 8), (31, 16), (80, 64), (64, 128), (1, 1001)],
)
def test_passing_sizes(headdim, dstate, dtype, device):
    sizes = {"headdim": headdim, "dstate": dstate, "dtype": dtype, "device": device}
    for nchunks in (0, 1, 2, 3, 4, 5, 7, 8, 9, 33):
        tensors = inputs.state_passing(**sizes, nchunks=nchunks)
        compare(oxiscan.state_passing, reference.state_passing, tensors, {})
        tensors["initial_states"] = tensors["initial_states"].float() * 1.01
        compare(oxiscan.state_passing, reference.state_passing, tensors, {})


@pytest.mark.parametrize("empty", ["batch", "nchunks", "nheads", "headdim", "dstate"])
def test_passing_of_nothing(empty, device):
    tensors = inputs.state_passing(**{empty: 0}, dtype=BF16, device=device)
    compare(oxiscan.state_passing, reference.state_passing, tensors, {})
    results = run(oxiscan.state_passing, {n: t for n, t in tensors.items() if n != "initial_states"}, {})
    assert all((results[name] == 0).all() for name in ("out1", "ddecay"))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (7, 24), (5, 9)])
def test_passing_has_the_same_bits_in_every_layout_and_batch(dtype, headdim, dstate, device):
    sizes = {"batch": 4, "nchunks": 11, "headdim": headdim, "dstate": dstate}
    tensors = passing(**sizes, dtype=dtype)(device=device, seed=0)
    gradients = [torch.randn_like(tensors[name]) for name in PASSING["like"]]
    dense = run(oxiscan.state_passing, tensors, {}, gradients)
    for view in (unaligned, odd_rows, part_of_a_projection, sequence_first, inputs.strided):
        for changed in (*tensors, "gradients", "all"):
            views = {n: view(t) if changed in (n, "all") else t for n, t in tensors.items()}
            incoming = [view(g) if changed in ("gradients", "all") else g for g in gradients]
            assert_same_bits(run(oxiscan.state_passing, views, {}, incoming), dense)
    for row in (slice(1, 2), slice(3, 4)):
        part = {n: t[row].clone() for n, t in tensors.items()}
        alone = run(oxiscan.state_passing, part, {}, [g[row].clone() for g in gradients])
        assert_same_bits(alone, {n: t[row] for n, t in dense.items()})


def test_passing_expanded(device):
    tensors = inputs.state_passing(headdim=8, dstate=16, dtype=F32, device=device)
    for name, t in tensors.items():
        views = tensors | {name: t[(slice(1),) * t.dim()].expand_as(t)}
        compare(oxiscan.state_passing, reference.state_passing, views, {})
    one = torch.ones((), device=device)
    gradients = [one.expand_as(tensors[name]) for name in PASSING["like"]]
    actual = run(oxiscan.state_passing, tensors, {}, gradients)
    assert_same_bits(actual, run(oxiscan.state_passing, tensors, {}, [g.clone() for g in gradients]))


# --- Scan: which kernel, documents, memory


def scan_launches(tensors):
    return launches(lambda: oxiscan.mamba_chunk_scan_combined(**tensors, **SCAN_OPTIONS))


def assert_scans(kernel, tensors, times=1):
    actual = scan_launches(tensors)
    assert len(actual) == times and all(name.startswith(kernel) for name in actual), actual


@pytest.fixture
def wgmma(device):
    """The kernel of aligned arguments in the sizes of models."""
    return "ssd_fwd_wgmma" if torch.cuda.get_device_capability(device) == (9, 0) else "ssd_fwd_mma"


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("headdim", [64, 80, 96, 128])
@pytest.mark.parametrize("dstate", [64, 128, 256])
def test_the_kernel_of_models(dtype, headdim, dstate, wgmma, device):
    shape = {"seqlen": 70, "headdim": headdim, "dstate": dstate}
    assert_scans(wgmma, inputs.ssd(**shape, seq_idx=True, dtype=dtype, device=device))


def test_the_kernel_of_other_arguments(wgmma, device):
    shape = {"seqlen": 70, "headdim": 64, "dstate": 128, "device": device}
    tensors = inputs.ssd(**shape, dtype=BF16)
    for name in ("x", "B", "C", "z"):
        for view in (unaligned, odd_rows, inputs.strided, one_row_for_all):
            kernel = wgmma if (name, view) == ("z", one_row_for_all) else "ssd_fwd_mma"
            assert_scans(kernel, tensors | {name: view(tensors[name])})
        assert_scans(wgmma, tensors | {name: part_of_a_projection(tensors[name])})
    for size in ({"headdim": 72}, {"headdim": 256}, {"dstate": 16}, {"dstate": 72}):
        assert_scans("ssd_fwd_mma", inputs.ssd(**shape | size, dtype=BF16))
    assert_scans("ssd_fwd_recurrence", inputs.ssd(**shape, dtype=F32))


@pytest.mark.parametrize(("dtype", "headdim", "most"), [(BF16, 64, 64), (F16, 8, 64), (F32, 8, 128)])
def test_long_sequences_of_few_heads_are_walked_in_segments(dtype, headdim, most, wgmma, device):
    kernel = {BF16: wgmma, F16: "ssd_fwd_mma", F32: "ssd_fwd_recurrence"}[dtype]
    for seqlen, nheads, times in ((32767, 2, 1), (32768, 2, 2), (32768, most, 2), (32768, most + 1, 1), (70000, 2, 2)):
        shape = {"seqlen": 1, "nheads": nheads, "ngroups": 1, "headdim": headdim, "dstate": 64}
        tensors = inputs.ssd(**shape, optional=False, dtype=dtype, device=device)
        tensors = {n: t if n == "A" else t.new_zeros(3, seqlen, *t.shape[2:]) for n, t in tensors.items()}
        assert_scans(kernel, tensors, times)


def test_segments_end_with_the_sequence(device):
    """130 segments, each of a 130th of the tokens rounded up to a multiple of 128, would be more than there are."""
    dtype, seqlen = F32, 16384 * 130 + 1
    shape = {"batch": 2, "seqlen": seqlen, "nheads": 1, "ngroups": 1, "headdim": 2, "dstate": 2}
    tensors = inputs.ssd(**shape, optional=False, dtype=dtype, device=device)
    out, final_states = oxiscan.mamba_chunk_scan_combined(**tensors, **SCAN_OPTIONS)
    tail = {n: t if n == "A" else t[:, -1000:] for n, t in tensors.items()}
    expected, states = oxiscan.mamba_chunk_scan_combined(**tail, **SCAN_OPTIONS)
    assert_close("out", out[:, -500:], expected[:, -500:], TOLERANCES[dtype][0])
    assert_close("final_states", final_states, states, TOLERANCES[dtype][0])


def assert_backward(kernels, tensors, dout=None):
    """What the kernels' names begin with, for the gradient of out, a dense one if not given."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = oxiscan.mamba_chunk_scan_combined(**leaves, chunk_size=64, dt_softplus=True)
    wanted = [t for t in leaves.values() if t.requires_grad]
    dout = inputs.normal(*out.shape, dtype=out.dtype, device=out.device) if dout is None else dout
    actual = launches(lambda: torch.autograd.grad(out, wanted, dout))
    assert len(actual) == len(kernels), actual
    assert all(name.startswith(kernel) for name, kernel in zip(actual, kernels, strict=True)), actual


def of_backward(kernel):
    return [f"ssd_bwd_{kernel}_states__", f"ssd_bwd_{kernel}__", "ssd_bwd_parameters"]


@pytest.fixture
def fast(wgmma):
    """Which kernels of backward are those of aligned arguments in the sizes of models."""
    return wgmma.removeprefix("ssd_fwd_")


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("headdim", [64, 80, 96, 128])
@pytest.mark.parametrize("dstate", [64, 128, 256])
def test_the_backward_of_models(dtype, headdim, dstate, fast, device):
    shape = {"seqlen": 70, "headdim": headdim, "dstate": dstate}
    assert_backward(of_backward(fast), inputs.ssd(**shape, optional=False, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("dtype", "headdim", "forward", "kernel"),
    [(BF16, 64, None, None), (BF16, 8, "ssd_fwd_mma", "mma"), (F32, 64, "ssd_fwd_recurrence", "mma")],
)
def test_launches_of_a_backward(dtype, headdim, forward, kernel, wgmma, fast, device):
    kernels = of_backward(kernel or fast)
    for z, seq_idx, is_long in itertools.product((False, True), repeat=3):
        shape = {"batch": 2, "seqlen": 32768 if is_long else 70, "nheads": 2, "headdim": headdim, "dstate": 64}
        tensors = inputs.ssd(**shape, seq_idx=seq_idx, dtype=dtype, device=device)
        if not z:
            del tensors["z"]
        has_states = not kernel and fast == "wgmma"
        gate = [forward or wgmma] * (2 if is_long and not has_states else 1)
        before = gate * z + ["ssd_bwd_cuts"] * seq_idx + kernels[:1] * is_long
        assert_backward(before + kernels, tensors)


def test_the_backward_of_other_arguments(fast, device):
    shape = {"seqlen": 70, "headdim": 64, "dstate": 128, "device": device}
    tensors = inputs.ssd(**shape, dtype=BF16)
    del tensors["z"]
    dout = inputs.normal(*tensors["x"].shape, dtype=BF16, device=device)
    for view in (unaligned, odd_rows, inputs.strided, one_row_for_all):
        for name in ("x", "B", "C"):
            assert_backward(of_backward("mma"), tensors | {name: view(tensors[name])})
        assert_backward(of_backward("mma"), tensors, view(dout))
    for name in ("x", "B", "C"):
        assert_backward(of_backward(fast), tensors | {name: part_of_a_projection(tensors[name])})
    assert_backward(of_backward(fast), tensors, part_of_a_projection(dout))
    for size in ({"headdim": 72}, {"headdim": 256}, {"dstate": 16}, {"dstate": 72}):
        assert_backward(of_backward("mma"), inputs.ssd(**shape | size, optional=False, dtype=BF16))


@pytest.mark.parametrize(("dtype", "headdim", "dstate"), [(F32, 8, 12), (BF16, 8, 12), (BF16, 64, 128), (F16, 96, 64)])
@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("seqlen", [100, 33000])
def test_scan_with_cu_seqlens_that_make_no_sense(dtype, headdim, dstate, indices, seqlen, device):
    shape = {"seqlen": seqlen, "nheads": 1, "ngroups": 1, "headdim": headdim, "dstate": dstate}
    tensors = inputs.ssd(batch=1, **shape, dtype=dtype, device=device)
    states = inputs.normal(3, 1, headdim, dstate, dtype=dtype, device=device)
    far = 2**31 - 1 if indices == torch.int32 else 2**40
    for bounds in ([5, 2, -7, far], [0, 2 * seqlen, 50, seqlen], [-1] * 4, [far, -far, far, -far], [-far, 7, 7, far]):
        tensors["cu_seqlens"] = torch.tensor(bounds, dtype=indices, device=device)
        for initial_states in (states, states[:1].clone()):
            arguments = tensors | {"initial_states": initial_states}
            run(oxiscan.mamba_chunk_scan_combined, arguments, SCAN_OPTIONS | {"return_varlen_states": True})
    torch.cuda.synchronize(device)


@pytest.mark.parametrize(("dtype", "headdim", "dstate"), [(F32, 8, 12), (BF16, 8, 12), (BF16, 64, 128)])
def test_a_captured_scan_takes_other_documents(dtype, headdim, dstate, device):
    """cu_seqlens is padded by repeating its last value: as many documents as the graph was captured with."""
    options = SCAN_OPTIONS | {"return_varlen_states": True}
    make = scan(batch=1, seqlen=300, headdim=headdim, dstate=dstate, lengths=(100, 60, 140, 0, 0, 0), dtype=dtype)
    static = make(device=device, seed=0)
    gradients = [
        inputs.normal(*static["x"].shape, dtype=dtype, device=device),
        None,
        static["initial_states"].to(dtype),
    ]

    def call():
        return run(oxiscan.mamba_chunk_scan_combined, static, options, gradients)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths in ((300, 0, 0, 0, 0, 0), (0, 1, 2, 64, 65, 100), (64, 64, 64, 64, 0, 0), (7, 0, 0, 0, 0, 0)):
        static["cu_seqlens"].copy_(inputs.cu_seqlens(*lengths, device=device))
        graph.replay()
        assert_same_bits(captured, call())
        for document, length in enumerate(lengths):
            if length == 0:
                assert torch.equal(captured["out2"][document], static["initial_states"][document].to(dtype))
                assert torch.equal(captured["dinitial_states"][document], gradients[2][document].float())


@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize(("x", "tokens"), [(Tensor.clone, 128), (unaligned, 64)])
def test_states_of_the_scan_s_backward(x, tokens, z, device, monkeypatch):
    """In one slot for so many tokens, in others for documents with states; forward keeps those of 128."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        tokens = 64
    shape = {"batch": 1, "seqlen": 1000, "nheads": 2, "ngroups": 1, "headdim": 64, "dstate": 64}
    tensors = inputs.ssd(**shape, optional=False, dtype=BF16, device=device)
    tensors |= {"x": x(tensors["x"]), "cu_seqlens": inputs.cu_seqlens(500, 0, 300, device=device)}
    if z:
        tensors["z"] = torch.randn_like(tensors["x"])
    seen = {}
    change_workspaces(monkeypatch, lambda n, t: seen.setdefault(n, t))

    def slots(gradients=None, **states):
        seen.clear()
        options = {"chunk_size": 64, "return_final_states": True, "return_varlen_states": True}
        run(oxiscan.mamba_chunk_scan_combined, tensors | states, options, gradients)
        found, kept = (0 if t is None else t.numel() / (2 * 64 * 64) for t in (seen["states"], seen["entry_states"]))
        return (found, kept) if tokens == 128 else found

    def expected(exits, entries):
        return (exits, entries) if tokens == 128 else exits + entries

    of_tokens = -(-1000 // tokens)
    gradients = [torch.randn_like(tensors["x"]), torch.randn(1, 2, 64, 64, device=device), None]
    initial_states = torch.randn(3, 2, 64, 64, device=device)
    assert slots(gradients) == expected(of_tokens + 1, of_tokens)
    assert slots(gradients, initial_states=initial_states) == expected(of_tokens + 1, of_tokens + 3)
    assert slots() == expected(of_tokens + 1 + 3, of_tokens)


@pytest.mark.parametrize("headdim", [64, 80, 96, 128])
def test_what_a_scan_saves(headdim, device):
    """The arguments and, where the fast kernels serve it in whole slices, a state for every 128 tokens."""
    tensors = inputs.ssd(seqlen=1000, headdim=headdim, dstate=64, dtype=BF16, device=device)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        oxiscan.mamba_chunk_scan_combined(**leaves, chunk_size=64)
    pointers = {t.data_ptr() for t in leaves.values()}
    beside = [t for t in saved if t.data_ptr() not in pointers]
    keeps = headdim != 80 and torch.cuda.get_device_capability(device) == (9, 0)
    assert [t.dtype for t in beside] == [BF16] * keeps
    # Of 2 sequences, as many slots as 128 tokens are in them and one for an initial state, of 4 heads.
    assert sum(t.numel() for t in beside) == keeps * 2 * (8 + 1) * 4 * headdim * 64


# Of long128k what six parts of segments add to the states of 32 heads.
@pytest.mark.parametrize(("model", "allowed"), [("hybrid8b_tp4", 4 * 2**20), ("long128k", 7 * 2**20)])
def test_a_scan_keeps_little_beside_its_result(model, allowed, device):
    case = MODELS[f"{model}/ssd"]
    tensors = case.tensors(BF16, device)

    def call():
        with torch.no_grad():
            return oxiscan.mamba_chunk_scan_combined(**tensors, **case.options)

    assert peak_device_memory(call, device) - tensors["x"].nbytes <= allowed


# --- State update: edges of tiles, alignment, layouts, slots

DSTATES = [1, 7, 8, 12, 16, 24, 32, 48, 64, 96, 100, 128, 192, 256]


def compare_steps(tensors):
    """With dt_softplus: a state that only decays stays in float16's range."""
    return compare_update(tensors, dt_softplus=True)


def expanded(tensors):
    """One value a head of dt, A, D and dt_bias, as Mamba-2 passes them."""
    values = {name: tensors[name][..., :1].expand_as(tensors[name]) for name in ("dt", "D", "dt_bias")}
    return tensors | values | {"A": tensors["A"][..., :1, :1].expand_as(tensors["A"])}


@pytest.mark.parametrize("dstate", DSTATES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("state", [F32, BF16, F16])
def test_state_update_dstate(dstate, dtype, state, device):
    sizes = {"dim": 65, "dstate": dstate, "slots": 5, "dtype": dtype, "state": state, "device": device}
    compare_steps(inputs.state_update(**sizes))
    compare_steps(inputs.state_update(**sizes, seqlen=3, intermediate=True, parameters=F32))
    compare_steps(expanded(inputs.state_update(**sizes, parameters=F32)))


@pytest.mark.parametrize("dim", [1, 3, 31, 32, 33, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("dstate", [7, 16, 128, 256])
@pytest.mark.parametrize("seqlen", [None, 3])
@pytest.mark.parametrize(("dtype", "state"), [(F32, F32), (BF16, F32), (BF16, BF16)])
def test_state_update_dim(dim, dstate, seqlen, dtype, state, device):
    sizes = {"dim": dim, "dstate": dstate, "seqlen": seqlen, "dtype": dtype, "state": state, "device": device}
    compare_steps(inputs.state_update(**sizes))
    compare_steps(expanded(inputs.state_update(**sizes)))


@pytest.mark.parametrize(("dim", "dstate"), [(5120, 16), (2050, 128), (33, 5)])
def test_state_update_without_heads(dim, dstate, device):
    sizes = {"nheads": None, "ngroups": None, "dim": dim, "dstate": dstate}
    compare_steps(inputs.state_update(**sizes, dtype=BF16, parameters=F32, state=F32, device=device))


@pytest.mark.parametrize("decays", ["of a head", "of each element"])
@pytest.mark.parametrize("parameters", [F32, BF16])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("dstate", [16, 128])
def test_state_update_of_many_sequences(decays, parameters, state, dstate, device):
    sizes = {"batch": 100, "nheads": 16, "dim": 64, "dstate": dstate, "ngroups": 2, "slots": 101}
    tensors = inputs.state_update(**sizes, dtype=BF16, parameters=parameters, state=state, device=device)
    compare_steps(expanded(tensors) if decays == "of a head" else tensors)


def test_indices_that_the_kernel_before_writes(device):
    """A step starts while that one may still run: it must not use what it read of them then."""
    sizes = {"batch": 4, "dim": 64, "dstate": 128, "slots": 8}
    tensors = inputs.state_update(**sizes, dtype=BF16, state=F32, device=device)
    alone = tensors | {"state": tensors["state"].clone()}
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(8, generator=generator)[:4].to(device) for _ in range(100)]
    for order in orders:
        tensors["state_batch_indices"].copy_(order)
        oxiscan.selective_state_update(**tensors, dt_softplus=True)
    for order in orders:
        torch.cuda.synchronize(device)
        oxiscan.selective_state_update(**alone | {"state_batch_indices": order}, dt_softplus=True)
    assert torch.equal(tensors["state"], alone["state"])


SENTINEL = 7.0
#: A state (slots, nheads, dim, dstate) within a larger tensor.
POOLS = {
    "of layers": lambda s, h, d, n: ((s, 3, h, d, n), lambda pool: pool[:, 1]),
    "of wider rows": lambda s, h, d, n: ((s, h, d, n + 8), lambda pool: pool[..., :n]),
    "of rows of odd stride": lambda s, h, d, n: ((s, h, d, n + 3), lambda pool: pool[..., :n]),
    "unaligned": lambda s, h, d, n: ((s * h * d * n + 1,), lambda pool: pool[1:].view(s, h, d, n)),
    "dstate first": lambda s, h, d, n: ((s, h, n, d), lambda pool: pool.transpose(-1, -2)),
    "heads last": lambda s, h, d, n: ((s, d, n, h), lambda pool: pool.permute(0, 3, 1, 2)),
    "every other element": lambda s, h, d, n: ((s, h, d, 2 * n), lambda pool: pool[..., ::2]),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("dim", "dstate"), [(64, 128), (33, 20)])
def test_state_update_within_a_pool(pool, dtype, dim, dstate, device):
    tensors = inputs.state_update(dim=dim, dstate=dstate, slots=5, dtype=dtype, device=device)
    shape, view = POOLS[pool](*tensors["state"].shape)
    memory = torch.full(shape, SENTINEL, dtype=dtype, device=device)
    tensors["state"] = view(memory).copy_(tensors["state"])
    compare_steps(tensors)
    tensors["state"].fill_(SENTINEL)
    assert (memory == SENTINEL).all()


@pytest.mark.parametrize("view", [unaligned, odd_rows, part_of_a_projection, inputs.strided])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seqlen", [None, 3])
def test_state_update_views(view, dtype, seqlen, device):
    tensors = inputs.state_update(seqlen=seqlen, dim=64, dstate=128, dtype=dtype, device=device)
    for changed in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"):
        compare_steps({n: view(t) if n == changed else t.clone() for n, t in tensors.items()})
    compare_steps({n: t.clone() if n == "state" else view(t) for n, t in tensors.items()})


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("dstate", [128, 7])
def test_slots_outside_the_state_give_nan_and_touch_nothing(indices, step, dstate, device):
    far = 2**31 - 1 if indices == torch.int32 else 2**40
    slots = [1, -1, 4, -2, far, -far, 3]
    sizes = {"batch": len(slots), "seqlen": 2, "dim": 64, "dstate": dstate, "slots": 10, "intermediate": True}
    tensors = inputs.state_update(**sizes, dtype=F32, device=device)
    tensors = {n: t[:4].clone() if n in WRITTEN else t for n, t in tensors.items()}
    tensors["state_batch_indices"] = torch.tensor(slots, dtype=indices, device=device).repeat_interleave(step)[::step]
    for name in WRITTEN:
        tensors[name][[0, 2]] = SENTINEL
    kept = [0, 6]
    alone = {n: t[kept] if n in ("x", "dt", "B", "C", "z") else t.clone() for n, t in tensors.items()}
    alone["state_batch_indices"] = torch.tensor([1, 3], dtype=indices, device=device)
    out = oxiscan.selective_state_update(**tensors)
    assert torch.equal(out[kept], oxiscan.selective_state_update(**alone))
    assert (out[1] == 0).all()
    assert out[2:6].isnan().all()
    for name in WRITTEN:
        assert torch.equal(tensors[name], alone[name])
        assert (tensors[name][[0, 2]] == SENTINEL).all()


def test_only_slots_outside_the_state(device):
    tensors = inputs.state_update(batch=2, slots=2, dtype=BF16, state=F32, device=device)
    tensors["state_batch_indices"] = torch.tensor([2, -2], device=device)
    tensors["state"].fill_(SENTINEL)
    assert oxiscan.selective_state_update(**tensors).isnan().all()
    assert (tensors["state"] == SENTINEL).all()


@pytest.mark.parametrize("dstate", [128, 7])
@pytest.mark.parametrize("intermediate", [F32, BF16, F16])
@pytest.mark.parametrize("state", [F32, BF16])
def test_intermediate_states_in_another_dtype(dstate, intermediate, state, device):
    tensors = inputs.state_update(seqlen=4, dim=64, dstate=dstate, slots=5, dtype=BF16, state=state, device=device)
    shape = (5, 4, *tensors["state"].shape[1:])
    for view in (torch.clone, inputs.strided, unaligned):
        states = view(torch.zeros(shape, dtype=intermediate, device=device))
        compare_steps({n: t.clone() for n, t in tensors.items()} | {"intermediate_ssm_states": states})


@pytest.mark.parametrize("dstate", [8, 128, 7])
@pytest.mark.parametrize("A", ["each", "one"])
def test_a_hundred_thousand_tiny_decays(dstate, A, device):
    """A decay of 1 - 1e-5 rounded to float32 would be off by 3e-3 of what it forgets, the same way at every token."""
    seqlen = 100_000
    tensors = inputs.state_update(
        batch=1, seqlen=seqlen, nheads=1, dim=2, ngroups=1, dstate=dstate, dtype=F32, device="cpu"
    )
    tensors = {n: tensors[n] for n in ("state", "x", "dt", "A", "B", "C")}
    tensors["dt"] = 1e-5 * (0.5 + tensors["dt"].abs().clamp(max=1.0))
    tensors["A"] = -0.5 - tensors["A"].abs().clamp(max=1.0)
    if A == "one":
        tensors["dt"] = tensors["dt"][..., :1].expand_as(tensors["dt"])
        tensors["A"] = tensors["A"][:, :1, :1].expand_as(tensors["A"])
    # Every state in closed form: exp(A c) (state + sum of exp(-A c) dt x B), c the sum of dt, at most 1.5.
    exact = {n: t.double() for n, t in tensors.items()}
    dt, x, B, C = (exact[n][0, :, 0] for n in ("dt", "x", "B", "C"))
    decay = exact["A"][0] * dt.cumsum(0)[:, :, None]
    added = (-decay).exp() * (dt * x)[:, :, None] * B[:, None, :]
    states = decay.exp() * (exact["state"][0, 0] + added.cumsum(0))
    on_device = {n: t.to(device) for n, t in tensors.items()}
    if A == "one":
        on_device |= {n: on_device[n][..., :1].expand_as(on_device[n]) for n in ("dt", "A")}
    out = oxiscan.selective_state_update(**on_device)
    assert_close("state", on_device["state"][0, 0].cpu(), states[-1], TOLERANCES[F32][0])
    assert_close("out", out[0, :, 0].cpu(), (states * C[:, None, :]).sum(-1), TOLERANCES[F32][0])


@pytest.mark.parametrize("batch", [3, 200])
@pytest.mark.parametrize("parameters", [F32, BF16])
@pytest.mark.parametrize("dstate", [64, 128])
def test_the_step_has_the_same_bits_in_every_layout(batch, parameters, dstate, device):
    sizes = {"batch": batch, "dim": 64, "dstate": dstate}
    tensors = inputs.state_update(**sizes, dtype=BF16, parameters=parameters, state=F32, device=device)
    views = {name: inputs.strided(t) for name, t in tensors.items()}
    assert torch.equal(oxiscan.selective_state_update(**tensors), oxiscan.selective_state_update(**views))
    assert torch.equal(tensors["state"], views["state"])


# --- Above 2^31 elements


def needs_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory; {free:.1f} GiB are free")


@GATES
def test_above_2_31_elements_of_the_norm(norm_before_gate, device):
    needs_memory(40)
    rows, dim = 2**21 + 3, 1024
    options = {"norm_before_gate": norm_before_gate, "group_size": 512}
    generator = torch.Generator(device).manual_seed(0)
    x, z, dout = (torch.randn(rows, dim, dtype=BF16, device=device, generator=generator) for _ in range(3))
    assert x.numel() > 2**31
    weight = inputs.normal(dim, dtype=F32, device=device)
    actual = run(oxiscan.rmsnorm_gated, {"x": x, "weight": weight, "z": z}, options, [dout])
    dweight = torch.zeros(dim, dtype=torch.float64, device=device)
    compared = (0, 2**19 + 1, 2**20, 2**21 - 2)
    for begin in range(0, rows, 2**15):
        part = {"x": x[begin : begin + 2**15], "weight": weight, "z": z[begin : begin + 2**15]}
        part = {name: t.double() for name, t in part.items()}
        expected = run(reference.rmsnorm_gated, part, options, [dout[begin : begin + 2**15].double()])
        dweight += expected["dweight"]
        for row in compared:
            if begin <= row < begin + 2**15:
                for name in ("out0", "dx", "dz"):
                    few = slice(row - begin, row - begin + 5)
                    value = actual[name][begin : begin + 2**15][few]
                    assert_close(f"{name} from row {row}", value, expected[name][few], TOLERANCES[BF16][name != "out0"])
    for name in ("out0", "dx", "dz"):
        last = slice(rows - 3, rows)
        assert_close(f"{name}'s last rows", actual[name][last], expected[name][-3:], TOLERANCES[BF16][name != "out0"])
        assert all(part.isfinite().all() for part in actual[name].split(2**18))
    assert_close("dweight", actual["dweight"], dweight, TOLERANCES[F32][1])


@LAYOUTS
def test_above_2_31_elements_of_the_convolution(channel_last, device):
    needs_memory(30)
    dim, seqlen, window = 1024, 2**21 + 9, 64
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, seqlen, dim) if channel_last else (1, dim, seqlen)
    x, dout = (torch.randn(shape, dtype=BF16, device=device, generator=generator) for _ in range(2))
    if channel_last:
        x, dout = x.transpose(1, 2), dout.transpose(1, 2)
    assert x.numel() > 2**31
    weight = inputs.normal(dim, 4, scale=0.5, dtype=F32, device=device)
    actual = run(oxiscan.causal_conv1d_fn, {"x": x, "weight": weight}, {"activation": "silu"}, [dout])
    for begin in (0, 2**19 - 20, 2**20 + 12345, 2**21 - 30, seqlen - window):
        part = {"x": x[..., begin : begin + window].double(), "weight": weight.double()}
        expected = run(
            reference.causal_conv1d_fn, part, {"activation": "silu"}, [dout[..., begin : begin + window].double()]
        )
        first = 3 if begin else 0  # what earlier tokens reach
        last = window if begin + window == seqlen else window - 3
        for name in ("out0", "dx"):
            inside = slice(2 * first, last)
            value = actual[name][..., begin : begin + window][..., inside]
            assert_close(f"{name} from {begin}", value, expected[name][..., inside], TOLERANCES[BF16][name == "dx"])
    total = torch.zeros(dim, 4, dtype=torch.float64, device=device)
    for begin in range(0, seqlen, 2**15):
        low = max(begin - 3, 0)
        part = {"x": x[..., low : begin + 2**15].double(), "weight": weight.double()}
        gradient = dout[..., low : begin + 2**15].double()
        gradient[..., : begin - low] = 0
        total += run(reference.causal_conv1d_fn, part, {"activation": "silu"}, [gradient])["dweight"]
    assert_close("dweight", actual["dweight"], total, TOLERANCES[F32][1])


@pytest.mark.parametrize(
    ("dtype", "dstate", "kernel"), [(BF16, 64, "wgmma"), (BF16, 72, "ssd_fwd_mma"), (F32, 64, "ssd_fwd_recurrence")]
)
def test_above_2_31_elements_of_the_scan(dtype, dstate, kernel, wgmma, device):
    needs_memory(40)
    nheads, headdim, window = 64, 64, 300
    seqlen = 2**31 // (nheads * headdim) + 333
    generator = torch.Generator(device).manual_seed(0)
    shape = {"batch": 1, "seqlen": 1, "nheads": nheads, "headdim": headdim, "ngroups": nheads, "dstate": dstate}
    tensors = inputs.ssd(**shape, dtype=dtype, parameters=F32, device=device)
    for name in ("x", "dt", "B", "C"):
        shape = (1, seqlen, *tensors[name].shape[2:])
        tensors[name] = torch.randn(shape, dtype=tensors[name].dtype, device=device, generator=generator)
    del tensors["z"], tensors["dt_bias"]
    assert all(tensors[name].numel() > 2**31 for name in ("x", "B", "C"))
    out, final_states = oxiscan.mamba_chunk_scan_combined(**tensors, **SCAN_OPTIONS)
    # States decay by e^-0.16 a token or faster: what comes before a window leaves no trace in its second half.
    for end in (window, seqlen // 2 + 101, 2**31 // (nheads * headdim) + 20, seqlen):
        part = {n: t[:, end - window : end] if n in ("x", "dt", "B", "C") else t for n, t in tensors.items()}
        if end != window:
            del part["initial_states"]
        part = {name: t.double() for name, t in part.items()}
        expected, expected_states = reference.mamba_chunk_scan_combined(**part, **SCAN_OPTIONS)
        half = slice(window // 2, None)
        assert_close(f"out to {end}", out[:, end - window : end][:, half], expected[:, half], TOLERANCES[dtype][0])
    assert_close("final_states", final_states, expected_states, TOLERANCES[dtype][0])
    assert all(part.isfinite().all() for part in out.split(2**14, dim=1))
    del out
    assert_scans(wgmma if kernel == "wgmma" else kernel, tensors, 2)


@pytest.mark.parametrize(("dstate", "kernel"), [(64, None), (72, "mma")])
def test_above_2_31_elements_of_the_gradients_of_the_scan(dstate, kernel, fast, device):
    needs_memory(64)
    nheads, headdim, window = 64, 64, 300
    seqlen = 2**31 // (nheads * headdim) + 333
    generator = torch.Generator(device).manual_seed(0)
    shape = {"batch": 1, "seqlen": 1, "nheads": nheads, "headdim": headdim, "ngroups": nheads, "dstate": dstate}
    tensors = inputs.ssd(**shape, dtype=BF16, parameters=F32, device=device)

    def drawn(like):
        return torch.randn((1, seqlen, *like.shape[2:]), dtype=like.dtype, device=device, generator=generator)

    by_token = ("x", "dt", "B", "C")
    dout = drawn(tensors["x"])
    tensors |= {name: drawn(tensors[name]) for name in by_token}
    del tensors["z"], tensors["dt_bias"]
    dfinal = torch.randn(tensors["initial_states"].shape, device=device, generator=generator)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    outputs = oxiscan.mamba_chunk_scan_combined(**leaves, **SCAN_OPTIONS)
    actual = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), [dout, dfinal]), strict=True))
    del outputs
    tensors = {name: t.detach() for name, t in leaves.items()}
    assert all(actual[name].numel() > 2**31 for name in ("x", "B", "C"))
    # States decay by e^-0.16 a token or faster: what lies outside a window leaves no trace in its middle.
    for end in (window, seqlen // 2 + 101, 2**31 // (nheads * headdim) + 20, seqlen):
        tokens = slice(end - window, end)
        part = {n: t[:, tokens] if n in by_token else t for n, t in tensors.items()}
        if end != window:
            del part["initial_states"]
        part = {name: t.double() for name, t in part.items()}
        gradients = [dout[:, tokens].double(), dfinal.double() * (end == seqlen)]
        expected = run(reference.mamba_chunk_scan_combined, part, SCAN_OPTIONS, gradients)
        middle = slice(0 if end == window else window // 3, window if end == seqlen else 2 * window // 3)
        for name in by_token:
            value = actual[name][:, tokens][:, middle]
            assert_close(f"d{name} to {end}", value, expected[f"d{name}"][:, middle], TOLERANCES[BF16][1])
        if end == window:
            assert_close("dinitial_states", actual["initial_states"], expected["dinitial_states"], TOLERANCES[BF16][1])
    for name, gradient in actual.items():
        parts = gradient.split(2**14, dim=1) if name in by_token else [gradient]
        assert all(part.isfinite().all() for part in parts), name
    del actual
    # Two segments.
    states, *others = of_backward(kernel or fast)
    assert_backward([states, states, *others], tensors, dout)


def test_above_2_31_elements_of_chunk_states(device):
    needs_memory(24)
    nchunks, nheads, headdim, dstate = 513, 512, 64, 128
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, nchunks, nheads, headdim, dstate)
    states, dbefore = (torch.randn(shape, dtype=BF16, device=device, generator=generator) for _ in range(2))
    assert states.numel() > 2**31
    decay = -torch.rand(shape[:3], device=device, generator=generator)
    dfinal = torch.randn(1, *shape[2:], device=device, generator=generator)
    actual = run(oxiscan.state_passing, {"states": states, "decay": decay}, {}, [dbefore, dfinal])
    for head in (0, 1, 255, 510, 511):
        part = {"states": states[:, :, [head]].double(), "decay": decay[:, :, [head]].double()}
        gradients = [dbefore[:, :, [head]].double(), dfinal[:, [head]].double()]
        expected = run(reference.state_passing, part, {}, gradients)
        for name, value in actual.items():
            own = value[:, [head]] if name == "out1" else value[:, :, [head]]
            assert_close(f"{name} of head {head}", own, expected[name], TOLERANCES[BF16][name.startswith("d")])
    assert all(part.isfinite().all() for name in ("out0", "dstates") for part in actual[name].split(16, dim=1))


def test_above_2_31_elements_of_a_state(device):
    needs_memory(16)
    nheads, dim, dstate = 64, 64, 128
    slots = 2**31 // (nheads * dim * dstate) + 3
    tensors = inputs.state_update(
        batch=4, nheads=nheads, dim=dim, dstate=dstate, dtype=BF16, parameters=F32, device=device
    )
    used = [slots - 1, 0, slots - 3, slots // 2 + 1]
    state = torch.full((slots, nheads, dim, dstate), SENTINEL, dtype=BF16, device=device)
    assert state.numel() > 2**31
    for row, slot in enumerate(used):
        state[slot] = tensors["state"][row]
    indices = torch.tensor(used, dtype=torch.int32, device=device)
    out = oxiscan.selective_state_update(**tensors | {"state": state}, state_batch_indices=indices, dt_softplus=True)
    assert torch.equal(out, compare_steps(tensors))
    for row, slot in enumerate(used):
        assert torch.equal(state[slot], tensors["state"][row])
        state[slot] = SENTINEL
    assert all((part == SENTINEL).all() for part in state.split(256))


# --- The sanitizer

SANITIZER = Path(__file__).with_name("sanitizer.py")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH")
def test_no_access_is_out_of_bounds():
    command = [sys.executable, SANITIZER, "memcheck", "--jobs", str(min(os.cpu_count() or 1, 8))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
