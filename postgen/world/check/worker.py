"""What a process of `workers` runs: jobs come in at stdin, reports go out at stdout, until stdin ends.

A job is a line of JSON and the raw float64 of its rows and spots; an answer is one of JSON, the reports or the error.

It ends with the process that started it, however that one ends: then stdin is closed. It is run as a file, not as a
module, and not by `multiprocessing`, which would import the parent's main program again.
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
    """Answer each job."""
    _bare_packages()
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    # Whatever is printed must not get among the answers.
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
            # Nobody is left to hear it; a plain return would try to write the rest again.
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
    """Make modules of these packages importable without the packages' own imports: torch, 2 s and 300 MB a process."""
    folder = Path(__file__).resolve().parent
    for name in ("postgen.world.check", "postgen.world", "postgen"):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        folder = folder.parent


if __name__ == "__main__":
    main()
