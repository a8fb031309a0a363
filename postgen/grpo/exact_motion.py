"""Motion of evaluated clips compared with the exact clips of the same scenes of the synthetic world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postgen.errors import UserError
from postgen.metrics.world_truth import exact_motion, log_motion_ratio
from postgen.rewards.world import NO_BODY, scenes
from postgen.sampling.conditions import Row
from postgen.world import Spec


class ExactMotion:
    """Renders the exact clip of each evaluated prompt once, and keeps its motion.

    Args:
        size: `num_frames`, `height` and `width` of a clip.
        device: device that renders.

    Raises:
        UserError: clips have a single frame, or are not square as the world's are.
    """

    def __init__(self, size: Mapping[str, int], device: torch.device) -> None:
        frames, height, width = (size[name] for name in ("num_frames", "height", "width"))
        if frames < 2:
            raise UserError("eval_motion_exact must be false for images, which have no motion")
        if height != width:
            raise UserError(f"eval_motion_exact needs square clips, as the world renders them, not {width} x {height}")
        self.frames, self.side, self.device = frames, height, device
        self._found: dict[int, float | None] = {}

    def log_ratios(self, motion: Sequence[float], rows: Sequence[Row], numbers: Sequence[int]) -> list[float | None]:
        """Return log(motion / exact motion) of samples; None if a row has no scene, or if nothing moves in it.

        Args:
            motion: motion of each sample.
            rows: prompt row of each sample, with a scene in the column `spec` or in the prompt.
            numbers: position of each row among the held-out rows, by which the exact motion is kept.
        """
        asked = {number: row for number, row in zip(numbers, rows, strict=True) if number not in self._found}
        found = zip(asked, scenes_of(list(asked.values())), strict=True)
        scenes = {number: scene for number, scene in found if scene is not None}
        values = exact_motion(list(scenes.values()), self.frames, self.side, self.device)
        self._found |= {**dict.fromkeys(asked), **dict(zip(scenes, values, strict=True))}
        return [log_motion_ratio(m, self._found[number]) for m, number in zip(motion, numbers, strict=True)]


def scenes_of(rows: Sequence[Row]) -> list[Spec | None]:
    """Return the scene of each prompt row, from its column `spec`, else from its prompt, else None."""
    specs: list[Any] = [row.get("spec") for row in rows]
    return scenes([row["prompt"] for row in rows], specs)


def check_scenes(rows: Sequence[Row]) -> None:
    """Check that at least one held-out row describes a scene of the synthetic world.

    Raises:
        UserError: no row does.
    """
    if all(scene is None for scene in scenes_of(rows)):
        raise UserError(f"eval_motion_exact must be false for these held-out prompts: {NO_BODY}")
