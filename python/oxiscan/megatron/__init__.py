"""The drop-in for megatron-core: its hybrid (Mamba-2, attention, MLP) model with this package's ops.

    pretrain_hybrid.py ... --spec oxiscan.megatron hybrid_stack_spec

or, from Python, `build_hybrid_model(config, vocab_size, max_sequence_length, "M-M*-M-")`. Neither mamba_ssm nor
causal_conv1d nor TransformerEngine is needed. Parameters and distributed checkpoints keep Megatron's own names, so a
checkpoint moves between this spec and Megatron's. Tested with megatron-core 0.16.1 and 0.19.2.

On a machine without CUDA call `enable_cpu()` before initialising Megatron's parallel state.
"""

try:
    import einops as _einops  # noqa: F401  megatron-core needs both and declares neither
    import megatron.core as _megatron_core  # noqa: F401
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'oxiscan.megatron needs megatron-core, einops and triton ({error}): pip install "oxiscan[megatron]"'
    ) from error

try:
    from .bindings import use_ops
    from .cpu import enable_cpu
    from .mixer import GatedNorm, OxiscanMambaMixer
    from .specs import LocalNorm, OxiscanHybridStack, hybrid_stack_spec, mamba_stack_spec
    from .versions import build_hybrid_model, inference_mode
except ImportError as error:
    if not (error.name or "").startswith("megatron"):
        raise
    raise ImportError(
        f"megatron-core {_megatron_core.__version__} lacks what oxiscan.megatron needs ({error}); "
        "tested versions: 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12)"
    ) from error

__all__ = [
    "GatedNorm",
    "LocalNorm",
    "OxiscanHybridStack",
    "OxiscanMambaMixer",
    "build_hybrid_model",
    "enable_cpu",
    "hybrid_stack_spec",
    "inference_mode",
    "mamba_stack_spec",
    "use_ops",
]
