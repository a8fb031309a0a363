"""A guard of the synthetic world: clips move as much as the exact clips of the same scenes, not less and not more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from postgen.errors import UserError, is_number, shown
from postgen.metrics.video_measures import frame_change
from postgen.metrics.world_truth import exact_motion, log_motion_ratio
from postgen.rewards.base import prompted_by, unfit
from postgen.rewards.world import NO_BODY, scenes
from postgen.world import Spec

_MOST_KEPT = 10_000
_Shape = tuple[int, int, str]


@prompted_by("spec")
class WorldMotion:
    """Return 1 for clips whose motion is near that of the exact clip, and less down to 0 for too little or too much.

    Motion is the mean absolute difference of neighbouring frames, so noise and flicker count too. The exact clip of a
    prompt is one of many that it describes, with its own speeds and ground: the score is meant for means over prompts.
    A scene that is parsed from a prompt is planned for 17 frames; give longer clips a `spec`.

    Args:
        dead_zone: the score is 1 while |log(motion / exact motion)| is at most this.
        margin: beyond the dead zone, the score falls to 0 over this difference of logarithms.

    Raises:
        UserError: a number is out of its range.
    """

    name = "world_motion"

    def __init__(self, *, dead_zone: float = 0.1, margin: float = 0.7) -> None:
        if not (is_number(dead_zone) and is_number(margin) and 0 <= dead_zone <= 10 and 0 < margin <= 10):
            raise UserError(
                "world_motion needs a dead_zone in 0..10 and a margin above 0 and at most 10, got"
                f" dead_zone={shown(dead_zone)}, margin={shown(margin)}"
            )
        self.dead_zone, self.margin = dead_zone, margin
        self._exact: dict[tuple[Spec, _Shape], float] = {}

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Tensor],
        *,
        spec: Sequence[Spec | Mapping[str, Any] | None] | None = None,
        log_metric: Any = None,
        log_reasons: Any = None,
    ) -> list[float | None]:
        """Score clips (F, 3, N, N) of at least 2 frames and 8 px; None if the exact clip is unknown or does not move.

        Args:
            prompts: parsed with `world.parse` if there is no spec.
            completions: clips in [0, 1]; the exact clips are rendered on their device.
            spec: column of scenes, as `Spec` or in its JSON form.
            log_metric: receives the mean of log(motion / exact motion).
            log_reasons: receives the reasons of missing scores.
        """
        asked = scenes(prompts, spec)
        reasons = [_why_not(clip, scene) for clip, scene in zip(completions, asked, strict=True)]
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        exact = self._exact_of([(scene, completions[row]) for row in rows if (scene := asked[row]) is not None])
        ratios: list[float | None] = [None] * len(completions)
        for row, value in zip(rows, exact, strict=True):
            ratios[row] = log_motion_ratio(frame_change(completions[row]), value)
            if ratios[row] is None:
                reasons[row] = "nothing moves in this scene"
        known = [ratio for ratio in ratios if ratio is not None]
        if log_metric is not None and known:
            log_metric("world_motion/log_ratio", sum(known) / len(known))
        if log_reasons is not None:
            log_reasons(reasons)
        return [None if ratio is None else self._inside(ratio) for ratio in ratios]

    def _inside(self, ratio: float) -> float:
        return max(0.0, 1.0 - max(0.0, abs(ratio) - self.dead_zone) / self.margin)

    def _exact_of(self, pairs: Sequence[tuple[Spec, Tensor]]) -> list[float]:
        """Return the exact motion for each scene and clip; scenes of one shape are rendered together."""
        keys = [(scene, (len(clip), clip.shape[-1], str(clip.device))) for scene, clip in pairs]
        if len(self._exact) > _MOST_KEPT:
            self._exact.clear()
        new: dict[_Shape, list[Spec]] = {}
        for scene, shape in dict.fromkeys(keys):
            if (scene, shape) not in self._exact:
                new.setdefault(shape, []).append(scene)
        for shape, missing in new.items():
            values = exact_motion(missing, *shape)
            self._exact |= {(scene, shape): value for scene, value in zip(missing, values, strict=True)}
        return [self._exact[key] for key in keys]


def _why_not(clip: Tensor, scene: Spec | None) -> str | None:
    if scene is None:
        return NO_BODY
    if len(clip) < 2 or min(clip.shape[-2:]) < 8:
        return unfit(clip, 2, 8)
    if clip.shape[-2] != clip.shape[-1]:
        return f"it is not square, as renders of the world are, but {clip.shape[-1]}x{clip.shape[-2]}"
    return None
