"""Advantages: values by hand, TRL's formulas, ranks, groups without spread, missing rewards, clips, best of N."""

import math

import pytest
import torch

from postgen.errors import UserError
from postgen.grpo.advantage_config import AdvantageConfig
from postgen.grpo.advantages import best_and_worst, compute_advantages, group_stds, win_rates

NAN = float("nan")
AGGREGATIONS = ("sum_of_advantages", "sum_then_normalize", "normalize_then_sum")
# Two prompts with three samples each; one reward has scale 1, the other scale 100.
REWARDS = torch.tensor([[0.0, 300.0], [1.0, 100.0], [2.0, 200.0], [1.0, 0.0], [1.0, 100.0], [4.0, 200.0]])
WEIGHTS = torch.tensor([1.0, 0.5])


def advantages(rewards=REWARDS, weights=WEIGHTS, group=3, **settings):
    return compute_advantages(rewards, weights, group, **{"eps": 0.0, **settings})


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def trl(rewards, weights, group, aggregation, scale, eps=1e-4):
    """Compute advantages with the code of `GRPOTrainer._generate_and_score_completions` in TRL 1.16."""
    from trl.trainer.utils import nanstd

    if aggregation == "sum_then_normalize":
        total = (rewards * weights).nansum(dim=1)
        total[rewards.isnan().all(1)] = NAN
        grouped = total.view(-1, group)
        mean = grouped.nanmean(dim=1).repeat_interleave(group)
        std = nanstd(total).expand_as(total) if scale == "batch" else nanstd(grouped, dim=1).repeat_interleave(group)
        found = total - mean if scale == "none" else (total - mean) / (std + eps)
    else:
        grouped = rewards.view(-1, group, rewards.shape[1])
        normal = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + eps)
        total = (normal.view(rewards.shape) * weights).nansum(dim=1)
        total[rewards.isnan().all(1)] = NAN
        found = (total - total.nanmean()) / (nanstd(total) + eps)
    return found.nan_to_num(0.0)


def test_grpo_advantage_sum_of_advantages_by_hand():
    # Standard deviations of the rewards: 1 and 100 in the first group, sqrt(3) and 100 in the second.
    close(advantages().values, [-0.5, 0.5 - 1.0 + 0.0, 1.0, -1 / 3**0.5 - 0.5, -1 / 3**0.5, 2 / 3**0.5 + 0.5])
    none = advantages(scale="none").values
    close(none, [5.0, -5.0, 1.0, -5.0, -1.0, 5.0])
    close(advantages(scale="none", clip=1e9).values, [49.0, -50.0, 1.0, -51.0, -1.0, 52.0])


def test_grpo_advantage_sum_then_normalize_by_hand():
    # The weighted sums are 150, 51, 102 and 1, 51, 104.
    total = torch.tensor([150.0, 51.0, 102.0, 1.0, 51.0, 104.0])
    first, second = total[:3], total[3:]
    expected = torch.cat([(first - 101) / first.std(), (second - 52) / second.std()])
    close(advantages(aggregation="sum_then_normalize").values, expected.tolist())
    over_batch = torch.cat([first - 101, second - 52]) / total.std()
    close(advantages(aggregation="sum_then_normalize", scale="batch").values, over_batch.tolist())


def test_grpo_advantage_normalize_then_sum_by_hand():
    raw = torch.tensor([-0.5, -0.5, 1.0, -1 / 3**0.5 - 0.5, -1 / 3**0.5, 2 / 3**0.5 + 0.5])
    close(advantages(aggregation="normalize_then_sum").values, (raw / raw.std()).tolist())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_grpo_advantage_equals_trl(aggregation, scale, missing):
    source = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, 2, generator=source, dtype=torch.float64) * torch.tensor([1.0, 100.0])
    if missing:
        rewards[1, 0] = rewards[4, 1] = NAN
        rewards[6] = NAN
    weights = torch.tensor([1.0, 0.3], dtype=torch.float64)
    found = compute_advantages(rewards, weights, 4, aggregation=aggregation, scale=scale, clip=1e9)
    expected = trl(rewards.clone(), weights, 4, aggregation, scale)
    torch.testing.assert_close(found.unclipped.double(), expected, rtol=1e-6, atol=1e-6)


def test_grpo_advantage_is_free_of_each_rewards_scale():
    scaled = REWARDS * torch.tensor([1.0, 1000.0]) + torch.tensor([0.0, 7.0])
    for aggregation in ("sum_of_advantages", "normalize_then_sum"):
        torch.testing.assert_close(
            advantages(aggregation=aggregation).values, advantages(scaled, aggregation=aggregation).values
        )
    summed = advantages(aggregation="sum_then_normalize").values
    assert (summed - advantages(scaled, aggregation="sum_then_normalize").values).abs().max() > 1e-2


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_grpo_advantage_of_a_group_without_spread_is_zero(aggregation, scale):
    rewards = torch.tensor([[0.7], [0.7 + 1e-7], [0.7], [0.0], [1.0], [0.0]])
    found = compute_advantages(rewards, torch.ones(1), 3, aggregation=aggregation, scale=scale)
    assert found.values[:3].tolist() == [0, 0, 0]
    assert found.values[4] > 0.5
    assert found.zero_std.tolist() == [True, False]
    assert found.metrics()["frac_reward_zero_std"] == 0.5
    same = compute_advantages(torch.ones(6, 2), torch.ones(2), 3, aggregation=aggregation, scale=scale)
    assert same.values.tolist() == [0.0] * 6
    assert same.zero_std.all()


def test_grpo_advantage_of_a_spread_that_is_small_but_real():
    rewards = torch.tensor([[1e-5], [3e-5], [2e-5]])
    found = compute_advantages(rewards, torch.ones(1), 3, eps=0.0)
    close(found.values, [-1.0, 1.0, 0.0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grpo_advantage_with_missing_rewards(aggregation):
    rewards = torch.tensor([[0.0, NAN], [1.0, NAN], [NAN, NAN], [2.0, 3.0], [NAN, 5.0], [4.0, 1.0]])
    found = compute_advantages(rewards, torch.ones(2), 3, aggregation=aggregation)
    assert torch.isfinite(found.values).all()
    assert found.values[2] == 0
    assert found.rewards.isnan().tolist() == [False, False, True, False, False, False]
    assert found.metrics()["reward"] == pytest.approx((0 + 1 + 5 + 5 + 5) / 5)
    alone = compute_advantages(torch.tensor([[1.0], [NAN], [NAN]]), torch.ones(1), 3, aggregation=aggregation)
    assert alone.values.tolist() == [0, 0, 0]


def test_grpo_advantage_clip():
    rewards = torch.tensor([[0.0]] * 63 + [[1.0]])
    found = compute_advantages(rewards, torch.ones(1), 64)
    assert found.values.max() == 5
    assert found.unclipped.max() == pytest.approx(63 / 64 / (1 / 64) ** 0.5, rel=1e-2)
    assert found.metrics()["advantage/clipped"] == pytest.approx(1 / 64)


def test_grpo_advantage_clip_of_the_sum_or_of_each_reward():
    # Without scaling the first reward has the advantages -1, 0, 1, -1, -1, 2, the second has multiples of 100.
    close(advantages(scale="none", clip=2.0).values, [2.0, -2.0, 1.0, -2.0, -1.0, 2.0])
    each = advantages(scale="none", clip=2.0, clip_per="reward")
    close(each.values, [-1 + 1.0, 0 - 1.0, 1 + 0.0, -1 - 1.0, -1 + 0.0, 2 + 1.0])
    close(each.gains, [1.0, 0.0, 1.0, 0.0, 0.0, 3.0])
    close(each.unclipped, [49.0, -50.0, 1.0, -51.0, -1.0, 52.0])
    # The order does not matter if nothing is clipped, nor with one reward of weight 1.
    torch.testing.assert_close(advantages(clip_per="reward").values, advantages().values)
    alone = {"rewards": REWARDS[:, :1], "weights": torch.ones(1), "scale": "none", "clip": 1.0}
    assert torch.equal(advantages(**alone, clip_per="reward").values, advantages(**alone).values)
    against = advantages(weights=torch.tensor([1.0, -0.5]), clip_per="reward")
    close(against.values, [-1 - 0.5, 0 + 0.5, 1 + 0.0, -1 / 3**0.5 + 0.5, -1 / 3**0.5, 2 / 3**0.5 - 0.5])
    close(against.gains, [0.0, 0.5, 1.0, 0.5, 0.0, 2 / 3**0.5])


def test_grpo_advantage_scale_by_the_largest_std():
    # The largest standard deviations of the groups are sqrt(3) and 100.
    root = 3**0.5
    expected = [-1 / root + 0.5, -0.5, 1 / root, -1 / root - 0.5, -1 / root, 2 / root + 0.5]
    close(advantages(scale="max").values, expected)
    total = torch.tensor([150.0, 51.0, 102.0, 1.0, 51.0, 104.0])
    centred = torch.cat([total[:3] - 101, total[3:] - 52])
    close(advantages(aggregation="sum_then_normalize", scale="max").values, (centred / total[3:].std()).tolist())
    # A group of a hundredth of the spread gets a hundredth of the advantages, however many groups there are.
    weak = torch.cat([REWARDS[:3, :1], REWARDS[:3, :1] / 100, torch.full((3, 1), 7.0)])
    close(advantages(weak, torch.ones(1), scale="max").values, [-1.0, 0, 1, -0.01, 0, 0.01, 0, 0, 0])
    close(advantages(weak, torch.ones(1)).values, [-1.0, 0, 1, -1, 0, 1, 0, 0, 0])


def test_grpo_win_rates_by_hand():
    values = torch.tensor([[1.0], [3.0], [3.0], [2.0], [NAN], [0.5], [NAN], [NAN], [NAN], [NAN]]).double()
    found = win_rates(values, 5)[:, 0]
    torch.testing.assert_close(found[:4], torch.tensor([0.0, 2.5 / 3, 2.5 / 3, 1 / 3]).double())
    assert found[4].isnan()
    assert found[5] == 0.5
    assert win_rates(values, 5, 1.0)[:4, 0].tolist() == pytest.approx([0.5 / 3, 2 / 3, 2 / 3, 0.5])


def test_grpo_advantage_of_ranks():
    rewards = torch.tensor([[0.1], [0.2], [0.9], [0.95], [3.0], [3.0], [3.0], [3.5]])
    found = advantages(rewards, torch.ones(1), 4, scale="rank")
    strict, one = torch.tensor([0, 1 / 3, 2 / 3, 1]), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1])
    close(found.values[:4], ((strict - 0.5) / strict.std()).tolist())
    close(found.values[4:], ((one - 0.5) / one.std()).tolist())
    zone = advantages(rewards, torch.ones(1), 4, scale="rank", dead_zone=0.12)
    two = torch.tensor([1 / 6, 1 / 6, 5 / 6, 5 / 6])
    close(zone.values[:4], ((two - 0.5) / two.std()).tolist())
    tied = advantages(rewards, torch.ones(1), 4, scale="rank", dead_zone=5.0)
    assert tied.values.tolist() == [0.0] * 8
    assert tied.zero_std.tolist() == [True, True]


@pytest.mark.parametrize("aggregation", ["sum_of_advantages", "sum_then_normalize"])
@pytest.mark.parametrize("rising", [torch.exp, lambda r: r**3, lambda r: 1e-9 * r + 7, torch.atan])
def test_grpo_rank_does_not_change_with_a_rising_map(aggregation, rising):
    rewards = torch.randn(24, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[5], rewards[9] = rewards[4], NAN
    settings = {"weights": torch.ones(1), "group": 8, "scale": "rank", "aggregation": aggregation}
    plain = advantages(rewards, **settings)
    assert torch.equal(advantages(rising(rewards), **settings).values, plain.values)
    assert plain.values[4] == plain.values[5] != 0
    assert plain.values[9] == 0
    assert plain.zero_std.tolist() == [False] * 3
    # Several rewards keep their own ranks, whatever their scales are.
    both = torch.cat([rewards, 100 * rewards.flip(0)], 1)
    mapped = torch.cat([rising(both[:, :1]), (both[:, 1:] / 1000).tanh()], 1)
    if aggregation == "sum_of_advantages":
        one, other = (advantages(each, **{**settings, "weights": WEIGHTS}).values for each in (both, mapped))
        assert torch.equal(one, other)


def test_grpo_advantage_shuffled_within_groups():
    found = advantages(torch.randn(24, 2, generator=torch.Generator().manual_seed(0)), group=8, clip_per="reward")
    moved = found.shuffled([1, 2, 3])
    for name in ("values", "gains", "unclipped"):
        one, other = (getattr(each, name).view(-1, 8) for each in (found, moved))
        assert torch.equal(one.sort(1).values, other.sort(1).values)
        assert (one != other).any(1).all()
    # All three move together, and each group has an order of its own that depends on its seed alone.
    pairs = [{*zip(each.values.tolist(), each.gains.tolist(), strict=True)} for each in (found, moved)]
    assert pairs[0] == pairs[1]
    assert torch.equal(found.shuffled([1, 2, 3]).values, moved.values)
    assert torch.equal(found.shuffled([4, 2, 5]).values[8:16], moved.values[8:16])
    assert torch.equal(moved.plain, found.plain)


def test_grpo_spread_within_groups_by_hand():
    assert group_stds(REWARDS, 3).tolist() == pytest.approx([(1 + 3**0.5) / 2, 100.0])
    some = torch.tensor([[0.0, NAN], [2.0, NAN], [NAN, 1.0], [5.0, NAN]])
    assert group_stds(some, 2).nan_to_num(-1).tolist() == pytest.approx([2**0.5, -1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "min"}, "Allowed: group, batch, max, rank, none"),
        ({"rank_dead_zone": 0.1}, "rank_dead_zone is 0.1, it must be 0 without scale_rewards: rank"),
        ({"rank_dead_zone": -1.0, "scale_rewards": "rank"}, "rank_dead_zone is -1.0, it must be at least 0"),
        ({"motion_residual": -0.1}, "motion_residual is -0.1, it must be at least 0"),
        ({"motion_residual": 2.1}, "motion_residual is 2.1, it must be at most 2"),
        *(
            (
                {"scale_rewards": scale, "multi_objective_aggregation": "normalize_then_sum"},
                f"scale_rewards is '{scale}', it must be group, batch or none with multi_objective_aggregation: norm",
            )
            for scale in ("max", "rank")
        ),
        *(
            (
                {"advantage_clip_per": "reward", "multi_objective_aggregation": name},
                f"advantage_clip_per is 'reward', it must be sum with multi_objective_aggregation: {name}",
            )
            for name in AGGREGATIONS[1:]
        ),
    ],
)
def test_grpo_advantage_settings_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AdvantageConfig(**settings)


def test_grpo_advantage_best_of_n():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0, -5.0, 7.0, -2.0])
    assert best_and_worst(scores, 4, 2).tolist() == [0, 3, 5, 6]
    # For an odd number, one more of the best samples is kept.
    assert best_and_worst(scores, 4, 3).tolist() == [0, 2, 3, 4, 5, 6]
    assert best_and_worst(scores, 4, 4).tolist() == list(range(8))
    assert best_and_worst(scores, 8, 2).tolist() == [5, 6]


def test_grpo_advantage_refuses_broken_groups():
    with pytest.raises(ValueError, match="7 rows cannot be split into groups of 3"):
        compute_advantages(torch.zeros(7, 1), torch.ones(1), 3)
    with pytest.raises(ValueError, match="at least 2 rows"):
        compute_advantages(torch.zeros(7, 1), torch.ones(1), 1)
    assert math.isnan(compute_advantages(torch.full((2, 1), NAN), torch.ones(1), 2).metrics()["reward"])
