"""Measured time of a transformer's forward pass by video size: one table per device.

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
    """The measurement of one video size: frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int
    tokens: int
    """Video tokens of one clip."""
    seconds: float
    """Median time of one forward pass of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """The times of forward passes at several video sizes, with the model, device and settings of the measurement."""

    transformer: str
    """Class name of the transformer."""
    device: str
    """Name of the GPU, or the machine type and number of threads of the CPU."""
    dtype: str
    torch: str
    """Version of torch."""
    batch: int
    """Clips in a forward pass."""
    text_tokens: int
    """Text tokens of each clip."""
    repeats: int
    """Timed forward passes at each size."""
    rows: tuple[Latency, ...]
    """Sorted by tokens, ascending."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.tokens)))
        if not self.rows:
            raise UserError("a latency table needs at least one measured size")

    def seconds(self, tokens: int) -> float:
        """Return the time of a forward pass, interpolated linearly between the two nearest measured sizes.

        Sizes with the same number of tokens count as one size, whose time is their mean.

        Raises:
            UserError: `tokens` is below the smallest or above the largest measured number.
        """
        places = sorted({row.tokens for row in self.rows})
        if not places[0] <= tokens <= places[-1]:
            raise UserError(
                f"{tokens} tokens are outside the latency table of {self.device}, which covers {places[0]} to"
                f" {places[-1]}: measure a size beyond these"
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
        """Write the table as JSON. An existing file is replaced only when the new file is complete."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            UserError: the file does not exist, or is not a latency table.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Latency(**row) for row in content.pop("rows"))
            return cls(rows=rows, **content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a latency table ({error}): write one with LatencyTable.save") from error


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
    """Time the forward pass of a transformer in its present state: device, dtype and all installed plug-ins.

    Args:
        transformer: an instance of a registered class, on the device to measure. It may be wrapped or compiled.
        shapes: (num_frames, height, width) of the clips, in pixels.
        text_tokens: tokens of the prompt; None is the number that the pipeline pads to.
        batch: clips in a forward pass.
        warm_up: untimed forward passes before the timed ones, at each size; at least 0.
        repeats: timed forward passes at each size, at least 1; the table holds their median.
        factors: as in `forward_cost`.

    Raises:
        UserError: the class is unknown, it does not support one of the sizes, `shapes` is empty, or `repeats` or
            `warm_up` is too small.
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
            raise UserError(f"a shape must be (num_frames, height, width), got {shape}")
        # The same forward arguments as in a call of the pipeline, with tensors of this size.
        size = latent_size(kind, model.config, *shape, text_tokens=text_tokens, batch=batch, factors=factors, **place)
        told = size.text_tokens
        arguments = call_arguments(kind, model.config, size)
        grid = grid_of_call(model, arguments)
        if grid is None:
            raise UserError(f"the number of video tokens of {kind} at {shape} is unknown: it cannot be timed by size")
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
