"""Start two processes on one machine (gloo) without a launcher, and do several runs in them one after another."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

from benchmarks.launches import free_ports
from tests.children import Child


def run_pair(jobs: str, folder: Path, seconds: float = 300) -> None:
    """Call all functions of the list `package.module:NAME` with `folder`, in two processes."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    pair = [
        Child("tests.training.pair", (jobs, folder), {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    end = time.monotonic() + seconds
    # If one process fails, the other would wait forever.
    while time.monotonic() < end and any(each.code is None for each in pair) and not any(each.code for each in pair):
        time.sleep(0.05)
    codes = [each.code for each in pair]
    for each in pair:
        each.kill()
    assert codes == [0, 0], f"{codes}\n" + "\n".join(each.said()[-3000:] for each in pair)


def main(jobs: str, folder: str) -> None:
    """Run all jobs in one of the two processes. Each job gets a new process group."""
    from accelerate.state import AcceleratorState

    module, _, name = jobs.partition(":")
    for number, job in enumerate(getattr(importlib.import_module(module), name)):
        os.environ["MASTER_PORT"] = _port(Path(folder) / f"port-{number}")
        job(Path(folder))
        AcceleratorState._reset_state(reset_partial_state=True)


def _port(note: Path) -> str:
    """Return the port of a job. The first process chooses it just before use, because free ports can be taken."""
    if os.environ["RANK"] == "0":
        note.with_suffix(".new").write_text(str(free_ports(1)[0]))
        note.with_suffix(".new").rename(note)
    while not note.exists():
        time.sleep(0.01)
    return note.read_text()


if __name__ == "__main__":
    main(*sys.argv[1:])
