"""Megatron's Mamba-2 mixer on this package's ops: its parameters, its sharding, our forward."""

from typing import Any

import torch
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from oxiscan.ops import RMSNormGated

from .bindings import current_ops, mixer_names


class GatedNorm(RMSNormGated):
    """`oxiscan.ops.RMSNormGated` that runs on the ops chosen by `use_ops` and is sharded over its channels."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., hidden_size); the result has x's shape and dtype."""
        return current_ops().rmsnorm_gated(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, split along its only axis over the tensor-parallel group that the mixer sets."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


# Megatron calls these by name. One that it renames would leave its own in charge, without a kernel behind it.
_HOOKS = ("_ssm_training", "_ssm_prefill", "_decode", "_dynamic_inference")
if not all(hasattr(MambaMixer, hook) for hook in _HOOKS):
    raise ImportError(f"MambaMixer without one of {', '.join(_HOOKS)}", name=MambaMixer.__module__)


class OxiscanMambaMixer(MambaMixer):
    """Megatron's `MambaMixer` with the same arguments, parameters and checkpoint keys.

    Training and static-batching prefill are one call of the fused op each, on Megatron's (seqlen, batch, channels)
    layout without a transposing copy. Decode takes one token a sequence for any batch. Packed sequences reset conv and
    state at every document, or raise where the documents cannot be told.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with mixer_names(GatedNorm):
            super().__init__(*args, **kwargs)
        if self.rmsnorm:
            self.norm.tp_group = self.pg_collection.tp

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """zxBCdt (seqlen, batch, channels) -> (seqlen, batch, d_inner), both per rank."""
        seq_idx = None if packed_seq_params is None else packed_seq_idx(packed_seq_params, zxBCdt)
        y = self.cp.post_conv_ssm(self._scan(zxBCdt, seq_idx=seq_idx), packed_seq_params)
        return self._normed(y)

    def _ssm_prefill(
        self, zxBCdt: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, **dynamic: Any
    ) -> Tensor:
        """The scan from zero states; fills conv_state (batch, conv_dim, d_conv) and ssm_state where they are given."""
        if any(value is not None and value is not False for value in dynamic.values()):
            raise NotImplementedError(_NO_DYNAMIC_BATCHING)
        if ssm_state is None or conv_state is None:
            return self._normed(self.cp.post_conv_ssm(self._scan(zxBCdt)))
        y, final_states = self._scan(zxBCdt, return_final_states=True)
        ssm_state.copy_(final_states)
        xBC = zxBCdt[-conv_state.shape[-1] :].narrow(-1, self.cp.d_inner_local_tpcp, conv_state.shape[1])
        conv_state.zero_()
        conv_state[..., conv_state.shape[-1] - xBC.shape[0] :] = xBC.permute(1, 2, 0)
        return self._normed(self.cp.post_conv_ssm(y))

    def _scan(self, zxBCdt: Tensor, seq_idx: Tensor | None = None, return_final_states: bool = False) -> Any:
        """Conv, scan and gate of (seqlen, batch, channels); the result is a view in the same layout."""
        cp = self.cp
        D = cp.get_D()
        result = current_ops().mamba_split_conv1d_scan_combined(
            zxBCdt.transpose(0, 1),
            cp.get_conv1d_weight().squeeze(1),
            cp.get_conv1d_bias(),
            cp.get_dt_bias().float(),
            -torch.exp(cp.get_A_log().float()),
            D.float().view(-1, self.headdim) if self.D_has_hdim else D,
            self.chunk_size,
            seq_idx=seq_idx,
            return_final_states=return_final_states,
            activation=self.activation,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=cp.ngroups_local_tpcp,
            norm_before_gate=self.norm_before_gate,
            # From 0.17 on the config may ask for chunk states in another dtype.
            state_dtype=getattr(self, "mamba_training_ssm_states_dtype", None),
        )
        if return_final_states:
            return result[0].transpose(0, 1), result[1]
        return result.transpose(0, 1)

    def _normed(self, y: Tensor) -> Tensor:
        # Megatron's row-parallel linear views its input as a matrix, hence contiguous.
        return (self.norm(y) if self.rmsnorm else y).contiguous()

    def _decode(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, batch_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One token a sequence, hidden_states (1, batch, d_model); both states are updated in place."""
        if batch_indices is not None:
            raise NotImplementedError(_NO_DYNAMIC_BATCHING)
        if hidden_states.shape[0] != 1:
            raise NotImplementedError(
                f"hidden_states: got {hidden_states.shape[0]} tokens after the prefill; decode takes one at a time"
            )
        if self.cp.cp_size != 1:
            raise NotImplementedError(f"context parallel size: got {self.cp.cp_size}; decode allows 1")
        ops = current_ops()
        zxBCdt = self.in_proj(hidden_states)[0].squeeze(0)
        bc_dim = self.ngroups_local_tp * self.d_state
        conv_dim = self.d_inner_local_tp + 2 * bc_dim
        z, xBC, dt = zxBCdt.split([self.d_inner_local_tp, conv_dim, self.nheads_local_tp], dim=-1)
        weight = self.cp.get_conv1d_weight().squeeze(1)
        xBC = ops.causal_conv1d_update(xBC, conv_state, weight, self.cp.get_conv1d_bias(), self.activation)
        x, B, C = xBC.split([self.d_inner_local_tp, bc_dim, bc_dim], dim=-1)

        heads = (self.nheads_local_tp, self.headdim)
        A = -torch.exp(self.A_log.float())
        y = ops.selective_state_update(
            ssm_state,
            x.unflatten(-1, heads),
            dt.unsqueeze(-1).expand(-1, *heads),
            A.view(-1, 1, 1).expand(*heads, self.d_state),
            B.unflatten(-1, (-1, self.d_state)),
            C.unflatten(-1, (-1, self.d_state)),
            self.D.view(heads[0], -1).expand(heads),
            z=z.unflatten(-1, heads),  # gated here, as in the scan, and then normed
            dt_bias=self.dt_bias.unsqueeze(-1).expand(heads),
            dt_softplus=True,
        )
        return self.out_proj(self._normed(y.flatten(1)).unsqueeze(0))

    def _dynamic_inference(self, hidden_states: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(_NO_DYNAMIC_BATCHING)


_NO_DYNAMIC_BATCHING = (
    "inference_context: dynamic batching is not available (it needs states addressed by index and packed prefill); "
    "use megatron.core.inference.contexts.StaticInferenceContext"
)


def packed_seq_idx(packed_seq_params: Any, zxBCdt: Tensor) -> Tensor:
    """The document of every token, (1, seqlen) int32, from what Megatron says about a packed batch.

    Megatron fills `PackedSeqParams.seq_idx` only where `total_tokens` was set, and from 0.17 on runs without it as if
    the pack were one document. Here it is derived from the cumulative lengths, with the padded ones first because
    padding tokens are in the batch too; tokens past the last length form one more document.

    Raises:
        ValueError: neither is there, or what is there does not fit a zxBCdt of (seqlen, batch, channels).
    """
    seqlen, batch, _ = zxBCdt.shape
    if batch != 1:
        raise ValueError(f"packed_seq_params: got a batch of {batch}; a packed batch is (seqlen, 1, channels)")
    seq_idx = getattr(packed_seq_params, "seq_idx", None)
    if seq_idx is None:
        cu_seqlens = packed_seq_params.cu_seqlens_q_padded
        if cu_seqlens is None:
            cu_seqlens = packed_seq_params.cu_seqlens_q
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError(
                "packed_seq_params: documents cannot be told apart, and their states would leak into each other; "
                f"set cu_seqlens_q (or cu_seqlens_q_padded) to a tensor (ndocs + 1,), got {type(cu_seqlens).__name__}"
            )
        positions = torch.arange(seqlen, device=zxBCdt.device, dtype=cu_seqlens.dtype)
        ends = cu_seqlens[1:].to(zxBCdt.device)
        seq_idx = torch.searchsorted(ends, positions, right=True, out_int32=True).unsqueeze(0)
    if seq_idx.shape != (1, seqlen):
        raise ValueError(f"packed_seq_params.seq_idx: got {tuple(seq_idx.shape)}; allowed: (1, {seqlen})")
    return seq_idx.to(device=zxBCdt.device, dtype=torch.int32)
