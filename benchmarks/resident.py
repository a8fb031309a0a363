"""The most memory that this process has held so far."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident_mib() -> float:
    """MiB of the largest resident set of this process, in its own life.

    `ru_maxrss` begins at what the parent held when it started this process, so under a large parent it never grows.
    Linux counts the process alone as VmHWM; elsewhere `ru_maxrss` is what there is.
    """
    if _STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
