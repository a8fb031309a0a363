"""The refiner: convolutions that correct the transformer's depth and flow outputs with the noisy latents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.worldweaver.adapter import CONFIG, load_adapter, save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels, Modality, Role
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.refine import Refiner, contrast
from postgen.worldweaver.widen import widen_transformer
from tests.families.test_frame_levels import MAKERS
from tests.worldweaver.training import settings, trained

AUX: tuple[tuple[Modality, ...], ...] = (("depth",), ("depth", "flow"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set all weights to random values, also those that are initialised with zeros."""
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2, generator=seeded(seed))
    return module


class Point:
    """A widened pipeline with an embedder, and inputs of a call."""

    def __init__(self, kind: str = "Wan", aux: tuple[Modality, ...] = ("depth",), **own: Any) -> None:
        self.pipe: Any = MAKERS[kind]()
        widen_transformer(self.pipe, aux)
        count = 1 + len(aux)
        self.embedder = LevelEmbedder.for_transformer(self.pipe, **{"skip": True, "refine": 6, **own})
        self.model = self.of(self.embedder)
        channels = self.model.channels
        self.z = torch.randn(2, count * channels, 3, 4, 4, generator=seeded(1))
        sigma = torch.rand(2, 3, count, generator=seeded(2))
        self.levels = FrameLevels(sigma=sigma, role=torch.full((3,), int(Role.PREDICT)))
        self.condition = self.model.denoiser.encode_prompt(["a", "b"], ["c", "d"], guidance=True)

    def of(self, embedder: LevelEmbedder) -> WorldWeaverModel:
        return WorldWeaverModel(denoiser_for(self.pipe), embedder)

    @torch.no_grad()
    def predict(self, model: WorldWeaverModel | None = None, guidance: float = 1.0) -> Tensor:
        return (model or self.model).predict(self.z, self.levels, self.condition, guidance)


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("kind", ["Wan", "LTX"])
def test_it_begins_as_the_model_without_it(kind: str, aux: tuple[Modality, ...]) -> None:
    point = Point(kind, aux)
    plain = LevelEmbedder.for_transformer(point.pipe, skip=True)
    for guidance in (1.0, 3.0):
        without, found = point.predict(point.of(plain), guidance), point.predict(guidance=guidance)
        channels = point.model.channels
        assert torch.equal(found[:, :channels], without[:, :channels])
        torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-5)
        if guidance == 1:
            assert torch.equal(found, without)
    # With changed weights, the refiner changes depth and flow, and never RGB.
    shaken(point.embedder.refiner or nn.Identity())
    changed = point.predict(guidance=3.0)
    assert torch.equal(changed[:, :channels], without[:, :channels])
    for part, other in zip(
        changed[:, channels:].split(channels, 1), without[:, channels:].split(channels, 1), strict=True
    ):
        assert (part - other).abs().mean() > 0.01


def test_guidance_comes_after_it() -> None:
    point = Point()
    shaken(point.embedder.refiner or nn.Identity())
    negative = {**point.condition, "prompt": point.condition["negative"]}
    with torch.no_grad():
        without = point.model.predict(point.z, point.levels, negative)
    expected = without + 3 * (point.predict() - without)
    assert torch.equal(point.predict(guidance=3.0), expected)
    del point.condition["negative"]
    with pytest.raises(UserError, match="guidance above 1 needs condition"):
        point.predict(guidance=3.0)


def levels_of(sigma: Tensor, *roles: Role) -> FrameLevels:
    return FrameLevels(sigma=sigma, role=torch.tensor([int(each) for each in roles]))


def test_a_frame_sees_itself_and_the_one_before_it_in_time() -> None:
    refiner = shaken(Refiner(2, 4, 6))
    out, z = (torch.randn(2, 8, 5, 5, 7, generator=seeded(each)) for each in (1, 2))
    sigma = torch.rand(2, 5, 2, generator=seeded(3))
    roles = (Role.LONG, Role.LONG, Role.SHORT, Role.PREDICT, Role.PREDICT)
    whole = refiner(out, z, levels_of(sigma, *roles))
    assert whole.shape == (2, 4, 5, 5, 7)
    for frame in range(5):
        other, level = z.clone(), sigma.clone()
        other[:, :, frame] += 1
        level[:, frame] = 1 - level[:, frame]
        sees = [frame, frame + 1] if frame in (2, 3) else [frame]
        for changed in (refiner(out, other, levels_of(sigma, *roles)), refiner(out, z, levels_of(level, *roles))):
            moved = (changed - whole).abs().amax((0, 1, 3, 4))
            assert [each for each in range(5) if moved[each] > 1e-3] == sees
    # The result of a frame does not depend on other rows or on the length of the window.
    part = refiner(out[1:, :, 2:], z[1:, :, 2:], levels_of(sigma[1:, 2:], *roles[2:]))
    torch.testing.assert_close(part, whole[1:, :, 2:], rtol=1e-5, atol=1e-5)
    # The refiner receives the level of each modality.
    for modality in range(2):
        level = sigma.clone()
        level[..., modality] = 1 - level[..., modality]
        assert (refiner(out, z, levels_of(level, *roles)) - whole).abs().mean() > 1e-3


def test_cells_are_compared_in_units_of_their_noise() -> None:
    """The contrast of a flat frame is 0, and that of a noisy frame is about 1 for every noise level."""
    noise = torch.randn(1, 4, 2, 32, 32, generator=seeded(0))
    for level in (0.05, 0.3, 1.0):
        sigma = torch.full((1, 4, 2, 1, 1), level)
        flat = torch.full_like(noise, 3.0)
        torch.testing.assert_close(contrast(flat, sigma), torch.zeros_like(flat), rtol=0, atol=1e-5)
        textured = flat + level * noise + (1 - level) * 0.25 * noise.flip(4)
        assert 0.85 < float(contrast(textured, sigma).std()) < 1.05


def test_rgb_enters_without_its_noise_and_without_gradients() -> None:
    """The refiner reads the predicted clean RGB latents z - s v, and passes no gradient to them."""
    refiner = shaken(Refiner(2, 4, 6))
    velocity, z, depth = (torch.randn(1, n, 2, 5, 5, generator=seeded(n)) for n in (4, 8, 4))
    roles = (Role.SHORT, Role.PREDICT)

    def refined(velocity: Tensor, level: float) -> Tensor:
        sigma = torch.full((1, 2, 2), level)
        added: Tensor = refiner(torch.cat([velocity, depth], 1), z, levels_of(sigma, *roles))
        return added

    assert torch.equal(
        refined(velocity + 1, 0.0), refined(velocity, 0.0)
    )  # at level 0 the predicted clean latents do not depend on the velocity
    assert (refined(velocity + 1, 0.5) - refined(velocity, 0.5)).abs().mean() > 1e-3
    velocity.requires_grad_()
    depth.requires_grad_()
    refined(velocity, 0.5).square().sum().backward()
    assert velocity.grad is None or not velocity.grad.any()
    assert depth.grad is not None
    assert depth.grad.all()


def test_under_autocast_it_stays_in_its_own_numbers() -> None:
    refiner = shaken(Refiner(2, 4, 6))
    out, z = (torch.randn(1, 8, 2, 4, 4, generator=seeded(each)) for each in (1, 2))
    levels = levels_of(torch.rand(1, 2, 2, generator=seeded(3)), Role.PREDICT, Role.PREDICT)
    with torch.autocast("cpu", torch.bfloat16):
        found = refiner(out, z, levels)
    assert found.dtype == torch.float32
    assert torch.equal(found, refiner(out, z, levels))
    low = refiner.to(torch.bfloat16)(out, z, levels)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low.flatten(), found.flatten(), 0) > 0.99


def test_it_is_saved_in_the_adapter_and_old_ones_have_none(tmp_path: Path) -> None:
    point = Point()
    shaken(point.embedder)
    expected = point.predict()
    save_adapter(point.pipe, tmp_path / "new", point.embedder)
    loaded = load_adapter(point.pipe, tmp_path / "new")
    assert torch.equal(point.predict(point.of(loaded.embedder)), expected)
    point.embedder.save_pretrained(tmp_path / "component")
    again = LevelEmbedder.from_pretrained(tmp_path / "component")
    assert torch.equal(point.predict(point.of(again)), expected)

    plain = LevelEmbedder.for_transformer(point.pipe, skip=True)
    save_adapter(point.pipe, tmp_path / "old", plain)
    path = tmp_path / "old" / CONFIG
    note = json.loads(path.read_text())
    for name in ("refine", "channels"):
        del note["level_embedder"][name]
    path.write_text(json.dumps(note))
    assert load_adapter(point.pipe, tmp_path / "old").embedder.refiner is None

    path = tmp_path / "new" / CONFIG
    right = json.loads(path.read_text())
    for wrong in ({"refine": -1}, {"refine": True}, {"channels": 0}, {"skip": False}, {"refine": 2**20}):
        path.write_text(json.dumps({**right, "level_embedder": {**right["level_embedder"], **wrong}}))
        with pytest.raises(UserError, match="new is damaged: the level embedder config is"):
            load_adapter(point.pipe, tmp_path / "new")
    path.write_text(json.dumps({**right, "level_embedder": {**right["level_embedder"], "refine": 7}}))
    with pytest.raises(UserError, match="the layer needs"):
        load_adapter(point.pipe, tmp_path / "new")


def test_what_it_cannot_be_made_for() -> None:
    for wrong in ({"skip": False}, {"modalities": 1}, {"channels": 0}):
        with pytest.raises(UserError, match="refine=6 with skip="):
            LevelEmbedder(**{"width": 8, "skip": True, "refine": 6, "channels": 4, **wrong})
    with pytest.raises(UserError, match="refine must be at least 0"):
        LevelEmbedder(width=8, refine=-1)
    with pytest.raises(UserError, match="refine is -1, it must be from 0 to 1024"):
        settings(refine=-1)
    point = Point()
    other = LevelEmbedder(point.embedder.config["width"], 2, skip=True, refine=6, channels=5)
    with pytest.raises(UserError, match="refines latents of 5 channels, the model has latents of 4"):
        point.of(other)


@pytest.mark.parametrize("aux", [*AUX, ()])
def test_training_reaches_all_of_it(aux: tuple[Modality, ...], tmp_path: Path) -> None:
    run = trained(tmp_path, aux=list(aux), refine=6, max_steps=3, learning_rate_new=0.01)
    refiner = run.unwrap("worldweaver").level_embedder.refiner
    if not aux:
        assert refiner is None
        return
    fresh = Refiner(1 + len(aux), refiner.channels, 6)
    zeros = [name for name, value in fresh.named_parameters() if not value.any()]
    assert len(zeros) == 4
    assert all(refiner.get_parameter(name).any() for name in zeros)
    rates = {id(each): group["lr"] for group in run.parameter_groups() for each in group["params"]}
    assert {rates[id(each)] for each in refiner.parameters()} == {0.01}
    pipe = MAKERS["Wan"]()
    found = load_adapter(pipe, tmp_path / "export").embedder.refiner
    assert found is not None
    assert all(found.get_parameter(name).any() for name in zeros)
