"""The places where the tested megatron-core versions differ in name."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    _PATTERN = "hybrid_layer_pattern"
except ModuleNotFoundError:  # before 0.17
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

    _PATTERN = "hybrid_override_pattern"

__all__ = ["HybridModel", "HybridStack", "HybridStackSubmodules", "build_hybrid_model", "inference_mode", "mlp_module"]


def build_hybrid_model(
    config: Any, vocab_size: int, max_sequence_length: int, layer_pattern: str, **kwargs: Any
) -> HybridModel:
    """Megatron's `HybridModel` (`MambaModel` before 0.17) from `oxiscan.megatron.hybrid_stack_spec`.

    layer_pattern has one letter a layer: M a Mamba-2 mixer, * attention, - an MLP; its length is `config.num_layers`.
    kwargs go to the model's constructor.
    """
    from .specs import hybrid_stack_spec

    kwargs[_PATTERN] = layer_pattern
    return HybridModel(config, hybrid_stack_spec, vocab_size, max_sequence_length, **kwargs)


def inference_mode() -> AbstractContextManager[None]:
    """The block within which the model takes an inference context; before 0.17 eval mode alone says so."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return nullcontext()
    return InferenceMode.active()


def mlp_module(submodules: MLPSubmodules) -> ModuleSpec | Callable[..., MLP]:
    """An MLP as a transformer layer's `mlp`, which a spec describes before 0.19 and a builder from then on."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)
