"""The rollouts that a run writes to disk: a table of their samples, and some clips."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from postgen.files import replacing
from postgen.rewards import RewardResult
from postgen.sampling.conditions import Row
from postgen.training.samples import write_clip


class CompletionLog:
    """Writes the rollouts of the first process: `step-N.jsonl` with one row per sample, and the first few clips.

    Args:
        folder: folder of the files.
        clips: number of clips to write for each rollout.
        fps: frames per second of the clips.
    """

    def __init__(self, folder: Path, clips: int, fps: float) -> None:
        self.folder, self.clips, self.fps = folder, clips, fps

    def write(
        self,
        step: int,
        rows: Sequence[Row],
        clips: Sequence[Tensor],
        result: RewardResult,
        advantages: Sequence[float],
    ) -> None:
        """Write the samples of one rollout; all sequences have one entry per sample, in the same order.

        Args:
            step: optimiser steps done before the rollout.
            rows: prompt rows.
            clips: clips (F, 3, H, W) in [0, 1].
            result: rewards.
            advantages: clipped advantages.
        """
        lines = []
        for number, row in enumerate(rows):
            scores = {name: _number(result.values[number, k].item()) for k, name in enumerate(result.names)}
            extra = {name: values[number] for name, values in result.extra.items()}
            lines.append({"step": step, "prompt": row["prompt"], **scores, "advantage": advantages[number], **extra})
        with replacing(self.folder / f"step-{step:06d}.jsonl") as part:
            part.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
        for number, clip in enumerate(clips[: self.clips]):
            write_clip(self.folder / f"step-{step:06d}-{number}", clip, self.fps)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
