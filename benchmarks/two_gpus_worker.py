"""One process of `benchmarks.faults_two_gpus`: trains one run after another, each in a group of processes of its own.

    accelerate launch ... -m benchmarks.two_gpus_worker JOBS.json

What becomes of a run is written to `<run>/rank-R.json` beside it. A run that fails ends the process: after an error of
CUDA nothing that follows can be trusted.
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
"""Seconds that a process waits after its error, so that the other one can tell its own."""


def train(settings: Mapping[str, Any]) -> None:
    """Train a run in full float32.

    Args:
        settings: of a recipe, with its method.
    """
    import torch

    from postgen.training.recipe import find_method

    kind = find_method(settings["method"])
    trainer = kind.from_config(kind.config_class.from_dict(settings))
    # In TF32 sums over other parts round otherwise, and the comparison would be of that.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    trainer.train()


def outcome(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a run; return how long it took, and its error with where it came from."""
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
    """Write a file that is whole as soon as it is there."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def main(path: str) -> int:
    """Train the runs of a file, `[{"name", "folder", "port", "settings"}]`; SIGUSR1 asks for the stack."""
    jobs = json.loads(Path(path).read_text(encoding="utf-8"))
    rank = int(os.environ.get("RANK", "0"))
    with open(f"{path}.{rank}.log", "w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    # The launcher keeps one store for all groups, in which those of an earlier one would be found.
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
