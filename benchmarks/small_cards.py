"""Measure the memory of fine-tuning Wan 2.1 1.3B (480p, 33 frames, LoRA) with each saving, against the estimate.

    python -m benchmarks.small_cards --seconds 500    # needs one GPU with 80 GB; about 10 minutes, 15 GB of disk
    python -m benchmarks.small_cards --tiny           # a model of two small blocks, on any device, without a result

The result file is written after each row. The exit code is 3 if the time of a call did not suffice for all rows: the
same command then measures those that the file lacks for this device, versions and sizes (`--again` repeats all). It is
1 if a row failed; a further call measures that row again.

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
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import ended
from benchmarks.gates import device as machine
from benchmarks.gates import gate, read_result, write_result
from benchmarks.small_cards_model import StepConfig, StepTrainer, write_model
from postgen.errors import named_error
from postgen.info import versions
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
LEAST = 60.0
"""Seconds below which no further row is started."""


def main(argv: list[str] | None = None) -> int:
    """Measure the rows that the result lacks; return 1 if one failed, 3 if the time did not suffice for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks, on any device")
    parser.add_argument("--output", default="small_cards", help="name or path of the result file")
    parser.add_argument("--seconds", type=float, default=0.0, help="time of this call; 0: no limit")
    parser.add_argument("--again", action="store_true", help="repeat rows that the file has")
    given = parser.parse_args(argv)
    output = given.output if not given.tiny or given.output.endswith(".json") else ""
    with tempfile.TemporaryDirectory() as folder:
        found = Measuring(Path(folder), output, tiny=given.tiny, seconds=given.seconds, again=given.again)
        found()
    if found.left_out:
        print(f"left out, the time is over: {', '.join(found.left_out)}")
    failed = any("problem" in row for row in [*found.rows.values(), *found.cards.values()])
    return 1 if failed else 3 if found.left_out else 0


class Measuring:
    """Measures the rows and cards that a result file lacks, and writes the file after each of them.

    Args:
        folder: an empty folder for the model and the runs.
        output: name or path of the result file; empty for none.
        tiny: whether to measure a model of two small blocks.
        seconds: time for all rows; 0 is no limit.
        again: whether to measure rows that the file has.
    """

    def __init__(self, folder: Path, output: str, *, tiny: bool, seconds: float = 0.0, again: bool = False) -> None:
        self.folder, self.output, self.tiny = folder, output, tiny
        self.end = time.monotonic() + seconds if seconds else float("inf")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tiny_size, size = {"num_frames": 5, "height": 32, "width": 32}, {"num_frames": 33, "height": 480, "width": 832}
        self.size, self.blocks = (tiny_size, 2) if tiny else (size, 30)
        self.settings = {"tiny": tiny, "steps": STEPS, "lora_r": 32, **self.size}
        self.left_out: list[str] = []
        self.skipped: dict[str, str] = {}
        old = {} if again else self._old()
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in old.get("rows", ())}
        self.cards: dict[int, dict[str, Any]] = {row["card_gb"]: row for row in old.get("cards", ())}

    def _old(self) -> dict[str, Any]:
        """Return the result so far, if it has the sizes, device and versions of this call."""
        try:
            old = read_result(self.output) if self.output else {}
        except FileNotFoundError:
            return {}
        if not old or (self.settings, machine(), used(versions())) == (
            old["settings"],
            old["device"],
            used(old["versions"]),
        ):
            return old
        print(f"{self.output} has other sizes, or another device or versions: all rows are measured")
        return {}

    @cached_property
    def model(self) -> Path:
        """The model, written when the first row needs it."""
        return write_model(self.folder / "model", self.device, tiny=self.tiny)

    def __call__(self) -> None:
        """Measure the rows, then the cards."""
        for name, settings in ROWS.items():
            if reason := missing(settings, self.device):
                self.skipped[name] = reason
            elif name not in self.rows or "problem" in self.rows[name]:
                if self._out_of_time(name):
                    continue
                self.rows[name] = {"name": name, **self.tried(named(settings, self.blocks))}
                print(line(self.rows[name]), flush=True)
                self.keep()
        if self.device.type == "cuda" and not self.tiny:
            for card in CARDS:
                if not self.cards.get(card, {}).get("trained") and not self._out_of_time(f"card of {card} GB"):
                    self.cards[card] = self.card(card)
                    print(self.cards[card], flush=True)
                    self.keep()
        self.keep()

    def _out_of_time(self, name: str) -> bool:
        """Note a row for which the time does not suffice. The cards need the estimates of all rows."""
        over = self.end - time.monotonic() < LEAST or (name not in ROWS and bool(self.left_out))
        self.left_out += [name] if over else []
        return over

    def tried(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers of a run, or its error as `problem`, so that other rows are measured."""
        try:
            return one(self.folder, self.model, settings, self.size, self.device)
        except Exception as error:  # any error concerns this row only
            return {**settings, "problem": named_error(error)}

    def card(self, card: int) -> dict[str, Any]:
        """Train on a card of some GiB: the first of `CARD_ROWS` whose estimate fits, with a limit of the memory."""
        room = (card * GIGA - RESERVE) / GIGA
        names = [name for name in CARD_ROWS if self.rows.get(name, {}).get("needed_gb", card) <= room]
        if not names:
            return {"card_gb": card, "settings": None, "trained": False}
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(room * GIGA / total)
        try:
            found = self.tried(named(ROWS[names[0]], self.blocks))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        kept = {key: found[key] for key in ("problem", "measured_gb", "seconds_per_step") if key in found}
        return {"card_gb": card, "settings": names[0], "trained": "problem" not in found, **kept}

    def keep(self) -> None:
        """Write the result file."""
        if self.output:
            print(write_result(self.output, self.payload()), flush=True)

    def payload(self) -> dict[str, Any]:
        """Return the content of the result file."""
        rows = [self.rows[name] for name in ROWS if name in self.rows]
        cards = [self.cards[card] for card in CARDS if card in self.cards]
        wanted = self.rows.get(CARD_ROW, {})
        whole = len(rows) + len(self.skipped) == len(ROWS) and not any("problem" in row for row in rows)
        errors = [abs(row["measured_gb"] / row["estimated_gb"] - 1) for row in rows if row.get("measured_gb")]
        trained = float(sum(card["trained"] for card in cards))
        return {
            "settings": self.settings,
            "rows": rows,
            "cards": cards,
            "skipped": self.skipped,
            "gates": [
                gate("sft_wan_1p3b_peak_gb", wanted.get("whole_run_gb"), "<=", 16),
                gate("memory_estimate_error", max(errors) if whole and errors else None, "<=", 0.15),
                gate("cards_that_train", trained if len(cards) == len(CARDS) else None, ">=", 4),
            ],
        }


def used(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions of the packages that determine the memory."""
    return {name: found.get(name) for name in ("torch", "diffusers", "transformers", "peft")}


def missing(settings: dict[str, Any], device: torch.device) -> str:
    """Return what this machine lacks for a row; empty if it lacks nothing."""
    packages = {PACKAGES[value] for value in settings.values() if isinstance(value, str) and value in PACKAGES}
    packages = {package for package in packages if find_spec(package) is None}
    if packages or (settings.get("base_quant") == "nf4" and device.type == "cpu"):
        return f"needs {', '.join(sorted(packages)) or 'a GPU'}"
    return ""


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


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    if "problem" in row:
        return f"{row['name']:24s} {row['problem']}"
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
