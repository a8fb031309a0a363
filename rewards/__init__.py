"""Reward functions, one file per reward. Import them as `postgen.rewards`; heavy modules are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postgen.rewards.base import Reward as Reward
    from postgen.rewards.base import RewardModel as RewardModel
    from postgen.rewards.frames import FrameReward as FrameReward
    from postgen.rewards.frames import uniform_frames as uniform_frames
    from postgen.rewards.registry import get_reward as get_reward
    from postgen.rewards.registry import known_rewards as known_rewards
    from postgen.rewards.registry import split_rewards as split_rewards
    from postgen.rewards.runner import AllRewardsFailed as AllRewardsFailed
    from postgen.rewards.runner import RewardResult as RewardResult
    from postgen.rewards.runner import RewardRunner as RewardRunner

_HOMES = {
    "AllRewardsFailed": "runner",
    "FrameReward": "frames",
    "Reward": "base",
    "RewardModel": "base",
    "RewardResult": "runner",
    "RewardRunner": "runner",
    "get_reward": "registry",
    "known_rewards": "registry",
    "split_rewards": "registry",
    "uniform_frames": "frames",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'postgen.rewards' has no attribute {name!r}")
    value = getattr(import_module(f"postgen.rewards.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
