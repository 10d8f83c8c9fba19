"""What this installation is and what it runs on: `python -m oxiscan.info`.

`--json` prints it for programs, `--kernels` the compiled kernels that this machine's GPU runs (without a GPU, those of
every architecture), `--self-test` compares ops at a few shapes with the reference, on the CPU and on a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from typing import Any

import torch

from ._C import _cuda_driver_version, _cuda_kernels, build_info


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _capability(arch: str) -> tuple[int, int]:
    """(9, 0) of sm_90a."""
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", arch)
    assert found is not None, arch
    return int(found[1]), int(found[2])


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kernels = _cuda_kernels(properties.major, properties.minor)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "arch": kernels[0]["arch"] if kernels else None,
                "kernels": len(kernels),
                "chunk_scan": _chunk_scan(kernels[0]["arch"]) if kernels else {},
            }
        )
    return gpus


def _chunk_scan(arch: str) -> dict[str, str]:
    """By what arguments of mamba_chunk_scan_combined, the kernels that run them on a GPU with these kernels."""
    headdims, dstates, largest = build_info()["cuda_chunk_scan"]
    sizes = f"headdim {', '.join(map(str, headdims))} x dstate {', '.join(map(str, dstates))}"
    if arch == "sm_90a":
        fast = {f"bf16, fp16, {sizes}, rows aligned to 16 bytes": "wgmma"}
        rest = f"bf16, fp16, any other sizes up to {largest}, any strides"
    else:
        fast = {}
        rest = f"bf16, fp16, sizes up to {largest}, any strides; fastest at {sizes}, rows aligned to 16 bytes"
    return fast | {
        rest: "mma.sync",
        f"float32, sizes up to {largest}": "recurrence on CUDA cores, gradients by mma.sync",
    }


def collect() -> dict[str, Any]:
    """Versions, backends, threads and GPUs, as plain values."""
    build = build_info()
    driver = _cuda_driver_version()
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
        "cuda_ops": build["cuda_ops"],
        "cuda_archs": build["cuda_archs"],
        "cuda_driver": None if driver is None else ".".join(map(str, driver)),
        "gpus": _gpus(),
    }


def _text(value: Any) -> str:
    if value is None:
        return "not installed"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _print_report(info: dict[str, Any]) -> None:
    gpus = info.pop("gpus")
    for name, value in info.items():
        print(f"{name.replace('_', ' '):20}{_text(value)}")
    for gpu in gpus:
        runs = f"{gpu['kernels']} kernels for {gpu['arch']}" if gpu["arch"] else "no kernels for it in this build"
        capability = gpu["compute_capability"]
        print(f"{'gpu':20}{gpu['name']}, compute capability {capability}, {gpu['memory_gib']} GiB; {runs}")
        for arguments, kernel in gpu["chunk_scan"].items():
            print(f"{'  chunk scan':20}{kernel}: {arguments}")
    if not gpus:
        print(f"{'gpu':20}none")


def _print_kernels(info: dict[str, Any]) -> None:
    capabilities = [tuple(map(int, gpu["compute_capability"].split("."))) for gpu in info["gpus"]]
    print(f"{'kernel':44}{'arch':>9}{'registers':>11}{'shared':>9}{'cubin':>9}{'compiled in':>13}")
    for capability in dict.fromkeys(capabilities or map(_capability, info["cuda_archs"])):
        for kernel in _cuda_kernels(*capability):
            print(
                f"{kernel['symbol']:44}{kernel['arch']:>9}{kernel['registers']:>11}{kernel['shared_bytes']:>7} B"
                f"{kernel['cubin_bytes'] / 1000:>6.0f} kB{kernel['compile_ms']:>10} ms"
            )


def _self_test() -> bool:
    """Whether every op passes on every backend of this build and machine; prints a line for each in each dtype."""
    from .testing.self_test import self_test

    passed = True
    for device in ["cpu", "cuda"] if build_info()["cuda_ops"] and torch.cuda.is_available() else ["cpu"]:
        for outcome in self_test(torch.device(device)):
            passed = passed and not outcome.failure
            dtype = str(outcome.dtype).removeprefix("torch.")
            print(f"{device:6}{outcome.op:36}{dtype:10}{outcome.failure or 'pass'}", flush=True)
    print(f"self-test: {'pass' if passed else 'FAIL'}")
    return passed


def main() -> None:
    """Print the report, or what the options ask for."""
    parser = argparse.ArgumentParser(prog="python -m oxiscan.info", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print JSON")
    what.add_argument("--kernels", action="store_true", help="list compiled kernels with registers and shared memory")
    what.add_argument("--self-test", action="store_true", help="compare ops with the reference; exit code 1 if off")
    arguments = parser.parse_args()
    if arguments.self_test:
        sys.exit(0 if _self_test() else 1)
    info = collect()
    if arguments.json:
        print(json.dumps(info, indent=2))
    elif arguments.kernels:
        _print_kernels(info)
    else:
        _print_report(info)


if __name__ == "__main__":
    main()
