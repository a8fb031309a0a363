"""Program of a process of `workers`: it reads jobs from stdin and writes reports to stdout until stdin ends.

A job is one line of JSON, then the raw float64 values of its rows and spots. An answer is one line of JSON: the
reports, or the error.

The process ends when its parent ends for any reason, because stdin is closed then. The parent runs this file as a
script, not as a module and not by `multiprocessing`, which would import the parent's main program again.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    """Answer the jobs one by one."""
    _bare_packages()
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    # Printed text must not mix with the answers.
    sys.stdout = sys.stderr
    while line := jobs.readline():
        job = json.loads(line)
        rows, spots = jobs.read(job["bytes"]), jobs.read(job["spot_bytes"])
        answer: dict[str, object]
        try:
            answer = {"reports": _reports(job, rows, spots)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        try:
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
        except BrokenPipeError:
            # No reader is left; a plain return would try to write the rest again.
            os._exit(0)


def _reports(job: dict[str, Any], rows: bytes, spots: bytes) -> list[dict[str, Any]]:
    import numpy as np

    from postgen.world.check.report import judge
    from postgen.world.check.sight import Sight
    from postgen.world.reading import Reading

    sight = Sight(
        rows_NC=np.frombuffer(rows, np.float64).reshape(-1, job["columns"]),
        count_BF=np.array(job["count"]),
        spots_MSC=np.frombuffer(spots, np.float64).reshape(-1, *job["spot_shape"]),
        height=job["height"],
        width=job["width"],
        likeness=job["likeness"],
        film=job["film"],
    )
    return [report.to_dict() for report in judge(sight, [Reading.from_dict(asked) for asked in job["asked"]])]


def _bare_packages() -> None:
    """Make modules of these packages importable without running the packages' own imports.

    The packages import torch, which costs 2 s and 300 MB per process.
    """
    folder = Path(__file__).resolve().parent
    for name in ("postgen.world.check", "postgen.world", "postgen"):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        folder = folder.parent


if __name__ == "__main__":
    main()
