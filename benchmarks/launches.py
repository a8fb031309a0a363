"""Starting several processes for a benchmark, and ending them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Root of the checkout."""


def launcher(launch: str, device: str, count: int) -> list[str]:
    """Return the words after `python` that start `count` processes with a file of `recipes/accelerate`.

    Args:
        launch: name of the file.
        device: "cuda", or "cpu", which always uses `ddp_cpu.yaml`.
        count: number of processes.
    """
    config = ROOT / "recipes" / "accelerate" / f"{launch if device == 'cuda' else 'ddp_cpu'}.yaml"
    return ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(count)]


def send(processes: Iterable[int], number: int) -> None:
    """Send a signal to processes; those that have ended are skipped."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def wait_for(files: Sequence[Path], process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until all files exist, the process has ended, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not all(file.exists() for file in files):
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of this machine on which no process listens."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
