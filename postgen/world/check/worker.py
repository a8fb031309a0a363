"""What a process of `workers` runs: jobs come in at stdin, reports go out at stdout, until stdin ends.

It ends with the process that started it, however that one ends: then stdin is closed. It is run as a file, not as a
module, and not by `multiprocessing`, which would import the parent's main program again.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Answer each job, arguments of `report.judge`, with (True, its reports) or (False, the error)."""
    _bare_packages()
    from postgen.world.check.report import judge

    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    # Whatever is printed must not get among the answers.
    sys.stdout = sys.stderr
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        answer: tuple[bool, object]
        try:
            answer = True, judge(*job)
        except Exception as error:
            error.add_note(f"In a process of the judge:\n{traceback.format_exc()}")
            answer = False, error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            # Nobody is left to hear it; a plain return would try to write the rest again.
            os._exit(0)


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
