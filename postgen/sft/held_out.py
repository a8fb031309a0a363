"""The loss of held-out clips at fixed noise, paired over the checkpoints of a run.

Each held-out clip is noised with the same noise at the same levels in every evaluation. The difference of two
evaluations therefore has no variance from noise and levels, and its standard error is that over clips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from postgen.families import Condition
from postgen.files import replacing
from postgen.sampling.seeds import normal, seed_of

from .data import Batch
from .noise import NoiseLevels

Errors = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""Clean latents (B, ...), noise (B, ...), noise levels (B,) and conditions -> squared errors (B,)."""

Losses = dict[str, list[float]]
"""Key of a held-out clip -> its loss at each noise level, from low to high."""


class HeldOut:
    """Measures the loss of held-out clips.

    Args:
        levels: noise levels of the model.
        count: number of noise levels.
        seed: seed of the noise.
        folder: folder of the tables.
    """

    def __init__(self, levels: NoiseLevels, count: int, seed: int, folder: Path) -> None:
        self.levels, self.count, self.seed, self.folder = levels, count, seed, folder
        self.first: Losses = {}
        """Losses in the first evaluation of the run; empty before."""

    def measure(
        self, batches: Iterable[tuple[Sequence[int], Batch]], errors: Errors, step: int, *, writes: bool
    ) -> dict[str, float]:
        """Return the mean loss, and its change since the first evaluation with its standard error.

        All processes must call this; each measures its share of the clips.

        Args:
            batches: held-out clips of this process with their numbers in the whole data set.
            errors: computes the loss.
            step: steps of the run so far, for the name of the table.
            writes: whether this process writes the table.
        """
        own = [row for numbers, batch in batches for row in self._rows(numbers, batch, errors)]
        rows = {row["key"]: row for row in gather_object(own)}
        if not rows:
            return {}
        rows = {key: rows[key] for key in sorted(rows)}
        if writes:
            with replacing(self.folder / f"loss-{step:06d}.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        now = {key: row["losses"] for key, row in rows.items()}
        self.first = self.first or now
        return compared(now, self.first)

    def _rows(self, numbers: Sequence[int], batch: Batch, errors: Errors) -> list[dict[str, Any]]:
        shape, device = batch.latents.shape[1:], batch.latents.device
        times = (torch.arange(self.count, dtype=torch.float64) + 0.5) / self.count
        sigmas = self.levels.at(times, shape)
        found = []
        for place, sigma in enumerate(sigmas):
            noise = normal(shape, [seed_of(self.seed, "eval", number, place) for number in numbers], device)
            levels = sigma.repeat(len(numbers)).to(device)
            found.append(errors(batch.latents, noise, levels, batch.conditions))
        table = torch.stack(found, 1).tolist()
        pairs = zip(batch.keys, table, strict=True)
        return [
            {"key": key, "bucket": str(batch.bucket), "noise_levels": sigmas.tolist(), "losses": losses}
            for key, losses in pairs
        ]


def compared(now: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean loss, and the paired change since the first evaluation.

    Args:
        now: losses of each clip.
        first: losses of each clip in the first evaluation. Clips that one of them lacks do not count in the change.

    Returns:
        `loss`; `loss_change` and `loss_change_se`, its standard error over clips (left out for a single clip).
    """
    means = {key: math.fsum(losses) / len(losses) for key, losses in now.items()}
    found = {"loss": math.fsum(means.values()) / len(means)}
    both = [key for key in means if key in first and len(first[key]) == len(now[key])]
    if both:
        changes = [means[key] - math.fsum(first[key]) / len(first[key]) for key in both]
        change = math.fsum(changes) / len(changes)
        found["loss_change"] = change
        if len(changes) > 1:
            spread = math.fsum((each - change) ** 2 for each in changes) / (len(changes) - 1)
            found["loss_change_se"] = math.sqrt(spread / len(changes))
    return found
