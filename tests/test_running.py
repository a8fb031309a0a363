"""Observing the generation of a video, and stopping it early."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import UserError, read_video
from postgen.generate import Watch, generate_video, load, make_video, output_paths, prepare, run
from postgen.request import GenerateConfig
from postgen.video import read_comment, write_video

SMALL: dict[str, Any] = {"width": 32, "height": 16, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}


def job_of(folder: Path, **more: Any) -> Any:
    return prepare(GenerateConfig(prompt="a red ball", model=str(folder), seed=4, **{**SMALL, **more}))


def test_who_looks_on_sees_every_step_and_changes_nothing(tiny_wan: Path) -> None:
    job = job_of(tiny_wan)
    pipe = load(job)
    moments: list[Any] = []
    watch = Watch(look=moments.append)
    clip = run(pipe, job, watch=watch)
    assert torch.equal(clip, run(pipe, job))
    assert [(m.done, m.total) for m in moments] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert moments[0].before is None
    assert torch.equal(moments[1].before, moments[0].latents)
    assert watch.stopped_after is None
    assert torch.equal(watch.latents, moments[-1].latents)


def test_the_estimate_after_the_last_step_is_the_video(tiny_wan: Path) -> None:
    job = job_of(tiny_wan)
    seen: list[Any] = []
    watch = Watch(look=lambda moment: seen.append(moment.clean()))
    run(load(job), job, watch=watch)
    assert seen[0] is None
    torch.testing.assert_close(seen[-1], watch.latents)
    distances = [float((estimate - watch.latents).abs().mean()) for estimate in seen[1:]]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0


def test_ended_early_it_is_the_clean_estimate_decoded(tiny_wan: Path, tmp_path: Path) -> None:
    from postgen.families import denoiser_for

    job = job_of(tiny_wan)
    pipe = load(job)
    estimates: list[Any] = []
    watch = Watch(look=lambda moment: estimates.append(moment.clean()), early=lambda: len(estimates) >= 2)
    paths, kind = output_paths(tmp_path / "x.mp4")
    clip = make_video(pipe, job, paths, kind, watch=watch)
    assert watch.stopped_after == len(estimates) == 2
    with torch.no_grad():
        torch.testing.assert_close(clip, denoiser_for(pipe).decode(estimates[1])[0])
    note = json.loads(paths.sidecar.read_text())
    assert note["stopped_after"] == 2
    assert note["settings"]["num_inference_steps"] == 4
    assert len(read_video(paths.video)) == 5
    # The pipeline is unchanged afterwards.
    assert torch.equal(run(pipe, job), run(load(job), job))


def test_it_is_not_ended_where_no_estimate_is_known_yet(tiny_wan: Path) -> None:
    seen: list[int] = []
    watch = Watch(look=lambda moment: seen.append(moment.done), early=lambda: True)
    run(load(job := job_of(tiny_wan)), job, watch=watch)
    assert seen == [1, 2]
    assert watch.stopped_after == 2


def test_what_somebody_who_looks_on_raises_ends_the_call(tiny_wan: Path) -> None:
    def look(moment: Any) -> None:
        raise KeyError(moment.done)

    job = job_of(tiny_wan)
    pipe = load(job)
    with pytest.raises(KeyError, match="1"):
        run(pipe, job, watch=Watch(look=look))
    assert run(pipe, job).shape == (5, 3, 16, 32)


def test_a_video_carries_what_makes_it_again(tiny_wan: Path, tmp_path: Path) -> None:
    config = job_of(tiny_wan, num_inference_steps=1).config
    made = generate_video(config, tmp_path / "x.webm")
    carried = json.loads(read_comment(made.video) or "")
    assert carried["settings"] == json.loads(made.sidecar.read_text())["settings"] | {"model": tiny_wan.name}
    assert str(tmp_path) not in json.dumps(carried)
    assert str(tiny_wan.parent) not in json.dumps(carried)


def test_a_video_whose_settings_are_too_long_to_carry_is_made_without(tiny_wan: Path, tmp_path: Path) -> None:
    config = job_of(tiny_wan, num_inference_steps=1).config
    made = generate_video(dataclasses.replace(config, prompt="word " * 20_000), tmp_path / "x.mp4")
    assert read_comment(made.video) is None
    with pytest.raises(UserError, match="comment"):
        write_video(tmp_path / "y.mp4", torch.zeros(1, 3, 16, 16), fps=8, comment="x" * 70_000)
    assert not (tmp_path / "y.mp4").exists()
