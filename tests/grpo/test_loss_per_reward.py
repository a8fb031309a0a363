"""One clipped loss for each reward, as in DanceGRPO's code for HunyuanVideo."""

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.grpo.advantages import compute_advantages
from postgen.grpo.loss import clipped_loss, clipped_losses
from postgen.grpo.nft import DiffusionNFTConfig
from tests.grpo.toy import grpo, lines, near

BOTH = {"advantage_clip_per": "reward", "loss_per": "reward", "advantage_clip": 1.0}


def far(completions):
    """Return the reward of each clip, its squared distance to -1 with a large scale."""
    return [100 * (clip + 1).square().mean().item() for clip in completions]


def hunyuan(rewards, ratio, coefs, group, clip_range, adv_clip_max):
    """Compute the loss of `train_one_step` in DanceGRPO's fastvideo/train_grpo_hunyuan.py for each sample."""
    total = 0
    for reward, coef in zip(rewards.T, coefs, strict=True):
        groups = reward.view(-1, group)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)
        advantages = torch.clamp(advantages.flatten(), -adv_clip_max, adv_clip_max)
        unclipped_loss = -advantages * ratio
        clipped = -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
        total = total + coef * torch.maximum(unclipped_loss, clipped)
    return total


@pytest.mark.parametrize("coefs", [[1.0, 0.0], [0.7, 1.4]])
def test_loss_and_gradient_are_those_of_the_published_code(coefs):
    source = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, 2, generator=source).double() * torch.tensor([1.0, 100.0])
    log_ratio = (0.02 * torch.randn(24, generator=source)).double().requires_grad_()
    settings = {"eps": 1e-8, "clip": 1.0, "clip_per": "reward"}
    found = compute_advantages(rewards, torch.tensor(coefs), 8, **settings)
    ours = clipped_losses(log_ratio, found.values.double(), found.gains.double(), 1e-2, 1e-2)
    theirs = hunyuan(rewards, log_ratio.exp(), coefs, 8, 1e-2, 1.0)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    one, other = (torch.autograd.grad(loss.sum(), log_ratio, retain_graph=True)[0] for loss in (ours.loss, theirs))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    # With rewards that contradict each other, one loss of the sum is another loss.
    joint = clipped_losses(log_ratio, found.values.double(), None, 1e-2, 1e-2)
    assert (coefs[1] == 0) == bool((joint.loss - ours.loss).abs().max() < 1e-6)


def test_clip_ratios_count_both_losses():
    log_ratio = torch.tensor([0.1, -0.1, 0.0, 0.1, -0.1]).double()
    gain, loss = torch.tensor([2.0, 2, 2, 0, 1]).double(), torch.tensor([-1.0, -1, -1, -1, 0]).double()
    found = clipped_losses(log_ratio, gain + loss, gain, 0.05, 0.05)
    assert found.high.tolist() == [1, 0, 0, 0, 0]
    assert found.low.tolist() == [0, 1, 0, 0, 0]
    up, down = log_ratio.exp(), torch.tensor([1.05, 0.95, 1, 1.05, 0.95]).double()
    expected = torch.maximum(-gain * up, -gain * down) + torch.maximum(-loss * up, -loss * down)
    torch.testing.assert_close(found.loss, expected)
    one = clipped_loss(log_ratio, gain, 0.05, 0.05)
    assert torch.equal(clipped_losses(log_ratio, gain, None, 0.05, 0.05).loss, one.loss)
    assert torch.equal(clipped_losses(log_ratio, gain, gain, 0.05, 0.05).loss, one.loss)


def run(folder, **changes):
    settings = {"reward": [near, far], "reward_weights": [1.0, 0.8], "steps_per_generation": 2, "epsilon": 1e-4}
    trainer = grpo(folder, **{**settings, "max_steps": 4, "save_steps": 1, "save_total_limit": None, **changes})
    trainer.train()
    return trainer


def weights(trainer, step=4):
    return load_file(trainer.args.folder / f"checkpoint-{step}" / "weights.safetensors")


def test_it_changes_updates_after_the_first_and_resumes(tmp_path):
    straight = run(tmp_path / "straight", **BOTH)
    summed = run(tmp_path / "summed", advantage_clip_per="reward", advantage_clip=1.0)
    # At ratio 1 nothing is clipped, so the first update is the same up to rounding.
    for step, least in ((1, 0.0), (4, 1e-4)):
        pairs = zip(weights(straight, step).values(), weights(summed, step).values(), strict=True)
        moved = max(float((a - b).abs().max()) for a, b in pairs)
        assert moved > least if least else moved < 1e-5
    assert straight.buffer.gains is not None
    assert summed.buffer.gains is None
    assert lines(straight)[0].keys() == lines(summed)[0].keys()
    # Checkpoint 1 lies between the two updates of a rollout.
    half = run(tmp_path / "half", **BOTH, max_steps=1)
    resumed = run(half.args.folder, **BOTH, resume_from_checkpoint="latest")
    one, other = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="loss_per is 'reward', it must be sum without advantage_clip_per: reward"):
        grpo(tmp_path, loss_per="reward")
    with pytest.raises(UserError, match="Unknown key 'loss_per'"):
        DiffusionNFTConfig.from_dict({"output_dir": str(tmp_path), "loss_per": "reward"})
