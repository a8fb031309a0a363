"""The losses of the forward process against the formulas: omega at v = v_old, brakes, finite differences, pairs."""

from types import SimpleNamespace

import pytest
import torch

from postgen.grpo.forward_config import DECAY_TYPES, DiffusionNFTConfig
from postgen.grpo.forward_losses import (
    awm_likelihood,
    awm_loss,
    crd_loss,
    dgpo_loss,
    dpo_loss,
    errors_of,
    implicit_reward,
    moded,
    nft_loss,
    pairs_of_equal_motion,
)
from postgen.sampling.schedule import Schedule

CLIP, ROWS, GROUP, SIZE = 5.0, 8, 4, 6


def batch():
    """Two groups of four noised samples, with predictions of three policies, in float64."""
    source = torch.Generator().manual_seed(0)
    clean, noise, step, other = (torch.randn(ROWS, SIZE, generator=source, dtype=torch.float64) for _ in range(4))
    schedule = Schedule(torch.tensor([0.95, 0.8, 0.45, 0.2, 0.0]).double())
    index = torch.tensor([0, 1, 2, 3] * 2)
    s = schedule.sigmas[index]
    advantages = torch.randn(2, GROUP, generator=source, dtype=torch.float64)
    advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
    target = noise - clean
    return SimpleNamespace(
        clean=clean,
        x=(1 - s[:, None]) * clean + s[:, None] * noise,
        target=target,
        levels=schedule.levels(index, index + 1),
        s=s,
        advantages=advantages,
        v=target + 0.4 * step,
        other=target + 0.4 * other,
    )


def grouped(values):
    """Return the means over groups, row by row, without gradient."""
    return values.detach().view(-1, GROUP).mean(1).repeat_interleave(GROUP)


def nft(b, v, old, beta=1.0, weighting="adaptive"):
    optimality = b.advantages / CLIP / 2 + 0.5
    return CLIP * nft_loss(b.x, b.clean, v, old, optimality, b.levels, beta, weighting=weighting)


def awm(b, v, old, weighting="uniform", power=1.0):
    now, before = (awm_likelihood(errors_of(each, b.target).square, b.s, weighting, power) for each in (v, old))
    return awm_loss(now, before.detach(), b.advantages, 1.0).loss


def crd(b, v, old, beta=1.0):
    reward = implicit_reward(errors_of(v, b.target), errors_of(old, b.target))
    return CLIP * crd_loss(reward, grouped(reward), b.advantages / (2 * CLIP), beta)


def dgpo(b, v, old, beta=100.0, clip=None):
    errors, before = errors_of(v, b.target).square, errors_of(old, b.target).square
    return dgpo_loss(errors, before, b.advantages, grouped(b.advantages * (errors - before)), beta, clip).loss


def one(b):
    return torch.ones_like(b.s)


def size(b):
    return (b.v - b.target).abs().mean(1)


OMEGA = {
    "nft": (nft, lambda b: b.s / size(b)),
    "nft, beta .1": (lambda *x: nft(*x, beta=0.1), lambda b: b.s / size(b)),
    "nft without weight": (lambda *x: nft(*x, weighting="none"), lambda b: b.s**2),
    "awm uniform": (awm, one),
    "awm ghuber": (
        lambda *x: awm(*x, weighting="ghuber", power=0.25),
        lambda b: b.s * (errors_of(b.v, b.target).square + 1e-10) ** -0.75,
    ),
    "crd": (crd, lambda b: 1 / size(b)),
    "crd, beta .3": (lambda *x: crd(*x, beta=0.3), lambda b: 1 / size(b)),
    "dgpo": (dgpo, lambda b: one(b) / 2),
}


def gradient(loss, b, old):
    v = b.v.clone().requires_grad_()
    loss(b, v, old).sum().backward()
    return v.grad


@pytest.mark.parametrize("name", OMEGA)
def test_at_the_old_policy_the_gradient_is_a_omega_grad_e(name):
    b, (loss, omega) = batch(), OMEGA[name]
    slope = 2 * (b.v - b.target) / SIZE
    expected = (b.advantages * omega(b))[:, None] * slope
    assert (gradient(loss, b, b.v) - expected).abs().max() < 1e-14
    b.advantages = torch.zeros_like(b.advantages)
    assert gradient(loss, b, b.v).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["awm uniform", "awm ghuber", "dgpo"])
def test_without_advantages_these_losses_have_no_gradient_anywhere(name):
    b = batch()
    b.advantages = torch.zeros_like(b.advantages)
    assert gradient(OMEGA[name][0], b, b.other).abs().max() == 0


@pytest.mark.parametrize("name", ["nft", "crd"])
def test_these_losses_pull_the_policy_back_to_the_old_one(name):
    """Without advantages, a step along the negative gradient makes the predictions more alike."""
    b = batch()
    b.advantages = torch.zeros_like(b.advantages)
    found = gradient(OMEGA[name][0], b, b.other)
    if name == "nft":
        assert ((b.v - b.other) * found).sum() > 0
    else:  # centred: it is the spread of the implicit rewards that falls
        spread = [
            (reward - grouped(reward)).square().sum()
            for v in (b.v, b.v - 0.1 * found)
            for reward in [implicit_reward(errors_of(v, b.target), errors_of(b.other, b.target))]
        ]
        assert spread[1] < spread[0]


@pytest.mark.parametrize("name", ["nft without weight", "awm uniform", "awm ghuber"])
def test_gradients_equal_finite_differences(name):
    """Losses without parts that have no gradient, away from the old policy."""
    b, loss = batch(), OMEGA[name][0]
    found, step = gradient(loss, b, b.other), 1e-6
    for row, column in ((0, 0), (3, 2), (7, 5)):
        shift = torch.zeros_like(b.v)
        shift[row, column] = step
        numeric = (loss(b, b.v + shift, b.other) - loss(b, b.v - shift, b.other)).sum() / (2 * step)
        assert found[row, column].item() == pytest.approx(numeric.item(), rel=1e-6, abs=1e-9)


def test_crd_gradient_equals_finite_differences_with_its_weights_and_means_held():
    b = batch()
    errors, before = errors_of(b.v, b.target), errors_of(b.other, b.target)
    mean = grouped(implicit_reward(errors, before))

    def loss(square):
        reward = before.square / before.size - square / errors.size
        return CLIP * crd_loss(reward, mean, b.advantages / (2 * CLIP), 0.7)

    step = 1e-6
    numeric = (loss(errors.square + step) - loss(errors.square - step)) / (2 * step)
    slope = 2 * (b.v - b.target) / SIZE
    found = gradient(lambda *x: crd(*x, beta=0.7), b, b.other)
    torch.testing.assert_close(found, numeric[:, None] * slope, rtol=1e-7, atol=1e-9)


def pairs(b, beta):
    """Return the textbook loss of DPO, for rows 2 i (better) and 2 i + 1 (worse)."""
    gap = errors_of(b.v, b.target).square - errors_of(b.other, b.target).square
    return -torch.nn.functional.logsigmoid(-beta / 2 * (gap[0::2] - gap[1::2]))


def sides(b):
    return torch.tensor([1.0, -1.0] * (ROWS // 2), dtype=torch.float64)


def dpo(b, v, old, beta):
    errors, before = errors_of(v, b.target).square, errors_of(old, b.target).square
    margin = (sides(b) * (errors - before)).detach().view(-1, 2).mean(1).repeat_interleave(2)
    return dpo_loss(errors, sides(b), margin, beta).loss


def test_dpo_has_value_and_gradient_of_the_textbook():
    b = batch()
    found = gradient(lambda *x: dpo(*x, beta=3.0) / 2, b, b.other)
    value = (dpo(b, b.v, b.other, 3.0).sum() / 2).item()
    b.v.requires_grad_()
    expected = pairs(b, 3.0).sum()
    expected.backward()
    assert value == pytest.approx(expected.item())
    assert (found - b.v.grad).abs().max() < 1e-14


def test_dpo_is_dgpo_of_two_samples():
    """At any policy: beta times the gradient of DGPO with group size 2 and advantages 1 and -1."""
    b = batch()
    b.advantages = sides(b)

    def groups_of_two(b, v, old):
        errors, before = errors_of(v, b.target).square, errors_of(old, b.target).square
        mean = (b.advantages * (errors - before)).detach().view(-1, 2).mean(1).repeat_interleave(2)
        return dgpo_loss(errors, before, b.advantages, mean, 3.0, None).loss

    found, other = (gradient(loss, b, b.other) for loss in (lambda *x: dpo(*x, beta=3.0), groups_of_two))
    assert found.abs().max() > 0.01
    assert (found - 3.0 * other).abs().max() < 1e-14


def test_a_pair_of_equal_advantages_teaches_nothing():
    error = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    found = dpo_loss(error, torch.zeros(2).double(), torch.zeros(2).double(), 10.0).loss
    found.sum().backward()
    assert found.tolist() == [0, 0]
    assert error.grad.tolist() == [0, 0]


def test_dgpo_clips_on_the_side_of_the_advantage():
    old = torch.full((4,), 0.5, dtype=torch.float64)
    error = (old - torch.tensor([0.1, -0.1, 0.1, -0.1]).double()).requires_grad_()  # ratios above, below 1
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    found = dgpo_loss(error, old, advantage, torch.zeros(4).double(), 100.0, 0.05)
    found.loss.sum().backward()
    assert found.clipped.tolist() == [1, 0, 0, 1]
    assert error.grad.tolist() == [0, 0.5, -0.5, 0]


def test_awm_by_hand():
    error, level = torch.tensor([0.25]).double(), torch.tensor([0.5]).double()
    assert awm_likelihood(error, level, "uniform", 0.25).item() == -0.25
    assert awm_likelihood(error, level, "ghuber", 1.0).item() == pytest.approx(-0.125)
    assert awm_likelihood(error, level, "ghuber", 0.5).item() == pytest.approx(-2 * 0.5 * (0.5 - 1e-5), rel=1e-9)
    found = awm_loss(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([2.0]), 0.05)
    assert found.loss.item() == pytest.approx(-2 * 1.05)
    assert found.high.item() == 1


def test_nothing_depends_on_the_order_of_a_group():
    b = batch()
    order = torch.cat([torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2]) + GROUP])
    moved = SimpleNamespace(**vars(b))
    for name in ("clean", "x", "target", "s", "advantages", "v", "other"):
        setattr(moved, name, getattr(b, name)[order])
    moved.levels = SimpleNamespace(mix=lambda: ((1 - moved.s, moved.s), None), frame_axis=None)
    for name, (loss, _) in OMEGA.items():
        found, other = gradient(loss, b, b.other), gradient(loss, moved, moved.other)
        assert (found[order] - other).abs().max() < 1e-14, name


def test_modes_of_advantages():
    given = torch.tensor([2.0, 0.5, 0.0, -3.0])
    assert moded(given, "all").tolist() == given.tolist()
    assert moded(given, "positive_only").tolist() == [2, 0.5, 0, 0]
    assert moded(given, "negative_only").tolist() == [0, 0, 0, -3]
    assert moded(given, "one_only").tolist() == [1, 1, 0, 0]
    assert moded(given, "binary").tolist() == [1, 1, 0, -1]


def test_decays_of_the_published_code():
    steps = (0, 74, 75, 76, 100, 500, 5000)
    assert [DECAY_TYPES[0].at(step) for step in steps] == [0] * 7
    assert [DECAY_TYPES[1].at(step) for step in steps] == pytest.approx([0, 0.074, 0.075, 0.076, 0.1, 0.5, 0.5])
    assert [DECAY_TYPES[2].at(step) for step in steps] == pytest.approx([0, 0, 0, 0.0075, 0.1875, 0.999, 0.999])
    args = DiffusionNFTConfig(output_dir="x", forward_loss="crd")
    assert [args.anchor_decay.at(step) for step in (0, 50, 1000)] == pytest.approx([0.25, 0.5, 0.999])


def test_pairs_of_equal_motion():
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 1.0, 1.0, 0.0])
    motion = torch.tensor([1.0, 9.0, 2.0, 1.1, 4.0, 1.0, 2.0, 3.0])
    # First group by motion: rows 0, 3, 2, 1 with scores 0, 2, 1, 3; second: rows 5, 6, 7, 4 with 1, 1, 0, 5.
    assert pairs_of_equal_motion(scores, motion, 4).tolist() == [0, 3, 4, 7]
    # Samples without a score are in no pair, as long as two others are left; otherwise no pair has an advantage.
    scores = torch.tensor([torch.nan, 3.0, 1.0, 2.0, torch.nan, torch.nan, torch.nan, 0.0])
    assert pairs_of_equal_motion(scores, motion, 4).tolist()[:2] == [1, 2]
