"""Comments in video files."""

from pathlib import Path

import pytest
import torch

from postgen.video import VideoError, holds_comment, probe, read_comment, write_video

CLIP = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = [
    "plain",
    '{"a": "x=1;#y", "b": [1, 2]}',
    "two\nlines\n[STREAM]\n;c=d\n",
    "back\\slash\\",
    "é 漢 \U0001f3a5",
    "=;#",
]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_comment_comes_back_as_it_was(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_video(path, CLIP, fps=8, comment=text)
    assert read_comment(path) == text


def test_without_a_comment_there_is_none(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", CLIP, fps=8)
    write_video(tmp_path / "frames", CLIP, fps=8, format="frames")
    assert read_comment(tmp_path / "x.mp4") is None
    assert read_comment(tmp_path / "frames") is None


@pytest.mark.parametrize("kind", ["gif", "frames"])
def test_formats_without_comments_refuse_one(tmp_path: Path, kind: str) -> None:
    assert not holds_comment(kind, "x")
    with pytest.raises(VideoError, match="leave it out"):
        write_video(tmp_path / "x", CLIP, fps=8, format=kind, comment="x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_video_has_no_comment(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video at all")
    with pytest.raises(VideoError, match="cannot read"):
        read_comment(tmp_path / "x.mp4")


def test_a_file_of_too_many_pixels_is_refused_without_reading_on(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", CLIP, fps=8)
    assert probe(tmp_path / "x.mp4", most=3 * 256).frames == 3
    with pytest.raises(VideoError, match="more than 767 pixels"):
        probe(tmp_path / "x.mp4", most=3 * 256 - 1)
