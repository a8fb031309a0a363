"""Motion of rollouts: advantages without the part that motion explains, and the correlation in the log."""

import itertools
import math

import pytest
import torch

from postgen.errors import UserError
from postgen.grpo.advantages import compute_advantages
from postgen.grpo.motion import LEAST_SPREAD, correlation, log_motions, motion_metrics, motions, residual
from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.grpo.quality import clip_statistics
from postgen.grpo.trainer import DanceGRPOTrainer
from postgen.metrics.video_measures import LEAST_CHANGE
from tests.grpo.toy import ROWS, grpo, lines

GROUP = 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def advantages(rewards, log_motion, kappa=1.0, weights=None, **settings):
    weights = torch.ones(rewards.shape[1]) if weights is None else weights
    return compute_advantages(
        rewards, weights, GROUP, **{"clip": 1e9, "log_motion": log_motion, "kappa": kappa, **settings}
    )


def centred(values):
    groups = values.view(-1, GROUP)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def test_motion_of_clips_is_that_of_evaluations():
    clips = list(torch.rand(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert motions(clips).tolist() == [clip_statistics(clip)["motion"] for clip in clips]
    assert motions([clips[0][:1]]).tolist() == [0.0]
    step = torch.tensor([0.0, 0.25, 0.75])[:, None, None, None].expand(3, 3, 2, 2)
    assert motions([step]).tolist() == [0.375]
    assert log_motions(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([math.log(LEAST_CHANGE), 0.0])


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        *itertools.product(("sum_of_advantages", "sum_then_normalize"), ("group", "batch", "max", "none")),
        *itertools.product(("normalize_then_sum",), ("group", "batch", "none")),  # "max" is refused
    ],
)
def test_a_reward_of_motion_alone_teaches_nothing(aggregation, scale):
    log_motion = draw(3 * GROUP)
    found = advantages(3 + 2 * log_motion[:, None], log_motion, scale=scale, aggregation=aggregation)
    assert found.plain.abs().max() > 0.5
    assert found.values.abs().max() < 1e-6
    half = advantages(3 + 2 * log_motion[:, None], log_motion, 0.5, scale=scale, aggregation=aggregation)
    torch.testing.assert_close(half.values, half.plain / 2)


def test_a_reward_without_motion_is_unchanged():
    log_motion = draw(2 * GROUP)
    reward, m = centred(draw(2 * GROUP, seed=1)).view(-1, GROUP), centred(log_motion).view(-1, GROUP)
    reward = reward - (reward * m).sum(1, keepdim=True) / m.square().sum(1, keepdim=True) * m
    found = advantages(reward.reshape(-1, 1), log_motion)
    torch.testing.assert_close(found.values, found.plain, rtol=0, atol=1e-6)


def test_what_is_left_does_not_correlate_with_motion():
    log_motion, rewards = draw(4 * GROUP), draw(4 * GROUP, 2, seed=1)
    rewards[:, 0] += log_motion
    rewards[3, 0] = rewards[9, 1] = float("nan")
    rewards[20] = float("nan")
    weights = torch.tensor([1.0, 0.3])
    found = advantages(rewards, log_motion, weights=weights)
    m = centred(log_motion).view(-1, GROUP)
    assert (found.plain.double().view(-1, GROUP) * m).sum(1).abs().max() > 0.1
    assert (found.values.double().view(-1, GROUP) * m).sum(1).abs().max() < 1e-6
    assert found.values[20] == 0
    assert found.values.view(-1, GROUP).sum(1).abs().max() < 1e-6
    # Reflection: with 2 the correlation has the other sign.
    twice = advantages(rewards, log_motion, 2.0, weights=weights)
    torch.testing.assert_close(twice.values, 2 * found.values - found.plain, rtol=0, atol=1e-5)


def test_equal_motion_changes_nothing_and_small_differences_change_little():
    rewards = draw(GROUP, 1)
    found = advantages(rewards, torch.full((GROUP,), -3.0, dtype=torch.float64))
    assert torch.equal(found.values, found.plain)
    m = centred(draw(GROUP, seed=1))
    direction = m / m.square().mean().sqrt()
    plain = found.plain.double()[:, None]
    explained = float((plain[:, 0] * direction).mean())
    for std in (LEAST_SPREAD / 10, LEAST_SPREAD, 1.0):
        left = residual(plain, std * direction, GROUP, 1.0)[:, 0]
        share = min(1.0, (std / LEAST_SPREAD) ** 2)
        torch.testing.assert_close(left, plain[:, 0] - share * explained * direction)


def test_motion_is_removed_before_clipping_and_best_of_n():
    log_motion = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 8], dtype=torch.float64)
    rewards = torch.tensor([[1.0], [0], [0], [0], [0], [0], [-1], [9]])
    found = advantages(rewards, log_motion, clip=1.0, scale="none")
    # The moving clip differs from all others by motion alone, which leaves the others' differences from their mean.
    assert found.unclipped.tolist() == pytest.approx([1.0, 0, 0, 0, 0, 0, -1, 0], abs=1e-6)
    assert found.plain.argmax() == 7
    assert found.unclipped.argmax() == 0
    assert found.values.tolist() == pytest.approx(found.unclipped.clamp(-1, 1).tolist())


def test_a_group_without_spread_stays_zero():
    log_motion = draw(2 * GROUP)
    rewards = torch.cat([torch.ones(GROUP), draw(GROUP, seed=1)])[:, None]
    assert advantages(rewards, log_motion).values[:GROUP].tolist() == [0.0] * GROUP


def test_correlation_by_hand():
    motion = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1, 1, 1, 1, 1])
    assert correlation(torch.tensor([1.0, 2, 3, 4] * 3), motion, 4) == pytest.approx(0.0)
    assert correlation(torch.tensor([1.0, 2, 3, 4, 8, 6, 4, 2, 0, 1, 0, 1]), motion, 4) == pytest.approx(1.0)
    assert correlation(torch.tensor([1.0, -1, -1, 1] * 3), motion, 4) == pytest.approx(0.0)
    assert correlation(torch.zeros(4), motion[:4], 4) is None
    values = torch.tensor([0.1, 0.2, 0.2, 0.1])
    found = motion_metrics(values, torch.tensor([-1.0, 1, 1, -1]), torch.tensor([1.0, -1, 1, -1]), 4)
    std = math.log(2) / 3**0.5
    assert found["motion/mean"] == pytest.approx(0.15)
    assert found["motion/log_group_std"] == pytest.approx(std)
    assert found["motion/advantage_corr"] == pytest.approx(1.0)
    assert found["motion/advantage_corr_used"] == pytest.approx(0.0)


def moving(completions):
    """Return the log motion of each clip, a reward that pays for motion alone."""
    return log_motions(motions(completions)).tolist()


@pytest.mark.parametrize("kind", [DanceGRPOTrainer, DiffusionNFTTrainer])
def test_a_run_learns_motion_only_without_the_residual(tmp_path, kind):
    changes = {"num_frames": 4, "kind": kind, "reward": moving, "max_steps": 30, "eval_dataset": ROWS}
    changes |= {"eval_on_start": True, "eval_steps": 30, "num_generations_eval": 4}
    changes |= {"noise_level": 0.6} if kind is DanceGRPOTrainer else {"old_decay": 0.2}
    ratios = []
    for kappa in (0.0, 1.0):
        run = grpo(tmp_path / str(kappa), motion_residual=kappa, **changes)
        run.train()
        rows = lines(run)
        trained = [row for row in rows if "motion/mean" in row]
        assert all(row["motion/advantage_corr"] == pytest.approx(1, abs=1e-4) for row in trained)
        moved = [row["eval_motion"] for row in rows if "eval_motion" in row]
        ratios.append(moved[-1] / moved[0])
        assert trained[0]["advantage/abs_mean"] < 1e-6 if kappa else trained[0]["advantage/abs_mean"] > 0.5
    assert ratios[0] > 1.1
    assert ratios[1] == pytest.approx(1.0, abs=0.01)


def test_the_log_has_the_motion_of_clips_but_not_of_pictures(tmp_path):
    clips = grpo(tmp_path / "clips", num_frames=4, max_steps=1, motion_residual=0.5)
    clips.train()
    row = lines(clips)[0]
    assert 0 < row["motion/mean"] < 1
    assert row["motion/log_group_std"] > LEAST_SPREAD
    assert -1 < row["motion/advantage_corr"] < 1
    assert 0 < abs(row["motion/advantage_corr_used"]) < abs(row["motion/advantage_corr"])
    pictures = grpo(tmp_path / "pictures", max_steps=1)
    pictures.train()
    assert not any(name.startswith("motion/") for name in lines(pictures)[0])


def test_motion_residual_is_refused_for_pictures_and_small_groups(tmp_path):
    few = {"num_frames": 4, "num_generations": 4, "motion_residual": 1.0}
    with pytest.raises(UserError, match="num_generations is 4, it must be at least 8 with motion_residual"):
        grpo(tmp_path, **few)
    with pytest.raises(UserError, match=r"motion_residual is 1.0, it must be 0 with num_frames: 1: images have no"):
        grpo(tmp_path, motion_residual=1.0)
    with pytest.raises(UserError, match="motion_residual must be 0 for a model that makes images"):
        grpo(tmp_path, motion_residual=1.0, num_frames=None).train()
    grpo(tmp_path, **{**few, "motion_residual": 0.0})
