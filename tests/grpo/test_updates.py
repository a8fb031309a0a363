"""Updates against formulas: the ratio and its check, weights of steps, divergences, NFT."""

import pytest
import torch
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.grpo.trainer import DanceGRPOTrainer
from tests.grpo.toy import grpo, lines
from tests.sampling.toy import PointPipeline, ToyModel


def test_grpo_ratio_is_one_in_the_trainer_and_leaves_it_afterwards(tmp_path):
    run = grpo(tmp_path, max_steps=4, steps_per_generation=2, check_on_policy_ratio="raise", epsilon=1e-5)
    run.train()
    rows = lines(run)
    assert [row["logp_diff/max"] <= 1e-5 for row in rows if "logp_diff/max" in row] == [True, True]
    assert rows[0]["ratio/mean"] == pytest.approx(1, abs=1e-6)
    # Only the second update of a rollout is off-policy, so only there does clipping have an effect.
    assert rows[0]["clip_ratio/region_mean"] == 0
    assert rows[1]["clip_ratio/region_mean"] > 0
    assert rows[1]["ratio/std"] > 0


def test_grpo_ratio_check_finds_a_policy_that_trains_otherwise(tmp_path):
    class Drifting(ToyModel):
        """A model with noise in every forward pass, like dropout that stays on."""

        def forward(self, x, sigma):
            return super().forward(x, sigma) + 0.01 * torch.randn(x.shape)

    class Broken(DanceGRPOTrainer):
        def build(self):
            models = super().build()
            models["transformer"].__class__ = Drifting
            return models

    with pytest.raises(UserError, match="has not changed since the rollout, but its log-probabilities differ by"):
        grpo(tmp_path / "a", kind=Broken, check_on_policy_ratio="raise").train()
    with pytest.warns(UserWarning, match="sampling and training compute different predictions") as seen:
        grpo(tmp_path / "b", kind=Broken).train()
    assert len([one for one in seen if "sampling and training" in str(one.message)]) == 1
    grpo(tmp_path / "c", kind=Broken, check_on_policy_ratio="off").train()


def test_grpo_update_equals_one_joint_loss(tmp_path):
    """Backward passes of single steps and micro-batches sum to the gradient of the mean over all."""

    run = grpo(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1, max_grad_norm=0.0)
    gradients = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **extra):
            step = run.optimizer.step

            def looking(*words):
                gradients.update({name: p.grad.clone() for name, p in run.trained().items()})
                return step(*words)

            run.optimizer.step = looking

    run.callbacks.callbacks.append(Look())
    run.train()
    model, buffer = PointPipeline().transformer, run.buffer
    run.policy.denoiser.transformers["transformer"] = model
    total = 0
    for place in range(7):
        index = torch.full((16,), place)
        x, y = buffer.paths.states[:, place], buffer.paths.states[:, place + 1]
        step = run.sampler.step(x, run.sampler.predict(x, index, {}), index)
        # At ratio 1 the gradient of the clipped loss equals that of -A log p.
        total = total - (buffer.advantages * step.log_prob(y)).mean() / 7
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"transformer.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)


def test_grpo_step_weighting_and_guard_enter_the_loss(tmp_path):
    plain, weighted = (
        grpo(tmp_path / name, max_steps=1, sde_type="flow", step_weighting=name) for name in ("none", "inv_grad")
    )
    plain.train()
    weighted.train()
    assert weighted.weights[:7].std() > 0.1
    assert plain.weights[:7].tolist() == pytest.approx([1.0] * 7)
    assert lines(plain)[0]["grad_norm"] != pytest.approx(lines(weighted)[0]["grad_norm"], rel=0.05)
    guarded = grpo(tmp_path / "guard", max_steps=3, ratio_norm=True, steps_per_generation=3, epsilon=4e-6)
    guarded.train()
    assert abs(lines(guarded)[-1]["ratio/mean"] - 1) < 1e-2


def test_grpo_ratio_norm_takes_the_bias_out(tmp_path):
    """The mean log-ratio of a changed policy is negative, and about 0 after normalisation."""
    from postgen.grpo.loss import log_ratio
    from postgen.sampling.transition import Transition

    source = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 20000, generator=source)
    std = torch.full((64,), 0.1)
    old, new = Transition(mean, std, mean, std, True), Transition(mean + 0.003, std, mean, std, True)
    y = old.sample(torch.randn(mean.shape, generator=source))
    plain = log_ratio(new, new.log_prob(y), old.log_prob(y))
    guarded = log_ratio(new, new.log_prob(y), old.log_prob(y), old_mean=mean)
    assert plain.mean().item() == pytest.approx(-(0.03**2) / 2, rel=0.1)
    assert abs(guarded.mean().item()) < 0.1 * 0.1 * 0.03**2 / 2


@pytest.mark.parametrize("kl_type", ["mean", "velocity"])
def test_grpo_beta_holds_the_policy_near_the_reference(tmp_path, kl_type):
    free, held = (
        grpo(tmp_path / str(beta), beta=beta, kl_type=kl_type, max_steps=15, learning_rate=3e-3)
        for beta in (1e-9, 100.0)
    )
    free.train()
    held.train()
    first, last = lines(free)[0]["kl"], lines(free)[-1]["kl"]
    assert first == 0
    assert last > 0
    assert lines(held)[-1]["kl"] < 0.5 * last


def test_grpo_gaussian_kl_is_one_formula_in_both_spaces():
    from postgen.grpo.loss import gaussian_kl, velocity_kl
    from postgen.sampling.schedule import Schedule
    from postgen.sampling.transition import transition

    source = torch.Generator().manual_seed(0)
    x, v, w = torch.randn(3, 2, 5, generator=source, dtype=torch.float64)
    schedule = Schedule(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).double())
    index = torch.tensor([1, 2])
    one, two = (transition("flow", x, p, schedule.levels(index, index + 1), 0.7) for p in (v, w))
    expected = 0.5 * one.gradient_scale().square() * velocity_kl(v, w)
    assert (gaussian_kl(one, two) - expected).abs().max() < 1e-12
    normal = [torch.distributions.Normal(step.mean, step.std[:, None]) for step in (one, two)]
    assert (gaussian_kl(one, two) - torch.distributions.kl_divergence(*normal).mean(1)).abs().max() < 1e-12


def test_grpo_nft_by_hand():
    from postgen.grpo.nft import nft_loss
    from postgen.sampling.schedule import Schedule

    schedule = Schedule(torch.tensor([1.0, 0.5, 0.0]).double())
    index = torch.tensor([1])
    x, clean, new, old = (torch.tensor([[value, value]]) for value in (1.0, 0.5, 2.0, 1.0))
    found = nft_loss(x, clean, new, old, torch.tensor([0.75]), schedule.levels(index, index + 1), 0.5)
    # v+ = 1.5, v- = 0.5; the clean estimates are 0.25 and 0.75. Both errors are 0.25 and are their own weights.
    assert found.item() == pytest.approx((0.75 * 0.25 + 0.25 * 0.25) / 0.5)
