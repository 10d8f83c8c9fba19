"""The Megatron drop-in: names, training, checkpoints, decoding, packing, tensor parallelism, on the CPU in float32."""

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing
from packaging.version import Version
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core says which optional packages it does without
    megatron_core = pytest.importorskip("megatron.core", reason="needs megatron-core: pip install oxiscan[megatron]")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer import TransformerConfig

    import oxiscan
    import oxiscan.megatron as oxm
    import oxiscan.reference
    from oxiscan import testing

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:megatron"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]

VOCAB, SEQLEN = 64, 24
# 0.19 made the convolution's parameters the mixer's own.
CONV = "conv1d." if Version(megatron_core.__version__) < Version("0.19") else "conv1d_"


def start_megatron(store: Any, rank: int, world_size: int) -> None:
    oxm.enable_cpu()
    torch.set_num_threads(2 // world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    threads = torch.get_num_threads()
    start_megatron(torch.distributed.HashStore(), 0, 1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


def build(pattern: str = "M-*M", seed: int = 7, **config: Any) -> Any:
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    settings: dict[str, Any] = dict(
        num_layers=len(pattern),
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        mamba_state_dim=8,
        mamba_head_dim=8,
        mamba_num_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.2,  # large enough that states and gates matter
    )
    return oxm.build_hybrid_model(TransformerConfig(**settings | config), VOCAB, SEQLEN, pattern)


def tokens(batch: int = 2, seqlen: int = SEQLEN) -> Tensor:
    return torch.randint(VOCAB, (batch, seqlen + 1), generator=torch.Generator().manual_seed(batch))


def losses(model: Any, ids: Tensor, packed_seq_params: Any = None) -> Tensor:
    """(batch, seqlen)"""
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels, packed_seq_params=packed_seq_params)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses(model, ids).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    testing.assert_close("result", actual, expected, tolerance)


# Names and building


def test_parameter_names_are_megatrons() -> None:
    mixer = ["A_log", "D", "dt_bias", f"{CONV}weight", f"{CONV}bias"]
    mixer += ["in_proj.weight", "norm.weight", "out_proj.weight"]
    expected = {
        "embedding.word_embeddings.weight",
        "decoder.layers.0.norm.weight",
        *(f"decoder.layers.0.mixer.{name}" for name in mixer),
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.2.self_attention.linear_qkv.weight",
        "decoder.layers.2.self_attention.linear_proj.weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
    }
    assert {name for name, _ in build("M-*").named_parameters()} == expected


def test_checkpoint_keys_are_those_of_megatrons_transformer_engine_spec() -> None:
    sharded = build("M-*").sharded_state_dict()
    apply_factories(sharded)
    found: set[str] = set()
    for value in sharded.values():
        parts = value if isinstance(value, list) else [value]
        found |= {part.key for part in parts if not isinstance(part, ShardedObject)}
    mixer = ["A_log", "D", "dt_bias", "norm.weight", "out_proj.weight", "in_proj.layer_norm_weight"]
    mixer += [f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")]
    mixer += [f"conv1d.{kind}.{part}" for kind in ("weight", "bias") for part in ("x", "B", "C")]
    assert found == {
        "embedding.word_embeddings.weight",
        *(f"decoder.layers.0.mixer.{name}" for name in mixer),
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.self_attention.linear_qkv.weight",
        "decoder.layers.2.self_attention.linear_proj.weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
    }


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed here")
def test_builds_without_mamba_ssm_and_leaves_megatrons_names_alone() -> None:
    before = dict(vars(mamba_mixer))
    for _ in range(2):
        build("M")
    assert vars(mamba_mixer) == before
    assert not mamba_mixer.HAVE_MAMBA_SSM


def test_the_spec_is_found_by_name() -> None:
    # What Megatron's --spec looks up, under the name of either generation.
    assert vars(oxm)["hybrid_stack_spec"] is vars(oxm)["mamba_stack_spec"]


def test_a_layer_that_the_spec_lacks_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="layer pattern: got 'E'"):
        build("ME", num_moe_experts=2)


def test_importing_oxiscan_imports_no_megatron() -> None:
    code = "import oxiscan, sys; sys.exit('megatron.core' in sys.modules or 'oxiscan.megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_megatron_core_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['megatron'] = None; import oxiscan.megatron"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "ImportError: oxiscan.megatron needs megatron-core" in process.stderr
    assert 'pip install "oxiscan[megatron]"' in process.stderr


def test_enabling_the_cpu_twice_is_enabling_it_once() -> None:
    before = torch.cuda.current_device, torch.cuda.get_rng_state
    oxm.enable_cpu()
    assert (torch.cuda.current_device, torch.cuda.get_rng_state) == before


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm_takes_the_configs_epsilon(normalization: str) -> None:
    model = build("M", normalization=normalization, layernorm_epsilon=3e-3)
    norms = [module for module in model.modules() if isinstance(module, (torch.nn.RMSNorm, torch.nn.LayerNorm))]
    assert [(type(norm).__name__, norm.eps) for norm in norms] == [(normalization, 3e-3)] * 2


# Training


def test_trains() -> None:
    model, ids = build(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, last = 0.0, 0.0
    for step in range(8):
        optimizer.zero_grad()
        loss = losses(model, ids).mean()
        loss.backward()
        optimizer.step()
        last = loss.item()
        first = last if step == 0 else first
    assert last < 0.8 * first


def test_ops_and_reference_agree_through_the_model() -> None:
    model, ids = build(), tokens()
    ours, our_gradients = losses(model, ids), gradients(model, ids)
    with oxm.use_ops(oxiscan.reference):
        theirs, their_gradients = losses(model, ids), gradients(model, ids)
    assert_close(ours, theirs)
    for name, gradient in our_gradients.items():
        assert_close(gradient, their_gradients[name], 1e-4)


def test_bfloat16_model_runs_near_the_float32_one() -> None:
    exact, ids = build(), tokens()
    model = build(bf16=True, params_dtype=torch.bfloat16).bfloat16()  # as Float16Module does, A_log and D included
    model.load_state_dict(exact.state_dict())
    gradients(model, ids)
    assert_close(losses(model, ids).float(), losses(exact, ids), 2e-2)


def test_use_ops_chooses_for_a_model_that_is_already_built() -> None:
    calls = []

    def counted(name: str) -> Any:
        def op(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(oxiscan.reference, name)(*args, **kwargs)

        return op

    names = ("causal_conv1d_update", "mamba_split_conv1d_scan_combined", "rmsnorm_gated", "selective_state_update")
    namespace: Any = SimpleNamespace(**{name: counted(name) for name in names})
    model, ids = build("M"), tokens()
    with oxm.use_ops(namespace), torch.no_grad():
        losses(model, ids)
    assert calls == ["mamba_split_conv1d_scan_combined", "rmsnorm_gated"]
    losses(model, ids)
    assert len(calls) == 2
    namespace = SimpleNamespace()
    with pytest.raises(TypeError, match="lacks causal_conv1d_update"), oxm.use_ops(namespace):
        pass


def test_recomputed_activations_give_the_same_gradients() -> None:
    model, ids = build("MM"), tokens()
    expected = gradients(model, ids)
    for layer in model.decoder.layers:
        forward = layer.forward

        def recomputed(hidden_states: Tensor, forward: Any = forward, **kwargs: Any) -> Tensor:
            return tensor_parallel.checkpoint(lambda hidden: forward(hidden, **kwargs), False, hidden_states)

        layer.forward = recomputed
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


@pytest.mark.skipif(Version(megatron_core.__version__) < Version("0.19"), reason="the stack has no full recompute yet")
def test_megatrons_full_recompute_gives_the_same_gradients() -> None:
    ids = tokens()
    expected = gradients(build(), ids)
    recomputing = build(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for name, gradient in gradients(recomputing, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


# Checkpoints


def test_state_dict_round_trip(tmp_path: Path) -> None:
    model, ids = build(), tokens()
    expected = losses(model, ids)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(seed=8)
    assert not torch.equal(losses(other, ids), expected)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=False))
    torch.testing.assert_close(losses(other, ids), expected, rtol=0, atol=0)


def save_distributed(model: Any, folder: Path) -> None:
    folder.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load_distributed(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how megatron-core calls torch's checkpoint reader
        state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(state)


def test_distributed_checkpoint_round_trip(tmp_path: Path) -> None:
    model, ids = build(), tokens()
    save_distributed(model, tmp_path / "checkpoint")
    other = build(seed=8)
    load_distributed(other, tmp_path / "checkpoint")
    torch.testing.assert_close(losses(other, ids), losses(model, ids), rtol=0, atol=0)


def two_rank_losses(rank: int, folder: Path) -> None:
    """One of two ranks: a checkpoint's model split over heads, then (without attention) over the sequence."""
    warnings.simplefilter("ignore")
    start_megatron(torch.distributed.FileStore(str(folder / "store"), 2), rank, 2)
    for sequence_parallel in (False, True):
        model = build(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
        load_distributed(model, folder / "hybrid")
        loss = losses(model, tokens())
        loss.mean().backward()
        torch.save(loss.detach(), folder / f"sequence_parallel_{sequence_parallel}_{rank}.pt")
    parallel_state.destroy_model_parallel()

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model = build("M-", context_parallel_size=2)
    load_distributed(model, folder / "mamba")
    inputs, labels = (part[:, context_parallel_slice(rank)] for part in (tokens()[:, :-1], tokens()[:, 1:]))
    loss = model(inputs, torch.zeros_like(inputs), None, labels=labels)
    loss.mean().backward()
    torch.save(loss.detach(), folder / f"context_parallel_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def context_parallel_slice(rank: int) -> Tensor:
    """The positions that Megatron gives one of two ranks: an early and a late quarter."""
    quarters = torch.arange(SEQLEN).chunk(4)
    return torch.cat([quarters[rank], quarters[3 - rank]])


def test_two_ranks_give_the_losses_of_one(tmp_path: Path) -> None:
    hybrid, mamba, ids = build(), build("M-"), tokens()
    save_distributed(hybrid, tmp_path / "hybrid")
    save_distributed(mamba, tmp_path / "mamba")
    torch.multiprocessing.spawn(two_rank_losses, (tmp_path,), nprocs=2)
    for rank in range(2):
        for sequence_parallel in (False, True):
            found = torch.load(tmp_path / f"sequence_parallel_{sequence_parallel}_{rank}.pt")
            assert_close(found, losses(hybrid, ids))
        found = torch.load(tmp_path / f"context_parallel_{rank}.pt")
        assert_close(found, losses(mamba, ids)[:, context_parallel_slice(rank)])


# Static-batching inference


def step_logits(model: Any, context: StaticInferenceContext, ids: Tensor, prompt: int) -> Tensor:
    """The last token's logits of the prefill and of each step after it, (batch, seqlen - prompt + 1, vocab)."""
    found, fed = [], 0
    with torch.no_grad(), oxm.inference_mode():
        for end in range(prompt, ids.shape[1] + 1):
            positions = torch.arange(fed, end).expand(len(ids), -1)
            output = model(ids[:, fed:end], positions, None, inference_context=context, runtime_gather_output=True)
            found.append(output[:, -1])
            context.sequence_len_offset = fed = end
    return torch.stack(found, 1)


@pytest.mark.parametrize("prompt", [1, 3, 11])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_equal_the_full_forward(batch: int, prompt: int) -> None:
    model, ids = build().eval(), tokens(batch)[:, :-1]
    with torch.no_grad():
        expected = model(ids, torch.arange(SEQLEN).expand_as(ids), None)
    logits = step_logits(model, StaticInferenceContext(batch, SEQLEN), ids, prompt)
    assert_close(logits, expected[:, prompt - 1 :])


def test_a_context_that_is_reset_starts_from_empty_states() -> None:
    model, ids = build().eval(), tokens()[:, :-1]
    context = StaticInferenceContext(2, SEQLEN)
    expected = step_logits(model, context, ids, 5)
    context.reset()
    torch.testing.assert_close(step_logits(model, context, ids, 5), expected, rtol=0, atol=0)


def test_dynamic_batching_and_several_tokens_a_step_are_refused() -> None:
    mixer = build("M").eval().decoder.layers[0].mixer
    hidden = torch.randn(2, 1, 32)
    states = torch.zeros(1, 96, 4), torch.zeros(1, 8, 8, 8)
    with pytest.raises(NotImplementedError, match="dynamic batching is not available"):
        mixer._dynamic_inference(hidden, SimpleNamespace())
    with pytest.raises(NotImplementedError, match="got 2 tokens"):
        mixer._decode(hidden, *states)


# Packed sequences


def packed(**kwargs: Any) -> PackedSeqParams:
    return PackedSeqParams(qkv_format="thd", **kwargs)


def test_packed_documents_do_not_leak() -> None:
    model, ids = build("M-M"), tokens(1)
    ends = [5, 6, 17, SEQLEN]
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    separate = [losses(model, ids[:, start : end + 1]) for start, end in zip([0, *ends], ends, strict=False)]
    expected = torch.cat(separate, 1)
    torch.testing.assert_close(losses(model, ids, packed(cu_seqlens_q=cu_seqlens)), expected, rtol=1e-5, atol=1e-5)
    assert (losses(model, ids) - expected).abs().max() > 1e-2  # without the boundaries it would leak

    # Padding between documents is told by the padded lengths; tokens past the last one are a document of their own.
    params = packed(cu_seqlens_q=torch.tensor([0, 4, 5, 14]), cu_seqlens_q_padded=torch.tensor([0, *ends[:-1]]))
    torch.testing.assert_close(losses(model, ids, params), expected, rtol=1e-5, atol=1e-5)

    # Changing one document changes no other's losses.
    changed = ids.clone()
    changed[:, 8:12] = (changed[:, 8:12] + 1) % VOCAB
    params = packed(cu_seqlens_q=cu_seqlens)
    difference = losses(model, changed, params) - losses(model, ids, params)
    assert difference[:, 7:17].abs().max() > 1e-3
    assert not difference[:, :6].any() and not difference[:, 17:].any()


def test_a_given_seq_idx_is_used() -> None:
    model, ids = build("M"), tokens(1)
    params = packed(cu_seqlens_q=torch.tensor([0, 5, SEQLEN]))
    expected = losses(model, ids, params)
    given = packed(cu_seqlens_q=torch.tensor([0, SEQLEN]))
    given.seq_idx = (torch.arange(SEQLEN) >= 5).int().unsqueeze(0)
    torch.testing.assert_close(losses(model, ids, given), expected, rtol=0, atol=0)
    given.seq_idx = given.seq_idx[:, 1:]
    with pytest.raises(ValueError, match=r"seq_idx: got \(1, 23\); allowed: \(1, 24\)"):
        losses(model, ids, given)


def test_a_pack_whose_documents_cannot_be_told_is_refused() -> None:
    model = build("M")
    with pytest.raises(ValueError, match="set cu_seqlens_q"):
        losses(model, tokens(1), packed())
    with pytest.raises(ValueError, match="got a batch of 2"):
        losses(model, tokens(2), packed(cu_seqlens_q=torch.tensor([0, SEQLEN])))


def test_attention_without_transformer_engine_refuses_packs() -> None:
    with pytest.raises(AssertionError, match="Packed sequence is not supported"):
        losses(build("M*"), tokens(1), packed(cu_seqlens_q=torch.tensor([0, SEQLEN])))
