"""The peak memory of this process, on the host and on its GPU."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_gpu_gib() -> float | None:
    """Return the largest memory of torch on the current GPU since `forget_peak`, in GiB; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def forget_peak() -> None:
    """Begin a new measurement of `peak_gpu_gib`."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_resident_mib() -> float:
    """Return the largest resident set of this process since its start, in MiB.

    `ru_maxrss` starts with the resident set of the parent process, so it may never grow under a large parent. Linux
    reports the peak of the process alone as VmHWM. Other systems only have `ru_maxrss`.
    """
    if _STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
