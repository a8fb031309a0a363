"""The latent scale: depth latents are scaled after encoding and before decoding, and the scale is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import postgen
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.pipelines.worldweaver import WorldWeaverPipeline
from postgen.worldweaver.adapter import load_adapter, save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.latent_scale import measured_scale
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.self_depth import SelfDepth
from postgen.worldweaver.widen import widen_transformer
from postgen.worldweaver.windows import Layout
from tests.families.test_frame_levels import MAKERS
from tests.tiny_wan import wan_components
from tests.worldweaver.tiny import SMALL, TEXT, quiet, seeded, tiny
from tests.worldweaver.training import settings, trained


def widened_model() -> WorldWeaverModel:
    pipe = MAKERS["Wan"]()
    widen_transformer(pipe)
    return WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))


def test_into_the_network_and_out_again() -> None:
    """A scale of 1 changes no bit; a power of two scales latents exactly and decodes to the same bits."""
    model = widened_model()
    clips = torch.rand(1, 5, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = model.denoiser.encode_video(clips)
        decoded = model.denoiser.decode(raw)
        joint = torch.cat([raw, raw], 1)
        assert model.latent_scale == (1, 1)
        assert torch.equal(model.encode(clips, "depth"), raw)
        assert torch.equal(model.decode(raw, "depth"), decoded)
        assert torch.equal(model.scaled(joint), joint)
        model.latent_scale = [1, 0.25]
        assert torch.equal(model.encode(clips), raw)
        assert torch.equal(model.encode(clips, "depth"), 0.25 * raw)
        assert torch.equal(model.decode(raw), decoded)
        assert torch.equal(model.decode(0.25 * raw, "depth"), decoded)
        assert torch.equal(model.scaled(joint), torch.cat([raw, 0.25 * raw], 1))
        model.latent_scale = [1, 0.46]
        again = model.decode(model.encode(clips, "depth"), "depth")
    torch.testing.assert_close(again, decoded, rtol=0, atol=1e-5)
    # The scale belongs to the transformer: another model of it has the same scale, and the summary shows it.
    assert WorldWeaverModel(model.denoiser, model.embedder).latent_scale == (1, 0.46)
    assert "rgb + depth x 0.46, 4 channels each" in str(postgen.summary(model.denoiser.pipe))
    for wrong in ([1.0], [0.5, 1.0], [1.0, 0.0], [1.0, float("inf")], [1.0, "x"]):
        with pytest.raises(UserError, match="give 2 numbers above 0; the first is for RGB and must be 1"):
            WorldWeaverModel(model.denoiser, model.embedder, latent_scale=wrong)
    with pytest.raises(UserError, match="this model has no modality flow: choose from rgb, depth"):
        model.encode(clips, "flow")


def test_it_is_measured_in_two_digits() -> None:
    rgb = torch.randn(70, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    # The mean of a channel has no effect; only the standard deviation counts.
    far = torch.tensor([3.0, -5.0, 0.0, 1.0]).view(1, 4, 1, 1, 1)
    latents: dict[Any, Tensor] = {"rgb": rgb.half(), "depth": (rgb * 2.2 + far).half(), "flow": rgb.flip(1) / 3}
    assert measured_scale(latents) == (1, 0.45, 3)
    # A second process has as many clips, and depth of ten times the size with the same means.
    other = measured_scale(latents | {"depth": far + 22 * rgb})
    assert other == (1, 0.045, 3)
    sums = {name: torch.cat([each, each]) for name, each in latents.items()}
    assert measured_scale(latents, lambda own: 2 * own) == measured_scale(sums)
    with pytest.raises(UserError, match="all equal or not finite"):
        measured_scale({"rgb": rgb, "depth": 0 * rgb + far})


def test_a_pipeline_keeps_it_and_states_of_another_are_refused(tmp_path: Path) -> None:
    """With another scale the network receives the same inputs and RGB is equal, but depth decodes differently."""
    plain, pipe = tiny(), tiny()
    pipe.model.latent_scale = [1, 0.5]
    save_adapter(pipe, tmp_path / "adapter", pipe.level_embedder)
    pipe = quiet(WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**wan_components()), tmp_path / "adapter"))
    pipe.save_pretrained(tmp_path / "model")
    pipe = quiet(WorldWeaverPipeline.from_pretrained(tmp_path / "model"))
    assert pipe.model.latent_scale == (1, 0.5)
    words = SMALL | {"num_frames": 17, "guidance_scale": 1.0, "return_depth": True, "generator": seeded()}
    made, expected = pipe(TEXT, **words), plain(TEXT, **words | {"generator": seeded()})
    assert torch.equal(made.frames, expected.frames)
    assert not torch.allclose(made.depth, expected.depth)
    words |= {"output_type": "latent"}
    latents = pipe(TEXT, **words | {"generator": seeded()}).depth
    with torch.no_grad():
        again = pipe.model.decode(latents, "depth").mean(2)
    torch.testing.assert_close(made.depth, again, rtol=0, atol=1e-5)
    made.state.save(tmp_path / "state")
    assert pipe.load_state(tmp_path / "state").end == made.state.end
    expected.state.save(tmp_path / "other")
    for one, place in ((plain, "state"), (pipe, "other")):
        with pytest.raises(UserError, match=r"with modalities \['rgb', 'depth.* model has modalities \['rgb', 'depth"):
            one.load_state(tmp_path / place)


def test_training_measures_it_and_the_adapter_says_it(tmp_path: Path) -> None:
    """`pool_dir` keeps unscaled latents for any scale. The test multiplies the kept depth latents by 3."""
    values: dict[str, Any] = {"pool_dir": str(tmp_path / "pool"), "max_steps": 1, "num_frames": 21, "pool_clips": 2}
    first = trained(tmp_path / "a", **values, latent_scale=[1, 0.5])
    model = first.unwrap("worldweaver").model
    assert model.latent_scale == (1, 0.5)
    kept = next(tmp_path.joinpath("pool").glob("depth-*"))
    assert torch.equal(load_file(kept)["latents"], first.pool.latents["depth"])
    save_file({"latents": 3 * first.pool.latents["depth"]}, kept)
    run = trained(tmp_path / "b", **values)
    scale = run.unwrap("worldweaver").model.latent_scale
    sizes = {name: float(each.float().square().mean().sqrt()) for name, each in run.pool.latents.items()}
    assert scale == (1, pytest.approx(sizes["rgb"] / sizes["depth"], rel=0.05))
    assert scale[1] < 0.5
    batch = run._batch(run.pool, Layout(ages=(2, 1, 0), start=2), seeded(), 3)
    parts = [
        each.float().square().mean().sqrt() for each in run.unwrap("worldweaver").model.split(batch.latents).values()
    ]
    torch.testing.assert_close(*parts, rtol=0.1, atol=0)
    pipe = MAKERS["Wan"]()
    loaded = load_adapter(pipe, tmp_path / "b" / "export")
    assert WorldWeaverModel(denoiser_for(pipe), loaded.embedder).latent_scale == scale
    # A resumed run keeps its first scale; checkpoints without a scale have 1.
    assert first.state_dict() == {"micro": 1, "latent_scale": [1, 0.5], "skip": True}
    measured = run.unwrap("worldweaver").model
    run.load_state_dict({"micro": 1, "latent_scale": [1, 0.125]})
    assert measured.latent_scale == (1, 0.125)
    run.load_state_dict({"micro": 1})
    assert measured.latent_scale == (1, 1)
    first.load_state_dict({"micro": 1})  # the setting takes precedence
    assert model.latent_scale == (1, 0.5)
    with pytest.raises(UserError, match=r"latent_scale is \[1.0\]: give 2 numbers"):
        settings(latent_scale=[1])


def test_depth_of_a_video_is_decoded_from_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = widened_model()
    model.latent_scale = [1, 0.5]
    source, known = SelfDepth(model, window=2, memory=1, steps=2), torch.randn(1, 4, 3, 2, 2)
    monkeypatch.setattr(source, "latents", lambda rgb: known)
    with torch.no_grad():
        expected = model.denoiser.decode(2 * known)[0].mean(1)
    assert torch.equal(source(torch.rand(9, 16, 16, 3)), expected)
