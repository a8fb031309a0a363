"""Two processes of a run on one machine (gloo), started without a launcher, several runs one after another in them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.faults_two_gpus import free_ports

ROOT = Path(__file__).resolve().parents[2]


def run_pair(jobs: str, folder: Path, seconds: int = 300) -> None:
    """Run the functions of a list `package.module:NAME` in two processes, each with `folder`."""
    command = [sys.executable, "-m", "tests.training.pair", jobs, str(folder)]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "PORTS": " ".join(map(str, free_ports(16)))}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    told = []
    try:
        told = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in told)


def main(jobs: str, folder: str) -> None:
    """One of the two processes. Each job has a group of its own, as if it were alone."""
    from accelerate.state import AcceleratorState

    module, _, name = jobs.partition(":")
    for job, port in zip(getattr(importlib.import_module(module), name), os.environ["PORTS"].split(), strict=False):
        os.environ["MASTER_PORT"] = port
        job(Path(folder))
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
