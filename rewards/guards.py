"""Guards: cheap rewards in [0,1] that are 1 for every sound clip and fall where a policy cheats another reward.

Add them with a weight, or put them in front of a reward with `postgen.rewards.compose.guarded`. They are no measure
of quality: two clips inside the bounds are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError, is_number, shown
from postgen.rewards.base import Clip, streaming
from postgen.rewards.frames import in_windows, mean_over

_LUMA = (0.299, 0.587, 0.114)
_MOVING = 0.05


def _luma(clip: Tensor) -> Tensor:
    """(F,3,H,W) -> (F,H,W), ITU-R BT.601."""
    return (clip.float() * clip.new_tensor(_LUMA).float()[:, None, None]).sum(1)


def motion(clip: Clip) -> float:
    """Mean change of the most changing 5 % of the pixels from a frame to the next, the whole frame's change taken off.

    0 for a frozen clip, whatever its brightness does; of a clip (F,3,H,W) in [0,1].
    """
    return mean_over([(_motion(part), len(part) - 1) for part in in_windows(clip, overlap=1)])


def _motion(clip: Tensor) -> float:
    light = functional.avg_pool2d(_luma(clip)[:, None], 3, 1, 1)[:, 0]
    change = light.diff(dim=0).flatten(1)
    if not change.numel():
        return 0.0
    change = (change - change.median(1, keepdim=True).values).abs()
    count = max(1, int(_MOVING * change.shape[1]))
    return float(change.topk(count, dim=1).values.mean())


def brightness(clip: Clip) -> float:
    """Mean luma of a clip, in [0,1]."""
    return mean_over([(float(_luma(part).mean()), len(part)) for part in in_windows(clip)])


def sharpness(clip: Clip) -> float:
    """Share of the contrast that a 3x3 mean takes away, mean over the frames.

    Near 0 for a blurred clip, and above 0.5 for one of noise or of a fine grid, which some rewards of images invite.
    """
    return mean_over([(_sharpness(part), len(part)) for part in in_windows(clip)])


def _sharpness(clip: Tensor) -> float:
    light = _luma(clip)[:, None]
    fine = light - functional.avg_pool2d(functional.pad(light, (1, 1, 1, 1), mode="replicate"), 3, 1)
    contrast = light.flatten(1).std(1, correction=0)
    return float((fine.flatten(1).square().mean(1).sqrt() / contrast.clamp_min(1e-3)).mean())


@streaming
class MotionFloor:
    """1 for clips with `motion` of at least `floor`, falling to 0 for a frozen one.

    Rewards of consistency, smoothness and single frames are all raised by freezing a clip.

    Raises:
        UserError: a floor that is not above 0.
    """

    name = "motion_floor"

    def __init__(self, *, floor: float = 0.02) -> None:
        if not (is_number(floor) and 0 < floor <= 1):
            raise UserError(f"the floor of motion must be above 0 and at most 1, got floor={shown(floor)}")
        self.floor = floor

    def __call__(self, completions: Sequence[Clip]) -> list[float]:
        """Score clips."""
        return [min(1.0, motion(clip) / self.floor) for clip in completions]


class Band:
    """1 for clips whose measure lies in [low, high], falling to 0 at `margin` outside.

    Raises:
        UserError: a band that is empty, or a margin that is not above 0.
    """

    def __init__(self, *, low: float, high: float, margin: float) -> None:
        numbers = is_number(low) and is_number(high) and is_number(margin)
        if not (numbers and 0 <= low < high <= 1 and 0 < margin <= 1):
            raise UserError(
                "a band needs 0 <= low < high <= 1 and a margin above 0 and at most 1, got"
                f" low={shown(low)}, high={shown(high)}, margin={shown(margin)}"
            )
        self.low, self.high, self.margin = low, high, margin

    def inside(self, value: float) -> float:
        """Return 1 inside, less outside."""
        beyond = max(self.low - value, value - self.high, 0.0)
        return max(0.0, 1.0 - beyond / self.margin)


@streaming
class BrightnessBand(Band):
    """`brightness` within a band: against over-exposed and against black clips."""

    name = "brightness_band"

    def __init__(self, *, low: float = 0.15, high: float = 0.8, margin: float = 0.1) -> None:
        super().__init__(low=low, high=high, margin=margin)

    def __call__(self, completions: Sequence[Clip]) -> list[float]:
        """Score clips."""
        return [self.inside(brightness(clip)) for clip in completions]


@streaming
class SharpnessBand(Band):
    """`sharpness` within a band: against blur, noise and grids."""

    name = "sharpness_band"

    def __init__(self, *, low: float = 0.03, high: float = 0.4, margin: float = 0.02) -> None:
        super().__init__(low=low, high=high, margin=margin)

    def __call__(self, completions: Sequence[Clip]) -> list[float]:
        """Score clips."""
        return [self.inside(sharpness(clip)) for clip in completions]
