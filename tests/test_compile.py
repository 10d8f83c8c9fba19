"""torch.compile, torch.export, fake tensors, autocast, and the registration of every kernel with torch.library."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import oxiscan
from oxiscan import _C
from oxiscan.ops import _kernels
from oxiscan.testing import assert_close, inputs, run

# What torch's own code does: dynamo instantiates the class of a Function that it traces, inductor imports modules that
# use torch.jit, a decomposition of an exported program copies its tree of arguments.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def norm(batch, seqlen, dtype, device, optional=True):
    x, z = (inputs.normal(batch, seqlen, 8, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (inputs.normal(8, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "weight": weight} | ({"bias": bias, "z": z} if optional else {})


def passing(batch, seqlen, dtype, device, optional=True):
    states = inputs.normal(batch, seqlen, 2, 4, 5, dtype=dtype, device=device)
    decay = -inputs.normal(batch, seqlen, 2, dtype=torch.float32, device=device).abs()
    initial_states = inputs.normal(batch, 2, 4, 5, dtype=dtype, device=device)
    return {"states": states, "decay": decay} | ({"initial_states": initial_states} if optional else {})


def state_update(batch, seqlen, dtype, device):
    tensors = inputs.state_update(batch=batch, seqlen=None, dim=6, dtype=dtype, device=device)
    return {k: t for k, t in tensors.items() if k not in ("D", "z", "dt_bias")}


def packed(make, batch, seqlen, dtype, device, **sizes):
    """`batch` documents with a state each, and some tokens past them."""
    tensors = make(batch=1, seqlen=seqlen, dtype=dtype, device=device, **sizes)
    states = make(batch=batch, seqlen=1, dtype=dtype, device=device, **sizes)
    tensors |= {name: states[name] for name in tensors if name.startswith("initial_")}
    return tensors | {"cu_seqlens": inputs.cu_seqlens(*[seqlen // batch] * batch, device=device)}


def varlen(batch, seqlen, dtype, device, optional=True):
    """`batch` documents of a chunk each."""
    tensors = packed(inputs.ssd, batch, seqlen, dtype, device, optional=optional)
    for name in ("x", "dt", "B", "C", "z"):
        if name in tensors:
            tensors[name] = tensors[name].squeeze(0)
    tensors["cu_chunk_seqlens"] = tensors.pop("cu_seqlens")
    tensors["seq_idx"] = tensors["last_chunk_indices"] = torch.arange(batch, dtype=torch.int32, device=device)
    return tensors | {"out": torch.zeros_like(tensors["x"])}


def varlen_states(batch, seqlen, dtype, device):
    x = inputs.normal(seqlen, 6, dtype=dtype, device=device)
    return {"x": x, "cu_seqlens": inputs.cu_seqlens(*[seqlen // batch] * batch, device=device)}


conv = partial(inputs.conv, dim=6)
scan, split = oxiscan.mamba_chunk_scan_combined, oxiscan.mamba_split_conv1d_scan_combined

#: name: (op, what makes its tensors, its other arguments)
CASES = {
    "conv": (oxiscan.causal_conv1d_fn, partial(conv, optional=False), {}),
    "conv_all": (
        oxiscan.causal_conv1d_fn,
        partial(conv, seq_idx=True, channel_last=True),
        {"activation": "silu", "return_final_states": True},
    ),
    "scan": (scan, partial(inputs.ssd, optional=False), {"chunk_size": 8}),
    "scan_all": (
        scan,
        partial(inputs.ssd, seq_idx=True),
        {"chunk_size": 8, "dt_softplus": True, "dt_limit": (0.01, 2.0), "return_final_states": True},
    ),
    "split": (split, partial(inputs.split_conv1d_scan, states=False), {"chunk_size": 8, "ngroups": 2}),
    "split_all": (
        split,
        partial(inputs.split_conv1d_scan, norm=True, outproj=True, seq_idx=True),
        {"chunk_size": 8, "ngroups": 2, "return_final_states": True, "return_final_conv_states": True},
    ),
    "conv_packed": (oxiscan.causal_conv1d_fn, partial(packed, conv), {"return_final_states": True}),
    "scan_packed": (scan, partial(packed, inputs.ssd), {"chunk_size": 8, "return_varlen_states": True}),
    "split_packed": (
        split,
        partial(packed, inputs.split_conv1d_scan),
        {"chunk_size": 8, "ngroups": 2, "return_varlen_states": True},
    ),
    "mamba1": (oxiscan.selective_scan_fn, partial(inputs.selective_scan, optional=False), {}),
    "mamba1_all": (
        oxiscan.selective_scan_fn,
        partial(inputs.selective_scan, fixed="B", seq_idx=True),
        {"delta_softplus": True, "return_last_state": True},
    ),
    "mamba1_packed": (
        oxiscan.selective_scan_fn,
        partial(packed, inputs.selective_scan),
        {"return_varlen_states": True},
    ),
    "mamba_inner": (oxiscan.mamba_inner_fn, partial(inputs.mamba_inner, norm=True), {}),
    "passing": (oxiscan.state_passing, partial(passing, optional=False), {}),
    "passing_all": (oxiscan.state_passing, passing, {}),
    "norm": (oxiscan.rmsnorm_gated, partial(norm, optional=False), {}),
    "norm_all": (oxiscan.rmsnorm_gated, norm, {"eps": 1e-3, "group_size": 4, "norm_before_gate": False}),
}
#: The same for the ops that carry no gradient, most of which write to an argument.
UPDATES = {
    "state_update": (oxiscan.selective_state_update, state_update, {}),
    "state_update_all": (
        oxiscan.selective_state_update,
        partial(inputs.state_update, dim=6, slots=11, intermediate=True),
        {"dt_softplus": True},
    ),
    "conv_update": (oxiscan.causal_conv1d_update, partial(inputs.conv_update, dim=6, optional=False), {}),
    "conv_update_all": (
        oxiscan.causal_conv1d_update,
        partial(inputs.conv_update, dim=6, circular=True, slots=11, intermediate=True),
        {"activation": "silu"},
    ),
    "varlen_states": (oxiscan.causal_conv1d_varlen_states, varlen_states, {"state_len": 3}),
    "varlen": (oxiscan.mamba_chunk_scan_combined_varlen, partial(varlen, optional=False), {"chunk_size": 8}),
    "varlen_all": (
        oxiscan.mamba_chunk_scan_combined_varlen,
        varlen,
        {"chunk_size": 8, "dt_softplus": True, "return_raw_states": True},
    ),
}
# Unlike each other and all other sizes: torch.compile takes sizes that are equal at first to be equal for good.
SIZES = [(7, 29), (9, 64), (5, 33)]


@pytest.fixture(autouse=True)
def compile_anew():
    """What was compiled for other tests, in this process or before, is not used again."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def update(op, tensors, options):
    """The result of an update op, and what it leaves in its arguments."""
    tensors = {k: t.clone() for k, t in tensors.items()}
    result = op(**tensors, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    return {f"out{i}": t for i, t in enumerate(outputs)} | tensors


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert actual[name].stride() == value.stride() and actual[name].dtype == value.dtype, name


def skip_without_kernels(op, device):
    """dynamo wraps what an op without CUDA kernels raises, which `conftest` would otherwise skip by."""
    if device.type == "cuda" and op.__name__ not in _C.build_info()["cuda_ops"]:
        pytest.skip(f"{op.__name__} has no CUDA kernels yet")


def assert_compiles(case, device, **options_of_compile):
    execute = update if case in UPDATES else run
    op, make, options = (CASES | UPDATES)[case]
    skip_without_kernels(op, device)
    compiled = torch.compile(op, fullgraph=True, **options_of_compile)
    for i, (batch, seqlen) in enumerate(SIZES):
        tensors = make(batch=batch, seqlen=seqlen, dtype=torch.float32, device=device)
        # Sizes that have changed once are dynamic from then on.
        with torch.compiler.set_stance("fail_on_recompile" if i == 2 else "default"):
            actual = execute(compiled, tensors, options)
        assert_same(actual, execute(op, tensors, options))


@pytest.mark.parametrize("case", CASES | UPDATES)
def test_compiled_is_eager(case, device):
    """One graph for forward, one for backward, then one of each for any batch and seqlen."""
    assert_compiles(case, device, backend="aot_eager")


def test_a_compiled_scan_of_long_sequences_is_eager(device):
    """On CUDA a workspace goes with them."""
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (70, 33000, 50000):
        tensors = inputs.ssd(batch=1, seqlen=seqlen, dtype=torch.bfloat16, device=device)
        assert_same(run(compiled, tensors, {"chunk_size": 8}), run(scan, tensors, {"chunk_size": 8}))


@pytest.mark.parametrize("case", ["split", "state_update_all"])
def test_inductor_is_eager(case, device):
    assert_compiles(case, device, backend="inductor", dynamic=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_state_within_a_cache_is_updated_in_place(dynamic, device):
    """inductor would write the first layer's state: see `_kernels._functionalize`."""

    def step(cache, **tensors):
        return oxiscan.selective_state_update(cache[1], **tensors)

    compiled = torch.compile(step, fullgraph=True, backend="inductor", dynamic=dynamic)
    for batch, _ in SIZES:
        tensors = inputs.state_update(batch=batch, dim=6, dtype=torch.float32, device=device)
        tensors["cache"] = torch.stack([tensors["state"].neg(), tensors.pop("state")])
        assert_same(update(compiled, tensors, {}), update(step, tensors, {}))


class Mixer(nn.Module):
    def __init__(self, nheads=2, headdim=4, dstate=6):
        super().__init__()
        dim = nheads * headdim
        self.shape, self.sizes = (nheads, headdim), [dim, dim + 2 * dstate, nheads]
        self.in_proj = nn.Linear(dim, sum(self.sizes))
        self.conv_weight = nn.Parameter(torch.randn(dim + 2 * dstate, 4) / 2)
        self.A = nn.Parameter(-torch.rand(nheads))
        self.norm = oxiscan.RMSNormGated(dim, group_size=headdim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, u):
        z, xBC, dt = self.in_proj(u).split(self.sizes, dim=-1)
        xBC = oxiscan.causal_conv1d_fn(xBC.transpose(1, 2), self.conv_weight, activation="silu").transpose(1, 2)
        dim, dstate = self.sizes[0], (self.sizes[1] - self.sizes[0]) // 2
        x, B, C = xBC.split([dim, dstate, dstate], dim=-1)
        x, B, C = x.unflatten(-1, self.shape), B.unsqueeze(2), C.unsqueeze(2)
        y = oxiscan.mamba_chunk_scan_combined(x, dt, self.A, B, C, 16, dt_softplus=True)
        return self.out_proj(self.norm(y.flatten(2), z))


# Where torch could round float32 to TF32, its compiler says so.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_training_step_of_a_model(device):
    model = Mixer().to(device)

    def loss(u):
        return F.mse_loss(model(u), u.roll(1, dims=1))

    def step(loss):
        model.zero_grad()
        value = loss(u)
        value.backward()
        return {"loss": value.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch, seqlen in SIZES:
        u = inputs.normal(batch, seqlen, 8, dtype=torch.float32, device=device)
        expected = step(loss)
        for name, value in step(compiled).items():
            assert_close(name, value, expected[name], 1e-5)


def test_double_backward_raises_when_compiled(device):
    x = torch.ones(3, 8, device=device, requires_grad=True)
    compiled = torch.compile(oxiscan.rmsnorm_gated, fullgraph=True, backend="aot_eager")
    weight = torch.ones(8, device=device)
    (first,) = torch.autograd.grad(compiled(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_a_bad_argument_of_a_compiled_op_is_named(device):
    x, weight = torch.ones(3, 8, device=device), torch.ones(7, device=device)
    compiled = torch.compile(oxiscan.rmsnorm_gated, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"weight: got shape \(7,\); allowed: \(dim\) = \(8,\)"):
        compiled(x, weight)


@pytest.mark.parametrize("case", CASES | UPDATES)
def test_fake_tensors_have_the_results_shapes(case, device):
    op, make, options = (CASES | UPDATES)[case]
    tensors = make(batch=2, seqlen=9, dtype=torch.bfloat16, device=device)
    expected = op(**tensors, **options)
    with FakeTensorMode() as mode:
        actual = op(**{k: mode.from_tensor(t) for k, t in tensors.items()}, **options)
    for a, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (e.shape, e.stride(), e.dtype, e.device)


def test_make_fx_records_forward_and_backward(device):
    tensors = norm(2, 3, torch.float32, device, optional=False)

    def gradient(x, weight):
        return torch.autograd.grad(oxiscan.rmsnorm_gated(x, weight).sum(), x)

    leaves = [t.requires_grad_() for t in tensors.values()]
    graph = make_fx(gradient)(*leaves).graph
    names = [str(node.target) for node in graph.nodes if "oxiscan" in str(node.target)]
    assert names == ["oxiscan.rmsnorm_gated_forward.default", "oxiscan.rmsnorm_gated_backward.default"]


def test_export(device):
    u = inputs.normal(2, 9, 8, dtype=torch.float32, device=device)
    model = Mixer().to(device)
    program = torch.export.export(model, (u,)).run_decompositions()
    assert torch.equal(program.module()(u), model(u))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpoint(policy, device):
    """An op that writes its outputs returns nothing that could be saved in place of running it again."""
    tensors = norm(2, 9, torch.float32, device)

    def squared(**tensors):
        return oxiscan.rmsnorm_gated(**tensors).square()

    def choose(context, function, *args, **kwargs):
        return policy if "oxiscan" in str(function) else CheckpointPolicy.MUST_RECOMPUTE

    def checkpointed(**tensors):
        context = partial(create_selective_checkpoint_contexts, choose)
        return checkpoint(squared, **tensors, use_reentrant=False, context_fn=context)

    assert_same(run(checkpointed, tensors, {}), run(squared, tensors, {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["conv_all", "scan_all", "split", "mamba1_all", "passing_all", "norm_all"])
def test_autocast_casts_nothing(case, compiled, device):
    op, make, options = CASES[case]
    tensors = make(batch=2, seqlen=9, dtype=torch.float32, device=device)
    expected = run(op, tensors, options)
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(op, tensors, options)
    assert_same(actual, expected)


def test_the_output_projection_follows_autocast_when_compiled(device):
    op, make, options = CASES["split_all"]
    skip_without_kernels(op, device)
    tensors = make(batch=2, seqlen=9, dtype=torch.float32, device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        actual, expected = run(compiled, tensors, options), run(op, tensors, options)
    assert actual["out0"].dtype == torch.bfloat16
    assert_same(actual, expected)


class Record(TorchDispatchMode):
    """The arguments of every registered op that is called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "oxiscan":
            self.calls.append((function, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return function(*args, **kwargs or {})


def supported(cases, device):
    """The cases of the ops that have kernels on `device`."""
    on_cuda = _C.build_info()["cuda_ops"]
    return [case for case in cases.values() if device.type == "cpu" or case[0].__name__ in on_cuda]


def recorded(device, monkeypatch):
    """Calls of all registered ops, one of each kind: kinds differ in the optional arguments that are given."""
    monkeypatch.setattr(_kernels, "is_dynamo_compiling", lambda: True)
    with Record() as record:
        for op, make, options in supported(UPDATES, device):
            op(**make(batch=2, seqlen=3, dtype=torch.float32, device=device), **options)
        for op, make, options in supported(CASES, device):
            tensors = make(batch=2, seqlen=9, dtype=torch.float32, device=device)
            leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
            results = op(**leaves, **options)
            results = results if isinstance(results, tuple) else (results,)
            for outputs in (results, *((result,) for result in results)):
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs], retain_graph=True)
    return list({(str(op), *(a is None for a in args)): (op, args) for op, args in record.calls}.values())


def kernels():
    return [name for name in vars(_C) if not name.startswith("_") and name != "build_info"]


def test_every_kernel_is_registered():
    registered = {name.removeprefix("oxiscan::") for name in _kernels._library._op_defs}
    assert registered - {"copy"} == set(kernels())


def test_opcheck(device, monkeypatch):
    given = {}
    calls = recorded(device, monkeypatch)
    monkeypatch.undo()
    torch.library.opcheck(torch.ops.oxiscan.copy, (calls[0][1][0],))
    for op, args in calls:
        torch.library.opcheck(op, args)
        for argument, value in zip(op._schema.arguments, args, strict=True):
            if isinstance(argument.type, torch.OptionalType):
                given.setdefault((op._schema.name, argument.name), set()).add(value is not None)
    if len(supported(CASES | UPDATES, device)) == len(CASES | UPDATES):
        assert {op._schema.name for op, _ in calls} == {f"oxiscan::{name}" for name in kernels()}
    # Given on one device alone, some for some arguments.
    workspaces = ("dy", "states", "partials", "cuts", "segments", "entry_states")
    own = [name for name, seen in given.items() if seen != {True, False} and name[1] not in workspaces]
    # On CUDA zeros stand for a gradient of out that there is not.
    assert own == ([] if device.type == "cpu" else [("oxiscan::ssd_backward", "dout")])
