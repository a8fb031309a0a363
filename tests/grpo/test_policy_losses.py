"""Losses of a step and sources of the old probability: Flow-DPPO's mask, the ratio of one update, the replay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.grpo.loss import clipped_loss, drift, gaussian_kl, log_ratio, masked_loss, moved_kl
from postgen.grpo.trainer import DanceGRPOTrainer
from postgen.sampling.schedule import Schedule
from postgen.sampling.transition import NOISE_LEVEL, Kind, Transition, transition
from tests.grpo.toy import grpo, lines

SEVERAL = {"steps_per_generation": 2, "max_steps": 2}


def case(rows: int, values: int, moved: float, kind: Kind = "flow") -> tuple[Transition, Transition, Tensor]:
    """Return the transitions of an old and a new policy in float64, and latents drawn from the old one."""
    source = torch.Generator().manual_seed(0)
    x, v, w, z = torch.randn(4, rows, values, generator=source, dtype=torch.float64)
    levels = Schedule(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).double()).levels(*torch.tensor([[1] * rows, [2] * rows]))
    old, new = (transition(kind, x, p, levels, NOISE_LEVEL[kind]) for p in (v, v + moved * w))
    return old, new, old.sample(z)


def dppo(old: Transition, new: Transition, y: Tensor, advantage: Tensor, delta: float) -> Any:
    plain = log_ratio(new, new.log_prob(y), old.log_prob(y))
    centred = plain + drift(new, old.mean)
    return masked_loss(plain, advantage, moved_kl(new, old.mean), centred, delta)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_dppo_by_hand(kind: Kind) -> None:
    old, new, y = case(64, 30, 0.3, kind)
    advantage = torch.linspace(-2, 2, 64, dtype=torch.float64)
    log_p = (new.log_prob(y) - old.log_prob(y)).exp()
    # Without a trust region the loss is -A r.
    assert torch.equal(dppo(old, new, y, advantage, math.inf).loss, -advantage * log_p)
    # A region of size 0 leaves the moves that lead back.
    size = 1 if kind == "cps" else 2 * new.std.square()
    centred = new.log_prob(y) - old.log_prob(y) + (new.mean - old.mean).square().mean(1) / size
    away = (centred > 0) == (advantage > 0)
    assert 10 < away.sum() < 54
    assert torch.equal(dppo(old, new, y, advantage, 0.0).loss, torch.where(away, 0, -advantage * log_p))
    # Between them, rows are masked by their KL divergence.
    kl = gaussian_kl(new, old)
    found = dppo(old, new, y, advantage, kl.median().item())
    masked = away & (kl >= kl.median())
    assert torch.equal(found.loss == 0, masked)
    assert torch.equal(found.low + found.high, masked.float())
    assert torch.equal(found.low > 0, masked & (advantage < 0))
    # A policy that has not moved loses nothing, whatever the region.
    still = dppo(old, old, y, advantage, 0.0)
    assert torch.equal(still.loss, -advantage)


def test_dppo_reads_the_direction_without_the_bias_of_large_latents() -> None:
    """The plain log-ratio of a moved policy is negative in almost every row; half of the centred ones are."""
    old, new, y = case(400, 20_000, 0.05)
    plain = log_ratio(new, new.log_prob(y), old.log_prob(y))
    assert (plain > 0).double().mean() < 0.15
    assert (plain + drift(new, old.mean) > 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    found = dppo(old, new, y, torch.ones(400, dtype=torch.float64), 0.0)
    assert found.high.mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("delta", [0.0, 1e3])
def test_dppo_gradient_equals_finite_differences(delta: float) -> None:
    old, _, y = case(6, 5, 0.3)
    source = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 6, 5, generator=source, dtype=torch.float64)
    levels = Schedule(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).double()).levels(*torch.tensor([[1] * 6, [2] * 6]))
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.0], dtype=torch.float64)

    def loss(prediction: Tensor) -> Tensor:
        step = transition("flow", x, prediction, levels, 0.7)
        total: Tensor = dppo(old, step, y, advantage, delta).loss.sum()
        return total

    assert torch.autograd.gradcheck(loss, v.requires_grad_(True))


def test_dppo_masks_nothing_before_the_first_update(tmp_path: Path) -> None:
    run = grpo(tmp_path, policy_loss="dppo", dppo_delta=0.0, learning_rate=1e-2, **SEVERAL)
    run.train()
    first, second = lines(run)
    assert first["clip_ratio/region_mean"] == 0
    assert 0.2 < second["clip_ratio/region_mean"] < 0.8
    assert first["logp_diff/max"] <= 1e-5


def test_dppo_without_a_trust_region_is_the_policy_gradient(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "steps_per_generation": 2, "max_grad_norm": 0.0}
    free = grpo(tmp_path / "dppo", policy_loss="dppo", dppo_delta=1e9, **changes)
    wide = grpo(tmp_path / "clip", epsilon=0.999, epsilon_high=1e6, **changes)
    free.train()
    wide.train()
    for name, parameter in free.trained().items():
        assert torch.equal(parameter, wide.trained()[name])


def test_dppo_takes_a_normalised_ratio(tmp_path: Path) -> None:
    run = grpo(tmp_path, policy_loss="dppo", ratio_norm=True, **SEVERAL)
    run.train()
    assert run.buffer.paths.means is not None
    assert abs(lines(run)[-1]["ratio/mean"] - 1) < 1e-1


@pytest.mark.parametrize("ratio_norm", [False, True])
def test_old_log_prob_self_makes_the_ratio_one(tmp_path: Path, ratio_norm: bool) -> None:
    """At ratio 1 the update is that of an exact rollout."""
    runs = []
    for name in ("rollout", "self"):
        run = grpo(tmp_path / name, old_log_prob=name, ratio_norm=ratio_norm, gradient_accumulation_steps=2)
        run.train()
        runs.append(run)
        assert (run.buffer.paths.means is None) == (name == "self" or not ratio_norm)
    exact = runs[1]
    assert {(row["ratio/min"], row["ratio/max"]) for row in lines(exact)} == {(1.0, 1.0)}
    for name, parameter in runs[0].trained().items():
        torch.testing.assert_close(parameter, exact.trained()[name], rtol=1e-4, atol=1e-6)


class Shaken(DanceGRPOTrainer):
    """A trainer whose rollouts store log-probabilities and means with an error, as other kernels would."""

    def draw(self, number: Any, samples: Any) -> Any:
        paths = super().draw(number, samples)
        paths.log_probs += 1e-2
        if paths.means is not None:
            paths.means += 1e-3
        return paths


def test_old_log_prob_self_and_replay_do_not_depend_on_the_rollout(tmp_path: Path) -> None:
    def weights(folder: str, kind: type, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        run = grpo(tmp_path / folder, kind=kind, ratio_norm=True, check_on_policy_ratio="off", max_steps=2, **changes)
        run.train()
        return {name: value.detach() for name, value in run.trained().items()}, lines(run)

    several = {"steps_per_generation": 2, "epsilon": 1e-4, "policy_loss": "dppo"}
    expected, _ = weights("expected", DanceGRPOTrainer, **several)
    replayed, rows = weights("replay", Shaken, **several, old_log_prob="replay")
    assert all(torch.equal(expected[name], replayed[name]) for name in expected)
    assert rows[0]["logp_diff/max"] == 0
    assert rows[0]["logp_diff/replay"] == pytest.approx(1e-2, rel=1e-3)
    assert "logp_diff/replay" not in rows[1]
    wrong, _ = weights("wrong", Shaken, **several)
    assert not all(torch.equal(expected[name], wrong[name]) for name in expected)
    mine, _ = weights("self", Shaken, old_log_prob="self")
    once, _ = weights("once", DanceGRPOTrainer, old_log_prob="self")
    assert all(torch.equal(once[name], mine[name]) for name in once)


@pytest.mark.parametrize("changes", [{}, {"best_of_n": 4, "steps_per_generation": 2, "num_iterations": 2}])
def test_old_log_prob_replay_is_metered(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "old_log_prob": "replay", "sde_window_size": 2, "sde_window_range": [3, 5]}
    guess = grpo(tmp_path / "guess", dry_run=True, **changes).train()
    run = grpo(tmp_path / "run", **changes)
    run.train()
    used = run.meter.forward_equivalents * run.args.max_steps / run.global_step
    rollouts = run.args.max_steps // (run.batches.updates * run.batches.iterations) or 1
    assert guess.metrics["passes/rollout_per_sample"] == 8 + (1 if changes.get("best_of_n") else 2)
    if not changes.get("best_of_n"):
        assert guess.metrics["forward_equivalents/run"] == pytest.approx(used)
    assert run.meter.totals["forwards"] == rollouts * run.batches.samples * guess.metrics["passes/rollout_per_sample"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_loss": "dppo"}, "policy_loss dppo masks nothing with one update per rollout: set num_iterations"),
        ({"old_log_prob": "self", "num_iterations": 2}, "self is for one update per rollout, this run has 2: use"),
        ({"old_log_prob": "self", **SEVERAL}, "self is for one update per rollout, this run has 2: use"),
        ({"policy_loss": "dppo", "epsilon_high": 0.1}, "epsilon_high is 0.1, it must be left out: dppo does not clip"),
        ({"policy_loss": "ppo"}, "policy_loss"),
        ({"dppo_delta": -1.0}, "dppo_delta is -1.0, it must be at least 0"),
        ({"dppo_delta": 1e-4}, "dppo_delta is 0.0001, it must be left out without policy_loss: dppo"),
    ],
)
def test_policy_losses_refuse_what_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grpo(tmp_path, **changes).train()


def test_clipped_loss_is_unchanged_by_the_mask() -> None:
    old, new, y = case(8, 5, 0.3)
    plain = log_ratio(new, new.log_prob(y), old.log_prob(y))
    advantage = torch.linspace(-1, 1, 8, dtype=torch.float64)
    ratio = plain.exp()
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))
    assert torch.equal(clipped_loss(plain, advantage, 0.1, 0.1).loss, expected)


def test_replayed_probabilities_survive_a_resume_within_a_rollout(tmp_path: Path) -> None:
    changes = {
        "policy_loss": "dppo", "ratio_norm": True, "old_log_prob": "replay", "rollout_batch_size": 3,
        "steps_per_generation": 2, "max_steps": 4,
    }  # fmt: skip
    straight = grpo(tmp_path / "straight", **changes)
    straight.train()
    grpo(tmp_path / "resumed", **{**changes, "max_steps": 3}, save_steps=3).train()
    resumed = grpo(tmp_path / "resumed", **changes, resume_from_checkpoint="latest")
    resumed.train()
    assert all(torch.equal(value, resumed.trained()[name]) for name, value in straight.trained().items())
