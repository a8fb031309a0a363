"""Long videos on the command line: complete after every chunk, and continued by another process bit by bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import probe, read_video
from postgen.errors import UserError
from postgen.generate_long import LongRequest, LongVideo, load_long, places_of, prepare_long, read_schedule
from postgen.pipelines.worldweaver import WorldWeaverPipeline
from postgen.request import GenerateConfig
from postgen.worldweaver.adapter import save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.widen import widen_transformer
from tests.children import Child

SMALL = ["--size", "32x32", "--steps", "6", "--fps", "8", "--guidance", "1"]


@pytest.fixture(scope="module")
def adapter(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter with depth for the tiny model, with groups of two latent frames."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    pipe = WanPipeline.from_pretrained(tiny_wan)
    widen_transformer(pipe, ("depth",))
    settings = {"causal_block_size": 2, "num_inference_steps": 6, "ar_step": 2, "history_sizes": [3, 2]}
    save_adapter(pipe, folder, LevelEmbedder.for_transformer(pipe), settings=settings)
    return folder


def test_a_long_video_and_its_depth_go_on(cli: Any, tiny_wan: Path, adapter: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "a.mp4", ["--model", tiny_wan, "--adapter", adapter, "--depth", *SMALL]
    done = cli("generate", "a ball", "--prompts", "24:a cube", "--long", "4", "-o", out, *words)
    assert done.code == 0, done.err
    assert "(33 frames, 4.1 s)" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-depth.mp4", "a.mp4", "a.png", "a.state"]
    assert probe(out).frames == probe(tmp_path / "a-depth.mp4").frames == 33
    depth = read_video(tmp_path / "a-depth.mp4")
    assert (depth - depth.mean(1, keepdim=True)).abs().max() < 0.03  # grey
    assert cli("generate", "--continue", tmp_path / "a.state").code == 2
    other = tmp_path / "c.mp4"
    more = cli("generate", "--continue", tmp_path / "a.state", "-o", other, "--long", "6", "--seed", "9", "a cone")
    assert more.code == 0, more.err
    assert probe(other).frames == probe(tmp_path / "c-depth.mp4").frames == 49
    assert torch.equal(read_video(other, count=33), read_video(out))
    assert probe(out).frames == 33


def request_of(model: Path, **words: Any) -> LongRequest:
    config = GenerateConfig(
        prompt="a ball", model=str(model), width=32, height=32, num_inference_steps=6, guidance_scale=1.0, fps=8
    )
    given = {"schedule": ((0, "a ball"),), "seconds": 5.0, "adapter": None, "depth": False} | words
    return LongRequest(config=config, **given)


def begun(request: LongRequest, output: Path) -> LongVideo:
    job = prepare_long(request)
    return LongVideo(load_long(request, job), request, job, places_of(output, None, request))


def test_whoever_is_killed_loses_the_chunk_in_flight(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    """A process is killed, and this process continues: the bytes are those of an uninterrupted video."""
    whole = begun(request_of(tiny_wan), tmp_path / "whole.mp4")
    whole.make(lambda done, total: None)
    words = ["generate", "a ball", "--long", "5", "-o", "cut.mp4", "--model", str(tiny_wan), *SMALL]
    process = Child("postgen", words, folder=tmp_path)
    state, ends = tmp_path / "cut.state" / "state.json", time.monotonic() + 120
    while not state.is_file() and process.code is None and time.monotonic() < ends:
        time.sleep(0.005)
    assert process.kill() == -signal.SIGKILL, process.said()
    assert state.is_file()
    assert 1 <= probe(tmp_path / "cut.mp4").frames < 41
    done = cli("generate", "--continue", tmp_path / "cut.state")
    assert done.code == 0, done.err
    assert (tmp_path / "cut.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


def test_an_interrupt_leaves_a_video_and_says_how_it_goes_on(tiny_wan: Path, tmp_path: Path) -> None:
    video = begun(request_of(tiny_wan, seconds=None), tmp_path / "a.mp4")
    assert video.standing().startswith("the first chunk was not finished, and nothing was written")

    def stop(done: int, total: int | None) -> None:
        assert total is None
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.make(stop)
    told = video.standing()
    assert f"{probe(tmp_path / 'a.mp4').frames} frames" in told
    assert told.endswith(f"postgen generate --continue {tmp_path / 'a.state'}")


def test_a_picture_begins(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "first.png")
    words = ["--image", tmp_path / "first.png", "--format", "frames", "--model", tiny_wan, *SMALL]
    done = cli("generate", "a ball", "--long", "2", "-o", tmp_path / "a", *words)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "a").glob("frame_*.png"))) == 17
    assert "no adapter for" in done.err


def test_the_lora_of_an_adapter_is_merged(tiny_wan: Path, tmp_path: Path) -> None:
    """The frames equal those with an unmerged LoRA, up to rounding."""
    from diffusers import WanPipeline
    from peft import LoraConfig

    base = WanPipeline.from_pretrained(tiny_wan)
    widen_transformer(base, ("depth",))
    base.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_adapter(base, tmp_path / "adapter", LevelEmbedder.for_transformer(base))
    request = request_of(tiny_wan, adapter=str(tmp_path / "adapter"))
    merged = load_long(request, prepare_long(request))
    assert not getattr(merged.transformer, "peft_config", None)
    beside = WorldWeaverPipeline.from_pipe(WanPipeline.from_pretrained(tiny_wan), tmp_path / "adapter")
    stock = WorldWeaverPipeline.from_pipe(WanPipeline.from_pretrained(tiny_wan))
    words = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0}
    frames = [
        torch.from_numpy(each("a", generator=torch.Generator().manual_seed(1), **words).frames)
        for each in (merged, beside, stock)
    ]
    torch.testing.assert_close(frames[0], frames[1], rtol=0, atol=1e-5)
    assert not torch.allclose(frames[0], frames[2], rtol=0, atol=1e-3)


def test_schedules(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("# frames of the video\n0: a ball\n\n40:a cube: red\n")
    expected = ((0, "a ball"), (40, "a cube: red"))
    assert read_schedule([str(tmp_path / "s.txt")], None) == expected
    assert read_schedule(["0:a ball", "40: a cube: red"], None) == expected
    assert read_schedule(["40:a cube: red"], "a ball") == expected
    (tmp_path / "s.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_schedule([str(tmp_path / "s.txt")], None)


def test_a_state_of_a_program_is_refused(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    video = begun(request_of(tiny_wan, seconds=1.0), tmp_path / "a.mp4")
    chunk = next(video.pipe.stream("a", height=32, width=32, guidance_scale=1.0, num_inference_steps=3))
    chunk.state.save(tmp_path / "mine")
    assert "was not made by postgen generate" in cli("generate", "--continue", tmp_path / "mine").err
    video.make(lambda done, total: None)
    behind = cli("generate", "--continue", tmp_path / "a.state", "--long", "0.5").err
    assert "--long 0.5 is too short: 9 frames (1.1 s)" in behind
    assert f"the state, as {tmp_path / 'a.state'}" in cli("generate", "--continue", tmp_path / "a.mp4").err
    os.truncate(tmp_path / "a.mp4", 100)
    done = cli("generate", "--continue", tmp_path / "a.state", "--long", "3")
    assert (done.code, "is not the video to continue" in done.err) == (2, True)
