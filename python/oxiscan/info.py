"""What this installation is and what it runs on: `python -m oxiscan.info`, or with `--json` for programs."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from ._C import build_info


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def collect() -> dict[str, Any]:
    """Versions, backends, threads and GPUs, as plain values."""
    build = build_info()
    return {
        "oxiscan": build["version"],
        "build_profile": build["profile"],
        "backends": build["backends"],
        "cpu_simd": build["simd"],
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": _version("megatron-core"),
        "gpus": _gpus(),
    }


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m oxiscan.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    info = collect()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return
    gpus = info.pop("gpus")
    for name, value in info.items():
        text = ", ".join(value) if isinstance(value, list) else "not installed" if value is None else value
        print(f"{name.replace('_', ' '):16}{text}")
    for gpu in gpus:
        unused = "" if "cuda" in info["backends"] else "; not used: this build has no CUDA backend"
        capability = gpu["compute_capability"]
        print(f"{'gpu':16}{gpu['name']}, compute capability {capability}, {gpu['memory_gib']} GiB{unused}")
    if not gpus:
        print(f"{'gpu':16}none")


if __name__ == "__main__":
    main()
