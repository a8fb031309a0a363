"""Logging of a run: metrics averaged on the device, `metrics.jsonl`, trackers, progress bar."""

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from postgen.files import replacing


class Sums(TypedDict):
    """State of an `Averages` object: sum and count of each metric."""

    sums: dict[str, float]
    counts: dict[str, int]


class Averages:
    """Means of metrics between two log lines. `add` keeps tensors on the device, so it does not synchronise."""

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Add one value of each metric: a number or a tensor with one element."""
        for name, value in metrics.items():
            value = value.detach().float().reshape(()) if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> Sums:
        """Return sums and counts as plain numbers. Synchronises with the device once."""
        names = [name for name, value in self._sums.items() if isinstance(value, Tensor)]
        read = torch.stack([torch.as_tensor(self._sums[name]) for name in names]).tolist() if names else []
        plain = dict(zip(names, read, strict=True))
        return {
            "sums": {name: float(plain.get(name, value)) for name, value in self._sums.items()},
            "counts": dict(self._counts),
        }

    def load(self, state: Sums) -> None:
        """Set sums and counts to those of a checkpoint."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    def clear(self) -> None:
        """Remove all sums and counts."""
        self._sums, self._counts = {}, {}


def merged_means(parts: list[Sums]) -> dict[str, float]:
    """Return the mean of each metric over all processes; processes without a metric are left out of its mean."""
    names = dict.fromkeys(name for part in parts for name in part["sums"])
    return {
        name: math.fsum(part["sums"].get(name, 0.0) for part in parts)
        / sum(part["counts"].get(name, 0) for part in parts)
        for name in names
    }


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, each with `step`.

    Args:
        path: path of the file; created if missing.
        resumed_step: step that the run resumes from. Lines of later steps are removed, because the run writes them
            again. 0 starts a new file.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        with replacing(path) as part, part.open("wb") as file:
            for text, line in _lines(path) if resumed_step else ():
                if line["step"] <= resumed_step:
                    file.write(text.rstrip(b"\n") + b"\n")

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. Values that JSON does not support (nan, inf) are written as null."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")


def metrics_row(line: str | bytes) -> dict[str, Any] | None:
    """Return a line of `metrics.jsonl` as a dict; None if the line is incomplete or damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # ValueError includes invalid UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each valid line of a `metrics.jsonl` with its content."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            if (row := metrics_row(text)) is not None:
                yield text, row


class Progress:
    """Progress bar of the first process, with loss, learning rate, seconds per step and peak memory.

    Args:
        step: steps that are already done.
        max_steps: steps of the run.
        shown: whether to show the bar.
        name: label of the bar.
    """

    def __init__(self, *, step: int, max_steps: int, shown: bool, name: str = "train") -> None:
        self._bar = tqdm(total=max_steps, initial=step, disable=not shown, dynamic_ncols=True, desc=name)

    def step(self) -> None:
        """Advance the bar by one step."""
        self._bar.update(1)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show the newest metrics next to the bar."""
        labels = {"loss": "loss", "learning_rate": "lr", "step_time": "s/step", "memory/peak_gb": "GB"}
        self._bar.set_postfix({label: f"{metrics[name]:.3g}" for name, label in labels.items() if name in metrics})

    def close(self) -> None:
        """Close the bar in its current state."""
        self._bar.close()


def say(text: str) -> None:
    """Write a line to stderr without breaking the progress bar."""
    tqdm.write(text, file=sys.stderr)


class StepTimer:
    """Measures the mean seconds per step between two readings."""

    def __init__(self) -> None:
        self._since, self._steps = time.monotonic(), 0

    def step(self) -> None:
        """Count one step."""
        self._steps += 1

    def read(self) -> float:
        """Return the mean seconds per step since the last reading, and start a new measurement; 0 without steps."""
        now = time.monotonic()
        mean = (now - self._since) / self._steps if self._steps else 0.0
        self._since, self._steps = now, 0
        return mean


def available_trackers(names: list[str]) -> list[str]:
    """Return the trackers of `names` that are installed; one warning lists the others."""
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if absent := [name for name in names if name not in installed]:
        text = (
            f"trackers that are not installed are skipped: {', '.join(absent)}. Metrics are in metrics.jsonl; set "
            "report_to: none to avoid this warning"
        )
        warnings.warn(text, stacklevel=2)
    return [name for name in names if name in installed]
