"""Measure the memory of fine-tuning Wan 2.1 1.3B (480p, 33 frames, LoRA) with each saving, against the estimate.

    python -m benchmarks.small_cards            # needs one GPU with 80 GB; about 10 minutes, 15 GB of disk
    python -m benchmarks.small_cards --tiny     # a model of two small blocks, on any device, without a result file

The weights are random: they do not change the memory or the time of a step. Every row is a run of the trainer with its
own settings, and has the largest allocated memory of its steps, and of the encoding of a caption before them. The rows
of cards run with a limit of the memory of the process, so that a run that needs more fails. Without CUDA no memory is
measured.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import ended
from benchmarks.gates import gate, write_result
from benchmarks.small_cards_model import StepConfig, StepTrainer, write_model
from postgen.training.memory import CARDS, GIGA, RESERVE

CHECKPOINTED = {"gradient_checkpointing": True}
PARKED = {**CHECKPOINTED, "offload_frozen": True}
SMALL_STATE = {**PARKED, "optim": "adamw_8bit"}
ROWS: dict[str, dict[str, Any]] = {
    "no saving": {},
    "gradient_checkpointing": CHECKPOINTED,
    "+ offload_frozen": PARKED,
    "+ adamw_8bit": SMALL_STATE,
    "+ adamw_8bit_bnb": {**PARKED, "optim": "adamw_8bit_bnb"},
    "+ adafactor": {**PARKED, "optim": "adafactor"},
    "+ int8 base": {**PARKED, "base_quant": "int8"},
    "+ fp8 base": {**PARKED, "base_quant": "fp8"},
    "+ int4 base": {**PARKED, "base_quant": "int4"},
    "+ nf4 base": {**PARKED, "base_quant": "nf4"},
    "+ half of the blocks": {**PARKED, "offload_blocks": 0.5},
    "+ all blocks": {**PARKED, "offload_blocks": 1.0},
    "all": {**SMALL_STATE, "base_quant": "int8", "offload_blocks": 1.0},
}
"""Name of a row -> its settings; `offload_blocks` is a share of the blocks here."""
PACKAGES = {"adamw_8bit": "torchao", "adamw_8bit_bnb": "bitsandbytes", "nf4": "bitsandbytes"}
CARD_ROW = "+ offload_frozen"
"""The row whose settings a card of each size runs first; a smaller card takes the next row of `CARD_ROWS`."""
CARD_ROWS = (CARD_ROW, "+ half of the blocks", "+ all blocks", "all")
STEPS = 4


def main(argv: list[str] | None = None) -> int:
    """Measure all rows and write the result; with `--tiny` print it only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks, on any device")
    parser.add_argument("--output", default="small_cards", help="name or path of the result file")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        payload = measure(Path(folder), tiny=given.tiny)
    for row in payload["rows"]:
        print(line(row))
    if not given.tiny or given.output.endswith(".json"):
        print(write_result(given.output, payload))
    return 0


def measure(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Return the content of the result file.

    Args:
        folder: an empty folder for the model and the runs.
        tiny: whether to measure a model of two small blocks.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = write_model(folder / "model", device, tiny=tiny)
    size = {"num_frames": 5, "height": 32, "width": 32} if tiny else {"num_frames": 33, "height": 480, "width": 832}
    blocks = 2 if tiny else 30
    rows, skipped = [], {}
    for name, settings in ROWS.items():
        missing = {PACKAGES[value] for value in settings.values() if isinstance(value, str) and value in PACKAGES}
        missing = {package for package in missing if find_spec(package) is None}
        if missing or (settings.get("base_quant") == "nf4" and device.type == "cpu"):
            skipped[name] = f"needs {', '.join(sorted(missing)) or 'a GPU'}"
            continue
        rows.append({"name": name, **one(folder, model, named(settings, blocks), size, device)})
    cards = cards_of(rows, folder, model, blocks, size, device) if device.type == "cuda" and not tiny else []
    wanted = next((row for row in rows if row["name"] == CARD_ROW), {})
    errors = [abs(row["measured_gb"] / row["estimated_gb"] - 1) for row in rows if row.get("measured_gb")]
    return {
        "settings": {"tiny": tiny, "steps": STEPS, "lora_r": 32, **size},
        "rows": rows,
        "cards": cards,
        "skipped": skipped,
        "gates": [
            gate("sft_wan_1p3b_peak_gb", wanted.get("whole_run_gb"), "<=", 16),
            gate("memory_estimate_error", max(errors, default=None), "<=", 0.15),
            gate("cards_that_train", float(sum(card["trained"] for card in cards)) if cards else None, ">=", 4),
        ],
    }


def named(settings: dict[str, Any], blocks: int) -> dict[str, Any]:
    """Return settings with the number of offloaded blocks instead of their share."""
    share = settings.get("offload_blocks")
    return settings if share is None else {**settings, "offload_blocks": round(share * blocks)}


def one(
    folder: Path, model: Path, settings: dict[str, Any], size: dict[str, int], device: torch.device
) -> dict[str, Any]:
    """Train a few steps with some settings; return the measured and the estimated memory, and the time of a step."""
    cuda = device.type == "cuda"
    _free(device)
    run = StepTrainer(
        StepConfig(
            output_dir=str(folder / "run"), model=str(model), dtype="bfloat16", bf16=cuda, max_steps=STEPS,
            report_to=[], disable_tqdm=True, save_steps=0, **size, **settings,
        )
    )  # fmt: skip
    times: list[float] = []

    before_steps: list[float] = []

    def ticked() -> None:
        if cuda:
            torch.cuda.synchronize()
            if not times:  # the first step also counts the allocations of libraries and of the loading
                before_steps.append(torch.cuda.max_memory_allocated() / GIGA)
                torch.cuda.reset_peak_memory_stats()
        times.append(time.perf_counter())

    run.on_optimizer_step = ticked  # type: ignore[method-assign]
    try:
        run.train()
        gaps = [after - before for before, after in pairwise(times)]
        return {
            **settings,
            "estimated_gb": run.plan.step(run.plan.now) / GIGA,
            "needed_gb": run.plan.needed(run.plan.now) / GIGA,
            "encoding_estimated_gb": run.plan.encoding(run.plan.now) / GIGA,
            "whole_run_gb": max(*before_steps, torch.cuda.max_memory_allocated() / GIGA) if cuda else None,
            "activations_gb": run.plan.activations[run.plan.now.gradient_checkpointing] / GIGA,
            "measured_gb": torch.cuda.max_memory_allocated() / GIGA if cuda else None,
            "reserved_gb": torch.cuda.max_memory_reserved() / GIGA if cuda else None,
            "seconds_per_step": min(gaps),
        }
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)
        del run
        _free(device)


def cards_of(
    rows: list[dict[str, Any]], folder: Path, model: Path, blocks: int, size: dict[str, int], device: torch.device
) -> list[dict[str, Any]]:
    """Train on cards of several sizes: the first of `CARD_ROWS` whose estimate fits, under a limit of the memory."""
    found = []
    total = torch.cuda.get_device_properties(device).total_memory
    estimates = {row["name"]: row["needed_gb"] for row in rows}
    for card in CARDS:
        room = (card * GIGA - RESERVE) / GIGA
        names = [name for name in CARD_ROWS if estimates.get(name, card) <= room]
        row: dict[str, Any] = {"card_gb": card, "settings": names[0] if names else None, "trained": False}
        if names:
            torch.cuda.set_per_process_memory_fraction(room * GIGA / total)
            try:
                measured = one(folder, model, named(ROWS[names[0]], blocks), size, device)
                row |= {"trained": True, **{key: measured[key] for key in ("measured_gb", "seconds_per_step")}}
            except torch.OutOfMemoryError as error:
                row["problem"] = str(error).split(". ")[0]
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    measured = "-" if row["measured_gb"] is None else f"{row['measured_gb']:.2f}"
    memory = f"estimated {row['estimated_gb']:7.2f}  measured {measured:>7s} GiB"
    return f"{row['name']:24s} {memory}  {row['seconds_per_step']:.2f} s"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(ended("small_cards", main, "run the same command again"))
