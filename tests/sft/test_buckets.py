"""Sizes and frame counts of buckets, the choice for a file, resizing, and the frames of a clip."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.sft.buckets import (
    Bucket,
    Buckets,
    automatic_buckets,
    check_buckets,
    fitted,
    multiples_of,
    parsed_aspect,
    parsed_bucket,
)
from postgen.sft.clips import Clip, clips_of, read_clip
from postgen.sft.inspection import MediaInfo
from postgen.sft.items import Item
from postgen.sft.reader import buckets_of
from postgen.video import read_video
from tests.families.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.sft.media import picture, settings, tiny, video


def test_automatic_buckets_have_the_area_and_suit_the_model() -> None:
    aspects = [parsed_aspect(text) for text in ("16:9", "3:2", "1:1", "2:3", "9:16")]
    made = automatic_buckets(480, 832, [33, 17], aspects, (16, 16, 4))
    assert {bucket.num_frames for bucket in made} == {33, 17, 1}
    sizes = {(bucket.height, bucket.width) for bucket in made}
    assert (480, 832) in sizes
    assert len(sizes) == 5, "16:9 is 480 x 832"
    for height, width in sizes:
        assert height % 16 == 0
        assert width % 16 == 0
        assert 0.9 * 480 * 832 <= height * width <= 480 * 832
    for aspect in aspects:
        assert min(abs(math.log(width / height / aspect)) for height, width in sizes) < 0.05


@pytest.mark.parametrize("name", PIPELINES)
def test_buckets_suit_every_family(name: str) -> None:
    pipe, _ = tiny_pipeline(name)
    denoiser = denoiser_for(pipe)
    rows, columns, time = multiples_of(pipe, denoiser)
    counts = [1 + 2 * time, 1] if time else [1]
    made = automatic_buckets(4 * rows, 6 * columns, counts, [1.0, 2.0, 0.5], (rows, columns, time))
    square = name == "DiT"
    check_buckets([bucket for bucket in made if bucket.height == bucket.width or not square], pipe, denoiser)
    with pytest.raises(UserError, match=r"bucket 1x\d+x1 does not suit"):
        check_buckets([Bucket(1, columns, 1)], pipe, denoiser)


def test_the_nearest_bucket_is_chosen_by_aspect_then_by_frames() -> None:
    buckets = Buckets([Bucket(*size, n) for size in ((32, 64), (64, 32), (48, 48), (96, 96)) for n in (1, 5, 9)])
    assert buckets.nearest(100, 190, 20) == [Bucket(32, 64, 9), Bucket(32, 64, 5)]
    assert buckets.nearest(190, 100, 8) == [Bucket(64, 32, 5)]
    assert buckets.nearest(50, 50, 5)[0] == Bucket(96, 96, 5), "of equal aspects the larger one"
    assert buckets.nearest(50, 50, 1, image=True) == [Bucket(96, 96, 1)]
    assert buckets.nearest(50, 50, 4) == []
    assert buckets.shortest() == 5


def test_resizing_covers_the_bucket_and_crops_the_centre() -> None:
    frames = torch.zeros(2, 3, 40, 80)
    frames[..., 20:60] = 1.0  # the middle half
    assert torch.equal(fitted(frames, 40, 40), torch.ones(2, 3, 40, 40))
    assert fitted(frames, 32, 32).shape == (2, 3, 32, 32)
    assert float(fitted(frames, 32, 32).min()) > 0.9
    assert fitted(frames, 7, 50).shape == (2, 3, 7, 50)
    assert torch.equal(fitted(frames, 40, 80), frames)


@pytest.mark.parametrize("text", ["480x832", "0x32x5", "axbxc", "-1x2x3", "32x32x5x1", "", "9999999x1x1"])
def test_bad_buckets(text: str) -> None:
    with pytest.raises(UserError, match="HEIGHTxWIDTHxFRAMES"):
        parsed_bucket(text)


@pytest.mark.parametrize("text", ["16", "0:1", "1:0", "a:b", "100:1", "1:100", "-1:1", ""])
def test_bad_aspects(text: str) -> None:
    with pytest.raises(UserError, match="WIDTH:HEIGHT"):
        parsed_aspect(text)


def info(frames: int, fps: float = 16.0) -> MediaInfo:
    return MediaInfo("content", 32, 32, frames, fps)


def chosen(frames: int, fps: float = 16.0, **values: object) -> list[tuple[int, ...]] | str:
    config = settings("x", **values)
    buckets = Buckets(Bucket(32, 32, count) for count in [*config.frame_counts, 1])
    found = clips_of(Item("a", Path("a.mp4"), "video", "a"), info(frames, fps), buckets, config)
    return found if isinstance(found, str) else [clip.frames for clip in found]


def test_frames_of_a_clip() -> None:
    assert chosen(20) == [tuple(range(9))]
    assert chosen(7, frame_buckets=[5]) == [tuple(range(5))]
    assert chosen(25, frame_selection="uniform") == [(0, 3, 6, 9, 12, 15, 18, 21, 24)]
    assert chosen(9, frame_selection="uniform") == [tuple(range(9))]
    chunks = chosen(24, frame_selection="chunks", frame_buckets=[5])
    assert chunks == [tuple(range(9)), tuple(range(9, 18)), tuple(range(18, 23))]
    assert chosen(40, target_fps=8.0) == [tuple(range(0, 18, 2))]
    assert chosen(40, fps=24, target_fps=16.0) == [(0, 2, 3, 4, 6, 8, 9, 10, 12)]
    assert chosen(40, fps=15.5, target_fps=16.0, frame_selection="first") == [(0, 1, 2, 3, 4, 5, 6, 7, 8)]


def test_videos_without_a_bucket() -> None:
    assert "it has 8 frames, the shortest bucket has 9" in chosen(8)
    assert "it has 5 frames at 4 frames per second" in chosen(17, target_fps=4.0)
    assert "fewer than target_fps" in chosen(40, fps=8, target_fps=16.0)
    assert "not known" in chosen(40, fps=0, target_fps=16.0)
    assert "all buckets have one frame" in chosen(40, num_frames=1)


def test_clips_are_the_frames_of_the_file(tmp_path: Path) -> None:
    path = video(tmp_path / "a", 20, 32, 48)  # a folder of frames is read exactly
    item = Item("a", path, "video", "a")
    frames = (0, 3, 6, 9, 17)
    clip = read_clip(Clip(item, Bucket(32, 48, 5), frames, ""))
    assert torch.equal(clip, read_video(path)[list(frames)])
    assert read_clip(Clip(item, Bucket(16, 16, 5), frames, "")).shape == (5, 3, 16, 16)
    with pytest.raises(UserError, match="has become shorter"):
        read_clip(Clip(item, Bucket(32, 48, 2), (0, 20), ""))
    still = Item("b", picture(tmp_path / "b.png", 32, 48), "image", "b")
    assert read_clip(Clip(still, Bucket(32, 48, 1), (0,), "")).shape == (1, 3, 32, 48)


def test_the_model_refuses_other_sizes(tmp_path: Path) -> None:
    model = tiny()
    for values, message in (
        ({"height": 33}, "bucket 33x32x9 does not suit WanPipeline: height must be a multiple of 16"),
        ({"num_frames": 8}, "bucket 32x32x8 does not suit"),
        ({"buckets": ["32x40x5"]}, "bucket 32x40x5 does not suit"),
        ({"frame_buckets": [3]}, "bucket 32x32x3 does not suit"),
    ):
        with pytest.raises(UserError, match=message):
            buckets_of(settings("x", **values), *model)
