"""The stack spec: Megatron's hybrid stack from tensor-parallel layers that need no TransformerEngine.

TransformerEngine's column-parallel linears hold the norm in front of them, ours are two modules. The key maps give the
norms the names under which TransformerEngine's spec writes them to a distributed checkpoint.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from .mixer import OxiscanMambaMixer
from .versions import HybridStack, HybridStackSubmodules, mlp_module


class LocalNorm:
    """torch's RMSNorm or LayerNorm, whichever `config.normalization` names, with `config.layernorm_epsilon`.

    Unlike Megatron's own wrapper it serves under sequence parallelism: Megatron reduces the gradients of parameters
    that are marked `sequence_parallel`.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float | None = None) -> Any:
        """eps: what the caller has, else the config's (Megatron's Mamba layer passes none before 0.17)."""
        kinds: dict[str, type[torch.nn.Module]] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.normalization not in kinds:
            raise ValueError(f"config.normalization: got {config.normalization!r}; allowed: {', '.join(kinds)}")
        if config.layernorm_zero_centered_gamma:
            raise NotImplementedError("config.layernorm_zero_centered_gamma: got True; allowed: False")
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = kinds[config.normalization](
            hidden_size,
            eps=config.layernorm_epsilon if eps is None else eps,
            device=device,
            dtype=config.params_dtype,
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class OxiscanHybridStack(HybridStack):
    """Megatron's hybrid stack with a final norm that needs no TransformerEngine."""

    def __init__(self, config: Any, submodules: Any, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        # Megatron's own final norm is TransformerEngine's; ours takes its place, under its name.
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        for layer, symbol in zip(self.layers, self.layer_type_list, strict=True):
            if isinstance(layer, IdentityOp):
                raise NotImplementedError(f"layer pattern: got {symbol!r}; oxiscan.megatron has M, * and -")
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size)


hybrid_stack_spec = ModuleSpec(
    module=OxiscanHybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=LocalNorm,
                mixer=ModuleSpec(
                    module=OxiscanMambaMixer,
                    submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                ),
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=LocalNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=DotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=mlp_module(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
    ),
)

# What pretrain_mamba.py of Megatron before 0.17 calls it.
mamba_stack_spec = hybrid_stack_spec
