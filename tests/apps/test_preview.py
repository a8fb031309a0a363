"""Previews: their content and their frequency."""

import base64
import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from postgen.apps.preview import Preview, animated
from postgen.generate import Watch, load, prepare, run
from postgen.request import GenerateConfig

SMALL: dict[str, Any] = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 7, "guidance_scale": 1.0}


def pictures(html: str) -> Image.Image:
    (data,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_clean_estimate_is_shown_every_second_step(tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postgen.apps.preview.MOST_SHARE", 1e6)  # steps of a model this small take no time
    job = prepare(GenerateConfig(prompt="a ball", model=str(tiny_wan), **SMALL))
    pipe, shown = load(job), []
    preview = Preview(pipe, shown.append)
    watch = Watch(look=preview.look)
    clip = run(pipe, job, watch=watch)
    assert [re.search(r"after step (\d) of 7", html)[1] for html in shown] == ["2", "4", "6"]
    moving = pictures(shown[-1])
    assert moving.size == (8, 4)
    assert moving.n_frames == 3
    # After `learn`, the preview of the same latents is close to the colours of the video.
    preview.learn(watch.latents, clip)
    colours = preview._colours.clip(watch.latents)
    small = torch.nn.functional.adaptive_avg_pool2d(clip[:1], (4, 8))
    assert (colours[:1] - small).abs().mean() < 0.1


def test_a_preview_that_takes_long_beside_the_steps_becomes_rare(tiny_wan: Path) -> None:
    job = prepare(GenerateConfig(prompt="a ball", model=str(tiny_wan), **{**SMALL, "num_inference_steps": 21}))
    shown: list[str] = []

    def show(html: str) -> None:
        time.sleep(0.3)
        shown.append(html)

    pipe = load(job)
    run(pipe, job, watch=Watch(look=Preview(pipe, show).look))
    assert len(shown) == 1


def test_long_and_large_clips_are_sent_small() -> None:
    moving = Image.open(io.BytesIO(animated(torch.rand(30, 3, 200, 400))))
    assert moving.size == (160, 80)
    assert moving.n_frames == 10
