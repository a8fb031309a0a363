"""Settings of advantages: how rewards are scaled, combined and clipped."""

from dataclasses import dataclass

from postgen.settings import Part

from .advantages import Aggregation, ClipPer, Scale

LEAST_GROUP = 8
"""Smallest group for `motion_residual`. In a group of G samples, motion that has nothing to do with the rewards still
explains 1 / (G - 1) of the variance of the advantages by chance, which would be removed: all of it with 2 samples, a
third with 4, a seventh with 8."""


@dataclass(kw_only=True)
class AdvantageConfig(Part):
    """How rewards become advantages.

    Raises:
        UserError: a value is outside its range, or has no effect together with another.
    """

    scale_rewards: Scale = "group"
    """Divisor of a reward's difference from the mean of its group: "group": the std of the group; "batch": the std of
    the batch; "max": the largest std of a group of the rollout; "rank": the std of the group, where win rates in the
    group replace the rewards; "none": no division. With "max", groups with a small spread keep small advantages. With
    "rank", only the order of the rewards counts, and the dead zone `rank_dead_zone`."""

    rank_dead_zone: float = 0.0
    """With `scale_rewards: rank`, rewards of a group that differ by at most this much are ties, which count as half.
    Above 0, choose the noise of the reward: a rank gives any difference full weight."""

    multi_objective_aggregation: Aggregation = "sum_of_advantages"
    """How several rewards are combined into one advantage. `sum_of_advantages` is DanceGRPO's way; the other two
    values have the same meaning as in TRL."""

    advantage_clip: float = 5.0
    """Advantages are clipped to [-advantage_clip, advantage_clip]."""

    advantage_clip_per: ClipPer = "sum"
    """What `advantage_clip` clips: "sum": the weighted sum of the advantages of all rewards; "reward": the advantage
    of each reward, before it is multiplied by its weight (DanceGRPO's code for HunyuanVideo)."""

    advantage_eps: float = 1e-4
    """Added to the std that divides the rewards."""

    motion_residual: float = 0.0
    """Share of the advantages' correlation with motion that is removed within each group, in [0, 2]: 0 none, 1 all.
    Above 1, less motion is rewarded. Only for videos, with `num_generations` of at least 8."""

    shuffle_advantages: bool = False
    """A control experiment, in which nothing can be learned: shuffle the advantages within each group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("advantage_clip", "advantage_eps"):
            self.require(getattr(self, name) > 0, name, "above 0")
        self.require_in((0, 2), "motion_residual")
        ranked = self.scale_rewards == "rank"
        self.require(self.rank_dead_zone >= 0, "rank_dead_zone", "at least 0")
        self.require(ranked or not self.rank_dead_zone, "rank_dead_zone", "0 without scale_rewards: rank")
        aggregation = self.multi_objective_aggregation
        fits = aggregation != "normalize_then_sum" or self.scale_rewards not in ("max", "rank")
        allowed = "group, batch or none with multi_objective_aggregation: normalize_then_sum"
        self.require(fits, "scale_rewards", allowed)
        fits = self.advantage_clip_per == "sum" or aggregation == "sum_of_advantages"
        allowed = f"sum with multi_objective_aggregation: {aggregation}, which has one advantage for all rewards"
        self.require(fits, "advantage_clip_per", allowed)
