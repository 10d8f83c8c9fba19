"""What tests and benchmarks share: random arguments for every op, the list of cases, the comparison with the reference.

tensors = inputs.ssd(batch=1, seqlen=100, dtype=torch.float32, device=torch.device("cpu"))
compare(oxiscan.mamba_chunk_scan_combined, oxiscan.reference.mamba_chunk_scan_combined, tensors, {"chunk_size": 64})
"""

from . import inputs
from .cases import CASES, Case
from .comparison import TOLERANCES, assert_close, compare, relative_rms, run, seeded_gradients
from .memory import peak_memory

__all__ = [
    "CASES",
    "Case",
    "TOLERANCES",
    "assert_close",
    "compare",
    "inputs",
    "peak_memory",
    "relative_rms",
    "run",
    "seeded_gradients",
]
