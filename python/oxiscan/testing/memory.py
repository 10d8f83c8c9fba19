"""How much memory a call takes at its peak."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise NotImplementedError(f"peak_memory: /proc/self/status has no {field}; it needs Linux")
    return int(found[1]) * 1024


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which this process's resident memory rises above its present size while `call()` runs. Linux only.

    Memory that the process freed before but kept may be used again unseen: what matters is best measured first.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    result = call()  # kept until the peak is read, as a caller would
    peak = _resident("VmHWM")
    del result
    return max(peak - before, 0)
