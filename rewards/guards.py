"""Guards: cheap rewards in [0,1] that are 1 for every sound clip and lower where a policy exploits another reward.

Add them to other rewards with a weight, or wrap a reward with `postgen.rewards.compose.guarded`. Guards do not measure
quality: all clips inside the bounds get the same score.
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
    """Return the mean change from frame to frame of the 5 % of the pixels that change most.

    The median change of the frame is subtracted first, so that a change of brightness does not count. The clip is
    (F,3,H,W) in [0,1]; a frozen clip gets 0.
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
    """Return the mean luma of a clip, in [0,1]."""
    return mean_over([(float(_luma(part).mean()), len(part)) for part in in_windows(clip)])


def sharpness(clip: Clip) -> float:
    """Return the share of the contrast that a 3x3 mean removes, averaged over the frames.

    It is near 0 for a blurred clip and above 0.5 for noise or a fine grid, which some image rewards encourage.
    """
    return mean_over([(_sharpness(part), len(part)) for part in in_windows(clip)])


def _sharpness(clip: Tensor) -> float:
    light = _luma(clip)[:, None]
    fine = light - functional.avg_pool2d(functional.pad(light, (1, 1, 1, 1), mode="replicate"), 3, 1)
    contrast = light.flatten(1).std(1, correction=0)
    return float((fine.flatten(1).square().mean(1).sqrt() / contrast.clamp_min(1e-3)).mean())


@streaming
class MotionFloor:
    """Return 1 for clips whose `motion` is at least `floor`, and less down to 0 for a frozen clip.

    Freezing a clip raises rewards of consistency, of smoothness and of single frames; this guard prevents it.

    Raises:
        UserError: the floor is not above 0 and at most 1.
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
    """Map a measure to 1 inside [low, high], decreasing linearly to 0 at a distance of `margin` outside.

    Raises:
        UserError: the band is empty, or the margin is not above 0.
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
        """Return 1 for a value in the band, less for a value outside."""
        beyond = max(self.low - value, value - self.high, 0.0)
        return max(0.0, 1.0 - beyond / self.margin)


@streaming
class BrightnessBand(Band):
    """Keep `brightness` within a band; penalises over-exposed and black clips."""

    name = "brightness_band"

    def __init__(self, *, low: float = 0.15, high: float = 0.8, margin: float = 0.1) -> None:
        super().__init__(low=low, high=high, margin=margin)

    def __call__(self, completions: Sequence[Clip]) -> list[float]:
        """Score clips."""
        return [self.inside(brightness(clip)) for clip in completions]


@streaming
class SharpnessBand(Band):
    """Keep `sharpness` within a band; penalises blur, noise and grids."""

    name = "sharpness_band"

    def __init__(self, *, low: float = 0.03, high: float = 0.4, margin: float = 0.02) -> None:
        super().__init__(low=low, high=high, margin=margin)

    def __call__(self, completions: Sequence[Clip]) -> list[float]:
        """Score clips."""
        return [self.inside(sharpness(clip)) for clip in completions]
