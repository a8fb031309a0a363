"""Without ffmpeg, a run writes its samples as PNG sheets and warns once."""

import sys
import warnings

import pytest
import torch
from PIL import Image

from postgen.training.samples import _say_once, write_clip
from tests.grpo.test_lora import video_run
from tests.video.test_kinds import without_ffmpeg


@pytest.fixture
def no_ffmpeg(monkeypatch):
    without_ffmpeg(monkeypatch)
    _say_once.cache_clear()


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    _say_once.cache_clear()


def test_a_run_goes_on_with_sheets(tiny_wan, tmp_path, no_ffmpeg):
    run = video_run(tiny_wan, tmp_path, eval_steps=2, log_completions=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.train()
    told = [str(warning.message) for warning in said if "PNG sheets" in str(warning.message)]
    assert len(told) == 1
    assert "install imageio-ffmpeg" in told[0]
    written = sorted(path.name for path in (tmp_path / "run").glob("*/step-*") if path.suffix != ".jsonl")
    assert {path[-4:] for path in written} == {".png"}
    assert "step-000002.png" in written
    assert "step-000000-0.png" in written


def test_sheet_of_a_clip_shows_every_frame(tmp_path, no_ffmpeg):
    with pytest.warns(UserWarning, match="PNG sheets"):
        write_clip(tmp_path / "a", torch.ones(8, 3, 16, 16) * torch.linspace(0, 1, 8).view(8, 1, 1, 1), 8)
    colours = Image.open(tmp_path / "a.png").getcolors(10_000)
    shades = {round(255 * index / 7) for index in range(8)}
    assert shades <= {colour[0] for count, colour in colours if count >= 256 and len(set(colour)) == 1}


def test_generate_says_it_before_any_frame(tmp_path, cli, no_ffmpeg):
    told = cli("generate", "a ball", "-o", tmp_path / "a.mp4")
    assert told.code != 0
    assert "install imageio-ffmpeg" in told.err
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_the_same(tmp_path, cli, no_package):
    with pytest.warns(UserWarning, match="PNG sheets"):
        write_clip(tmp_path / "a", torch.ones(4, 3, 16, 16), 8)
    told = cli("generate", "a ball", "-o", tmp_path / "a.mp4")
    assert told.code != 0
    assert "install imageio-ffmpeg" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
