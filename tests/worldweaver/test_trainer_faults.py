"""Method `worldweaver`: regression tests for settings, videos and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.quant import QuantSpec, quantize_weights
from postgen.video import write_video
from postgen.worldweaver.depth_sources import TransformersDepth
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.segments import Segments
from postgen.worldweaver.texts import Texts
from postgen.worldweaver.trainer import WorldWeaverTrainer
from postgen.worldweaver.video_clips import video_pool
from postgen.worldweaver.widen import widened
from postgen.worldweaver.world_clips import world_pool
from tests.families.test_frame_levels import MAKERS
from tests.worldweaver.training import log_of, settings, trained


def model_of(*modalities: Any) -> WorldWeaverModel:
    pipe = MAKERS["Wan"]()
    widened(pipe, modalities)
    return WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))


def test_shares_that_are_one_together() -> None:
    """Shares whose sum is 1 are accepted, although .1 is above 1 - .9 in floating point."""
    settings(fill_share=0.9, drain_share=0.1)
    source = torch.Generator().manual_seed(0)
    drawn = {Segments(steps=6, groups=3).draw_ages(source, 0.9, 0.1) for _ in range(100)}
    assert drawn == {(0,), (1, 0), (2,), (2, 1)}


def half_precision() -> Any:
    pipe = MAKERS["Wan"]()
    pipe.transformer.to(torch.float16)
    return pipe


def quantised() -> Any:
    pipe = MAKERS["Wan"]()
    quantize_weights(pipe.transformer, QuantSpec(weight="int8"))
    return pipe


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (MAKERS["Wan"], {"num_frames": 9}, "clips of 3 latent frames are too short"),
        (MAKERS["Wan"], {"num_frames": 30}, r"must be 4n\+1, got 30"),
        (MAKERS["LTX"], {"num_frames": 33, "height": 32, "width": 32}, "give flow_shift"),
        (MAKERS["Wan image-to-video"], {}, "is an image-to-video model, but windows have no image condition"),
        (quantised, {"use_peft": False}, "cannot be trained as a whole: train a LoRA, or load the exact model"),
        (half_precision, {"bf16": True}, r"are torch\.float16, but trained weights are float32: set dtype: float32"),
    ],
)
def test_it_is_said_before_clips_are_made(make: Any, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = WorldWeaverTrainer(settings(tmp_path / "run", pool_dir=str(tmp_path / "pool"), **changes), make())
    with pytest.raises(UserError, match=said):
        run.train()
    assert not (tmp_path / "pool").exists()


def test_a_term_is_a_mean_over_windows_in_which_it_counts(tmp_path: Path) -> None:
    """Windows in which depth does not count must not lower the mean of the depth loss."""
    values = {"evaluate_only": True, "pool_clips": 1, "eval_clips": 4, "per_device_train_batch_size": 1}
    trained(tmp_path / "half", drop_share=0.5, split_share=0.0, **values)
    row = log_of(tmp_path / "half")[-1]
    counted = 4 * (row["eval_loss"] - row["eval_rgb_loss"]) / (0.5 * row["eval_depth_loss"])
    assert counted == pytest.approx(round(counted), abs=1e-3)
    assert 1 <= round(counted) <= 3
    trained(tmp_path / "none", drop_share=1.0, split_share=0.0, **values)
    row = log_of(tmp_path / "none")[-1]
    assert "eval_depth_loss" not in row
    assert row["eval_loss"] == row["eval_rgb_loss"]


def test_kept_latents_are_of_one_precision_and_scale(tmp_path: Path) -> None:
    """Latents in bfloat16, or of an autoencoder with other latent statistics, have their own files."""
    model = model_of("rgb")
    texts = Texts(model.denoiser, torch.device("cpu"))
    args, pools = settings(pool_dir=str(tmp_path), pool_clips=1, num_frames=5), []
    for bf16, shift in ((False, 0.0), (True, 0.0), (False, 1.0)):
        config = model.denoiser.pipe.vae.config  # type: ignore[attr-defined]
        model.denoiser.pipe.vae.register_to_config(  # type: ignore[attr-defined]
            latents_mean=[each + shift for each in config["latents_mean"]]
        )
        for _ in range(2):  # the first call renders, the second reads
            pools.append(world_pool(args, model, texts, wrong=False, bf16=bf16).latents["rgb"])
    assert len([*tmp_path.glob("*.safetensors")]) == 3
    assert all(torch.equal(*pools[low : low + 2]) for low in (0, 2, 4))
    assert not torch.equal(pools[0], pools[2])
    assert not torch.equal(pools[0], pools[4])


def test_depth_that_is_none(tmp_path: Path) -> None:
    """Invalid depth is refused with the number of its row."""
    write_video(tmp_path / "clip", torch.rand(5, 3, 16, 16), fps=8, format="frames")
    model, depth = model_of("rgb", "depth"), torch.rand(5, 16, 16)
    texts, args = Texts(model.denoiser, torch.device("cpu")), settings(num_frames=5, train_dataset="x")
    save_file({"disparity": depth[:, :0]}, tmp_path / "empty.safetensors")
    depth[3, 2, 2] = float("nan")
    save_file({"disparity": depth}, tmp_path / "nan.safetensors")
    row = {"prompt": "x", "video": str(tmp_path / "clip")}
    for more, said in (
        ({"depth": ""}, "row 0 of rows: depth must be .* got ''"),
        ({"depth": str(tmp_path / "empty.safetensors")}, "row 0 of rows: .* needs a tensor named disparity"),
        ({"depth": str(tmp_path / "nan.safetensors")}, "row 0 of rows: .*nan.safetensors has values that are not fin"),
        ({}, "row 0 of rows: the estimated depth has values that are not finite"),
    ):
        with pytest.raises(UserError, match=said):
            video_pool(args, model, texts, [row | more], "rows", wrong=False, depth_source=lambda frames: depth)


def test_a_depth_estimator_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"depth estimator {tmp_path} cannot be loaded"):
        TransformersDepth(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aux": ["depth", "flow"], "num_frames": 1}, "num_frames is 1, it must be at least 2 with flow"),
        ({"aux": [], "train_dataset": "x", "depth_model": "y"}, "depth_model is 'y', it must be omitted with aux"),
        ({"train_dataset": "x", "eval_clips": 2}, "eval_clips is 2, it must be 0 with train_dataset"),
    ],
)
def test_settings_that_were_taken_and_ignored(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(**changes)
