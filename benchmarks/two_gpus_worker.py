"""One process of `benchmarks.faults_two_gpus`, which trains one run after the other, each in a new process group.

    accelerate launch ... -m benchmarks.two_gpus_worker JOBS.json

The process writes the outcome of a run to `rank-R.json` in the folder of the run. It ends if a run fails, because
results after a CUDA error cannot be trusted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GRACE = 8.0
"""Seconds that a process waits after its error, so that the other process can report its own error."""


def train(settings: Mapping[str, Any]) -> None:
    """Train a run in full float32.

    Args:
        settings: the settings of a recipe, including `method`.
    """
    import torch

    from postgen.training.recipe import find_method

    kind = find_method(settings["method"])
    trainer = kind.from_config(kind.config_class.from_dict(settings))
    # TF32 would round sums over different shards differently, and the comparison would show only that.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    trainer.train()


def outcome(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a run; return its duration and its error with the traceback, empty if it succeeded."""
    import torch
    from accelerate.state import AcceleratorState

    from postgen.errors import UserError

    began = time.monotonic()
    found: dict[str, Any] = {"error": "", "refused": ""}
    try:
        train(settings)
    except UserError as error:
        found |= {"error": traceback.format_exc(), "refused": str(error)}
    except Exception:
        found["error"] = traceback.format_exc()
    if found["refused"] and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def _write(path: Path, text: str) -> None:
    """Write a file that is complete as soon as it exists."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def main(path: str) -> int:
    """Train the runs of a JSON file, `[{"name", "folder", "port", "settings"}]`; SIGUSR1 prints the stack."""
    jobs = json.loads(Path(path).read_text(encoding="utf-8"))
    rank = int(os.environ.get("RANK", "0"))
    with open(f"{path}.{rank}.log", "w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    # The launcher has one store for all process groups; a group would find the entries of an earlier group in it.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    import postgen.grpo.nft
    import postgen.grpo.trainer  # noqa: F401

    faulthandler.register(signal.SIGUSR1, file=2)
    _write(Path(f"{path}.ready-{rank}"), str(os.getpid()))
    for job in jobs:
        os.environ["MASTER_PORT"] = str(job["port"])
        print(f"--- {job['name']}, process {rank}", file=sys.stderr, flush=True)
        found = outcome(job["settings"])
        _write(Path(job["folder"], f"rank-{rank}.json"), json.dumps(found))
        if found["error"] and not found["refused"]:
            time.sleep(GRACE)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
