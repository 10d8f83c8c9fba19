"""What megatron-core hard-codes to CUDA and a hybrid model touches, sent to the CPU: the one place that does so."""

import functools
import logging
from typing import Any

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor


def enable_cpu() -> None:
    """Let megatron-core build, train and run its hybrid model on a machine without CUDA.

    Does nothing where `torch.cuda.is_available()`, and nothing the second time. Call it before
    `model_parallel_cuda_manual_seed`; use gloo, `TransformerConfig(use_cpu_initialization=True)`, and no fused kernels.

    - `torch.cuda.current_device`, asked wherever a parameter or buffer is made, answers the CPU.
    - The RNG tracker forks the CPU's generator instead of the GPU's: `torch.cuda.get_rng_state` and `manual_seed`, and
      the tracker module's own pair of accessors. The tracker warns when the CPU's generator moves within a fork, which
      is now what a fork is for: that warning is dropped.
    - The default causal mask of the local attention is made on the CPU.
    - `torch.cuda.synchronize`, with which distributed checkpointing waits for its copies, has nothing to wait for.
    """
    already_done = torch.cuda.current_device is _current_device  # type: ignore[comparison-overlap]
    if torch.cuda.is_available() or already_done:
        return
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.get_rng_state = _get_rng_state
    torch.cuda.manual_seed = _manual_seed
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    logging.getLogger(megatron_random.__name__).addFilter(_keep_record)
    fused_softmax.get_default_causal_mask = _causal_mask
    torch.cuda.synchronize = _synchronize


def _current_device() -> torch.device:
    return torch.device("cpu")


def _get_rng_state(*_args: Any, **_kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _keep_record(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


@functools.lru_cache(maxsize=8)
def _causal_mask(sq: int) -> Tensor:
    return torch.ones(sq, sq, dtype=torch.bool).triu_(1)


def _synchronize(*_args: Any, **_kwargs: Any) -> None:
    pass
