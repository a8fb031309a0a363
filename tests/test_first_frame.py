"""A folder whose weights also accept a first frame: with text alone, and with --image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

import postgen
from postgen.compare import compare_videos, pair_paths
from postgen.errors import UserError
from postgen.families.loading import inspect_model
from postgen.generate import load, prepare, run
from postgen.request import GenerateConfig

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}


def picture(folder: Path) -> Path:
    path = folder / "first.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(path)
    return path


def changed(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **values}))


@pytest.mark.parametrize("said", ["postgen.json", "model_index.json"])
def test_the_same_folder_takes_text_or_a_first_frame(tiny_wan: Path, tmp_path: Path, said: str) -> None:
    folder, image = shutil.copytree(tiny_wan, tmp_path / "model"), picture(tmp_path)
    if said == "postgen.json":
        changed(folder, said, image_to_video=True)
    else:
        changed(folder, said, expand_timesteps=True)
    request = {"prompt": "a ball", "model": str(folder), "dtype": "float32", "device": "cpu", **SMALL}
    assert prepare(GenerateConfig(**request)).facts.pipeline == "WanPipeline"
    job = prepare(GenerateConfig(**request, image=str(image)))
    assert (job.facts.pipeline, job.facts.takes_image) == ("WanImageToVideoPipeline", True)
    pipe = load(job)
    assert pipe.config.expand_timesteps
    call = {name: value for name, value in SMALL.items() if name != "seed"}
    stock = WanImageToVideoPipeline.from_pretrained(folder, expand_timesteps=True, dtype=torch.float32)
    expected = stock(
        Image.open(image), "a ball", **call, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).frames[0]
    torch.testing.assert_close(run(pipe, job), expected.float(), rtol=0, atol=0)


def test_a_side_of_a_comparison_may_have_a_first_frame(tiny_wan: Path, tmp_path: Path) -> None:
    """Both sides have the same weights, but each side runs in its own pipeline class."""
    folder, image = shutil.copytree(tiny_wan, tmp_path / "model"), picture(tmp_path)
    changed(folder, "postgen.json", image_to_video=True)
    request = {"prompt": "a ball", "model": str(folder), "dtype": "float32", "device": "cpu", **SMALL}
    jobs = [prepare(GenerateConfig(**request, **more)) for more in ({}, {"image": str(image)})]
    expected = [run(load(job), job) for job in jobs]
    for order in ((0, 1), (1, 0)):
        paths = pair_paths(tmp_path / f"{order[0]}", "frames")
        clips = compare_videos(*(jobs[side] for side in order), paths)
        for side, clip in zip(order, clips, strict=True):
            torch.testing.assert_close(clip, expected[side], rtol=0, atol=0)


def test_other_folders_take_no_first_frame(tiny_wan: Path, tmp_path: Path) -> None:
    request = GenerateConfig(prompt="a ball", model=str(tiny_wan), image=str(picture(tmp_path)), **SMALL)
    with pytest.raises(UserError, match="WanPipeline takes text only: omit --image"):
        prepare(request)
    folder = shutil.copytree(tiny_wan, tmp_path / "model")
    changed(folder, "postgen.json", image_to_video="yes")
    with pytest.raises(UserError, match="image_to_video must be true or false, got 'yes'"):
        inspect_model(folder)


def test_another_pipeline_that_says_so_is_refused(tiny_wan_image: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_wan_image, tmp_path / "model")
    changed(folder, "postgen.json", image_to_video=True)
    with pytest.raises(UserError, match="allowed for WanPipeline only, not for WanImageToVideoPipeline"):
        inspect_model(folder)


def test_the_embedded_model_takes_a_first_frame() -> None:
    facts = inspect_model(postgen.embedded_model())
    assert facts.image_pipeline == "WanImageToVideoPipeline"
    assert facts.with_image().with_image() == facts.with_image()
