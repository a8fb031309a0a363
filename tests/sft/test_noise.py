"""Noise levels: distributions, the schedule of each kind of model, ranges, experts, frames, weights of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.schedule import Levels
from postgen.sampling.transition import split
from postgen.sft.noise import NoiseConfig, NoiseLevels, loss_weight
from tests.families.tiny_pipelines import PIPELINES
from tests.sampling.toy import PointPipeline, ToyDenoiser

SHAPE = (3, 1, 2, 2)


def levels(denoiser: Any = None, seed: int = 0, **settings: Any) -> NoiseLevels:
    return NoiseLevels(NoiseConfig(**settings), denoiser or ToyDenoiser(PointPipeline()), seed)


def drawn(count: int = 2000, **settings: Any) -> torch.Tensor:
    return levels(**settings).draw(range(count), SHAPE)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({}, 0.5, 12**-0.5),
        ({"noise_levels": "logit_normal"}, 0.5, 0.2083),
        ({"noise_levels": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}, 0.7216, 0.0967),
        ({"noise_levels": "mode", "mode_scale": 0.0}, 0.5, 12**-0.5),
        ({"noise_levels": "mode"}, 0.5, 0.2153),
        ({"noise_levels": "logit_normal", "noise_min": 0.4, "noise_max": 0.6}, 0.5, 0.0577),
    ],
)
def test_the_distributions(settings: dict[str, Any], mean: float, std: float) -> None:
    found = drawn(**settings, noise_shift=1.0)
    assert found.mean().item() == pytest.approx(mean, abs=0.015)
    assert found.std().item() == pytest.approx(std, abs=0.012)
    assert settings.get("noise_min", 0.0) <= found.min() < found.max() <= settings.get("noise_max", 1.0)


def test_the_shift_of_the_model_is_that_of_its_schedule() -> None:
    """The toy's schedule is shifted by 3; a given shift replaces it."""
    own, given, plain = (drawn(**each) for each in ({}, {"noise_shift": 3.0}, {"noise_shift": 1.0}))
    torch.testing.assert_close(own, given, atol=3e-6, rtol=0)
    torch.testing.assert_close(given, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("name", ["SkyReels-V2", "FLUX", "LTX"])
def test_levels_follow_the_schedule_of_the_pipeline(name: str) -> None:
    """Also with a schedule that depends on the size. At the times of a step the level is that of the step."""
    make, size = PIPELINES[name]
    denoiser = denoiser_for(make())
    shape = denoiser.latent_shape(**size)
    found, steps = levels(denoiser), denoiser.sigmas(1000, shape).double()
    times = 1 - torch.arange(0, 1001, 100, dtype=torch.float64) / 1000
    torch.testing.assert_close(found.at(times, shape), steps[::100])


def test_models_with_alpha_bars_train_whole_timesteps() -> None:
    denoiser = ToyDenoiser(PointPipeline("epsilon"))
    found = levels(denoiser).draw(range(500), SHAPE)
    steps = found * denoiser.timestep_scale
    torch.testing.assert_close(steps, steps.round())
    assert steps.min() >= 1
    assert steps.max() <= 1000
    both = levels(denoiser).levels(found)
    assert both.alpha_bar is not None
    assert torch.equal(both.alpha_bar, denoiser.alpha_bar(found).double())


def test_a_draw_depends_on_seed_and_sample_only() -> None:
    whole = drawn(8, noise_levels="logit_normal")
    assert torch.equal(levels(noise_levels="logit_normal").draw([5, 2], SHAPE), whole[[5, 2]])
    assert not torch.equal(levels(seed=1, noise_levels="logit_normal").draw(range(8), SHAPE), whole)
    dropped = levels(caption_dropout=0.25).dropped(range(4000))
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not levels(caption_dropout=0.0).dropped(range(200)).any()
    assert levels(caption_dropout=1.0).dropped(range(200)).all()


def frames(**changes: Any) -> Any:
    """Return the toy as a model with a noise level for each of 5 latent frames."""
    found: Any = ToyDenoiser(PointPipeline())
    found.per_frame = True
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_levels_of_frames() -> None:
    shape = (3, 5, 2, 2)
    first = levels(frames(), frame_noise="first_frame", frame_noise_share=0.5).draw(range(200), shape)
    clean = first[:, 0] == 0
    assert first.shape == (200, 5)
    assert 70 < clean.sum() < 130
    assert all(len(row.unique()) == 1 for row in first[:, 1:])
    assert torch.equal(first[~clean, 0], first[~clean, 1])
    each = levels(frames(), frame_noise="each").draw(range(50), shape)
    assert len(each.unique()) == 250
    for frame in each.T:
        assert 0.2 < frame.std() < 0.35
    assert levels(frames(), frame_noise="each").draw(range(3), SHAPE).shape == (3,), "a picture has one level"


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_levels_of_frames_are_mixed_frame_by_frame(kind: Any) -> None:
    """Noised latents and targets with (B, T) levels are those of the frames alone."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 2, 2, generator=generator) for _ in range(2))
    sigma = torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def at(s: torch.Tensor, axis: int | None) -> Levels:
        bar = None if kind == "flow" else 1 - s
        return Levels(s=s, after=s, second=s.new_zeros(()), alpha_bar=bar, alpha_bar_after=bar, frame_axis=axis)

    whole = at(sigma, 2)
    for frame in range(4):
        one, part = at(sigma[:, frame], None), slice(frame, frame + 1)
        a, b = clean[:, :, part], noise[:, :, part]
        assert torch.equal(noised(clean, noise, whole)[:, :, part], noised(a, b, one))
        assert torch.equal(wanted_of(clean, noise, whole, kind)[:, :, part], wanted_of(a, b, one, kind))


def test_experts_choose_the_levels() -> None:
    two = frames(per_frame=False, expert_boundary=0.9, network_sigmas=None)
    high = levels(two, train_experts="high").draw(range(300), SHAPE)
    low = levels(two, train_experts="low").draw(range(300), SHAPE)
    assert high.min() >= 0.9
    assert low.max() < 0.9
    both = levels(two).draw(range(300), SHAPE)
    assert 20 < (both >= 0.9).sum() < 280


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_latents(kind: Any) -> None:
    """The weighted squared error of any prediction is min(snr, gamma) times that of its clean latents."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = (torch.randn(6, 3, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    s = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.97], dtype=torch.float64)
    bar = None if kind == "flow" else (1 - s) ** 2
    at = Levels(s=s, after=s, second=s[0], alpha_bar=bar, alpha_bar_after=bar)
    x, target = noised(clean, noise, at), wanted_of(clean, noise, at, kind)
    weighted = (target + wrong - target).square().flatten(1).mean(1) * loss_weight(at, kind, "min_snr", 5.0)
    found = split(x, target + wrong, at, kind)[0] - clean
    (a, b), _ = at.mix()
    wanted = found.square().flatten(1).mean(1) * ((a / b) ** 2).clamp(max=5.0)
    torch.testing.assert_close(weighted, wanted)


def test_weights_of_flow_models() -> None:
    s = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    at: Any = Levels(s=s, after=s, second=s[1])
    assert loss_weight(at, "flow", "none", 5.0).tolist() == [1, 1, 1, 1]
    assert loss_weight(at, "flow", "sigma_sqrt", 5.0)[1:].tolist() == [16, 4, 1]
    cosmap = loss_weight(at, "flow", "cosmap", 5.0)
    assert cosmap[2].item() == pytest.approx(4 / torch.pi)
    assert loss_weight(at, "flow", "min_snr", 5.0).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_std": 0.0}, "logit_std is 0.0, it must be above 0"),
        ({"mode_scale": 2.0}, "mode_scale is 2.0, it must be from -1 to 1.75"),
        ({"noise_shift": 0.0}, "noise_shift is 0.0, it must be above 0"),
        ({"noise_min": 0.5, "noise_max": 0.5}, "noise_max is 0.5, it must be above noise_min, 0.5"),
        ({"logit_std": 2.0}, "logit_std is 2.0, it must be left out without noise_levels: logit_normal"),
        ({"noise_levels": "logit_normal", "mode_scale": 1.0}, "left out without noise_levels: mode"),
        ({"snr_gamma": 1.0}, "snr_gamma is 1.0, it must be left out without loss_weighting: min_snr"),
        ({"frame_noise_share": 0.5}, "left out without frame_noise: first_frame or each"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5, it must be from 0 to 1"),
        ({"noise_levels": "normal"}, "noise_levels is 'normal'. Allowed: uniform, logit_normal, mode"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        NoiseConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("flow", {"train_experts": "high"}, "has one network, leave train_experts out"),
        ("flow", {"frame_noise": "each"}, "takes one noise level per clip, use frame_noise clip"),
        ("epsilon", {"noise_shift": 3.0}, "predicts epsilon: leave noise_shift out"),
        ("epsilon", {"loss_weighting": "cosmap"}, "predicts epsilon: use min_snr or none"),
        ("two", {"frame_noise": "each"}, "an expert of Toy takes noise levels on one side of 0.9"),
        ("two", {"train_experts": "high", "noise_max": 0.8}, "leave no level for the high expert"),
    ],
)
def test_settings_that_a_model_does_not_support(model: str, settings: dict[str, Any], message: str) -> None:
    two = model == "two"
    denoiser = frames(expert_boundary=0.9, network_sigmas=None) if two else ToyDenoiser(PointPipeline(model))
    with pytest.raises(UserError, match=message):
        levels(denoiser, **settings)


def test_an_empty_range_ends() -> None:
    found = levels(noise_levels="logit_normal", logit_mean=9.0, logit_std=0.01, noise_max=0.1)
    with pytest.raises(UserError, match=r"draws no level from 0 to 0\.1 in 1000 draws: widen"):
        found.draw([0], SHAPE)
