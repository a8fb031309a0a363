"""Measured time of a transformer's forward by size, kept as a table per device.

table = measure_latency(pipe.transformer, [(33, 480, 832), (81, 480, 832)])
table.save(Path("h100.json"))
LatencyTable.load(Path("h100.json")).seconds(tokens=20_000)
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postgen.compat import unwrap
from postgen.errors import UserError
from postgen.families.calls import call_arguments, grid_of_call, registered_name
from postgen.families.cost import latent_size
from postgen.files import replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """One measured size."""

    num_frames: int
    height: int
    width: int
    tokens: int
    """Video tokens of one clip."""
    seconds: float
    """Median of one forward of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What was measured, of what and where."""

    transformer: str
    """Class name."""
    device: str
    dtype: str
    torch: str
    """Version."""
    batch: int
    text_tokens: int
    repeats: int
    rows: tuple[Latency, ...]
    """By tokens, ascending."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.tokens)))
        if not self.rows:
            raise UserError("a latency table needs at least one measured size")

    def seconds(self, tokens: int) -> float:
        """Return the time of a forward, on the straight line between the two sizes next to it.

        Sizes with equally many tokens count as one, their mean.

        Raises:
            UserError: fewer or more tokens than were measured.
        """
        places = sorted({row.tokens for row in self.rows})
        if not places[0] <= tokens <= places[-1]:
            raise UserError(
                f"{tokens} tokens were not measured on {self.device}: the table goes from {places[0]} to {places[-1]};"
                " measure a size beyond"
            )
        above = bisect.bisect_left(places, tokens)
        if places[above] == tokens:
            return self._mean(tokens)
        low, high = places[above - 1], places[above]
        part = (tokens - low) / (high - low)
        return (1 - part) * self._mean(low) + part * self._mean(high)

    def _mean(self, tokens: int) -> float:
        return statistics.fmean(row.seconds for row in self.rows if row.tokens == tokens)

    def save(self, path: Path) -> None:
        """Write it as JSON; an old file goes only when the new one is complete."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or it is no latency table.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Latency(**row) for row in content.pop("rows"))
            return cls(rows=rows, **content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no latency table ({error}): write one with LatencyTable.save") from error


def measure_latency(
    transformer: nn.Module,
    shapes: Sequence[tuple[int, int, int]],
    *,
    text_tokens: int | None = None,
    batch: int = 1,
    warm_up: int = 2,
    repeats: int = 5,
    factors: tuple[int, int] | None = None,
) -> LatencyTable:
    """Time the forward as the transformer stands: its device, its dtype, with everything that is installed on it.

    Args:
        transformer: of a registered class, on the device to measure; it may be wrapped or compiled.
        shapes: (num_frames, height, width) of clips in pixels.
        text_tokens: of the prompt; None is what the pipeline pads to.
        batch: clips in a forward.
        warm_up: forwards before the timed ones, at each size.
        repeats: timed forwards, whose median counts.
        factors: as in `forward_cost`.

    Raises:
        UserError: an unknown class, a size that it does not take, no shapes, or no repeats.
    """
    if repeats < 1 or warm_up < 0:
        raise UserError(f"repeats must be at least 1 and warm_up at least 0, got {repeats} and {warm_up}")
    model: Any = unwrap(transformer)
    kind = registered_name(type(model))
    weight = next(model.parameters())
    place = {"device": weight.device, "dtype": weight.dtype}
    rows, told = [], 0
    for shape in shapes:
        if len(shape) != 3:
            raise UserError(f"a shape is (num_frames, height, width), got {shape}")
        size = latent_size(kind, model.config, *shape, text_tokens=text_tokens, batch=batch, factors=factors, **place)
        told = size.text_tokens
        arguments = call_arguments(kind, model.config, size)
        grid = grid_of_call(model, arguments)
        if grid is None:
            raise UserError(f"{kind} does not tell its tokens at {shape}")
        seconds = _median_seconds(partial(transformer, **arguments), weight.device, warm_up, repeats)
        frames, height, width = shape
        rows.append(Latency(num_frames=frames, height=height, width=width, tokens=grid.tokens, seconds=seconds))
    return LatencyTable(
        transformer=type(model).__name__,
        device=_device_name(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        torch=torch.__version__,
        batch=batch,
        text_tokens=told,
        repeats=repeats,
        rows=tuple(rows),
    )


@torch.no_grad()
def _median_seconds(call: Callable[[], Any], device: torch.device, warm_up: int, repeats: int) -> float:
    for _ in range(warm_up):
        call()
    return statistics.median(_seconds(call, device) for _ in range(repeats))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    before = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - before


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{platform.machine()} {device.type}{threads}"
