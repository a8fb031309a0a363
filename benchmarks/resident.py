"""The peak memory of this process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


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
