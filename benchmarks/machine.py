"""What the machine and the code are that figures belong to."""

import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def slug(text: str) -> str:
    """`text` as part of a file name: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str | None:
    """$OXISCAN_COMMIT where these files are a copy; else the repository's commit, "-dirty" if they differ from it."""
    if "OXISCAN_COMMIT" in os.environ:
        return os.environ["OXISCAN_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def sm_clock_mhz(device: torch.device, load: Callable[[], Any]) -> float | None:
    """The clock of the GPU's multiprocessors while it runs `load`, as nvidia-smi says; None where it cannot say."""
    if device.type != "cuda":
        return None
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        query = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    with query:
        while query.poll() is None:
            for _ in range(10):
                load()
            torch.cuda.synchronize(device)
        answer = query.stdout.read().strip() if query.stdout else ""
    return float(answer) if re.fullmatch(r"[\d.]+", answer) else None
