"""The records that `benchmarks.run` writes and `benchmarks.report` reads: JSON, a list in a file."""

import json
import os
from pathlib import Path
from typing import TypedDict

FOLDER = Path(__file__).parent / "results"
OURS = "oxiscan"


class Measured(TypedDict):
    """What the machine did at most in the run."""

    #: Bytes read plus bytes written by a copy.
    copy_gb_s: float
    matmul_tflops: float
    #: None where it is not known, and on the CPU.
    sm_clock_mhz: float | None


_Record = TypedDict(
    "_Record",
    {
        "op": str,
        # "oxiscan" or a peer's package.
        "impl": str,
        # The case's name.
        "shape": str,
        # One of `benchmarks.run.DTYPES`.
        "dtype": str,
        # "fwd", or "bwd" for the backward alone.
        "pass": str,
        # Median time of a call: of its kernels with a cold L2 cache on a GPU, the wall's on the CPU.
        "us": float,
        # How long the host is busy with a call for one token; of a backward what it adds to autograd's own time, in a
        # graph of many calls.
        "host_us": float,
        # The least time for the bytes at this run's copy speed, or for the exponentials where those take longer.
        "floor_us": float,
        # Kernels, fills and copies of a call on the GPU; null on the CPU.
        "launches": int | None,
        # Memory at the peak above the arguments, results included; for "bwd" of forward and backward together.
        "peak_bytes": int,
        # The largest relative RMS error of an output ("fwd") or gradient ("bwd").
        "error": float,
        # The processor on the CPU.
        "gpu": str,
        "version": str,
        "commit": str | None,
        # Where `us` is from: "profiler", "graph" or "wall", see `benchmarks.timing.Timing`.
        "method": str,
    },
)


class Record(_Record, Measured):
    """One pass of one implementation of one case. Times are in microseconds."""


def write(records: list[Record], path: Path) -> None:
    """Write a file at once: whoever reads it sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> list[Record]:
    """The records of a file; ValueError if it holds something else."""
    records = json.loads(path.read_text())
    expected = Record.__annotations__.keys()
    if not isinstance(records, list) or not all(isinstance(r, dict) and r.keys() == expected for r in records):
        raise ValueError(f"{path}: got other JSON; allowed: a list of records with the fields {', '.join(expected)}")
    return records
