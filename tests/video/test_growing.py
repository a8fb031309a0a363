"""A growing video is valid after every piece, and has the same bytes if several processes write it in turn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from postgen.video import GrowingVideo, VideoError, copy_video, probe, read_video
from tests.full_disk import files_of_at_most

RATE = 7.5


def pieces() -> list[Tensor]:
    """Return pieces of 1, 4 and 3 frames of 32 x 48 with different grey values."""
    greys = torch.linspace(0.1, 0.9, 8).view(8, 1, 1, 1).expand(8, 3, 32, 48)
    return list(greys.split([1, 4, 3]))


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_every_piece_leaves_a_whole_video(tmp_path: Path, name: str) -> None:
    video = GrowingVideo(tmp_path / name, fps=RATE, format=None if name == "a.mp4" else "frames")
    for number, piece in enumerate(pieces()):
        video.append(piece)
        shown = torch.cat(pieces()[: number + 1])
        info = probe(video.path)
        assert (info.frames, info.width, info.height) == (len(shown), 48, 32)
        assert info.frames == 1 or info.fps == pytest.approx(RATE)
        assert (read_video(video.path) - shown).abs().max() < 0.02


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_another_writer_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    words = {"fps": RATE, "format": None if name == "a.mp4" else "frames"}
    first, second, third = pieces()
    whole = GrowingVideo(tmp_path / f"whole-{name}", **words)  # type: ignore[arg-type]
    for piece in pieces():
        whole.append(piece)
    one = GrowingVideo(tmp_path / name, **words)  # type: ignore[arg-type]
    one.append(first)
    one.append(second)
    mark = one.mark
    one.append(third * 0)  # the process was killed before it stored the new mark
    if one.kind == "mp4":
        one.path.write_bytes(one.path.read_bytes()[:-7])
    copy_video(one.path, tmp_path / f"copy-{name}", mark)
    for path in (one.path, tmp_path / f"copy-{name}"):
        two = GrowingVideo(path, mark=mark, **words)  # type: ignore[arg-type]
        two.append(third)
        files = [[path] if path.is_file() else sorted(path.iterdir()) for path in (whole.path, two.path)]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert two.mark == whole.mark


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="a gif cannot be written piece by piece: choose mp4 or frames"):
        GrowingVideo(tmp_path / "a.gif", fps=8)
    video = GrowingVideo(tmp_path / "a.mp4", fps=8)
    with pytest.raises(VideoError, match="there is no frame"):
        video.append([])
    video.append(pieces()[0])
    before = video.path.read_bytes()
    with pytest.raises(VideoError, match="another size"):
        video.append(torch.zeros(2, 3, 64, 64))
    assert video.path.read_bytes() == before
    with pytest.raises(VideoError, match="not the video to continue"):
        GrowingVideo(tmp_path / "a.mp4", fps=8, mark=(9, 10**6, 0))


def test_an_append_that_fails_leaves_the_video_as_it_was(tmp_path: Path) -> None:
    """A full disk (simulated by a limit on file sizes), and a disk that has room again."""
    video = GrowingVideo(tmp_path / "a.mp4", fps=8)
    clip = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    video.append(clip)
    before, mark = read_video(video.path), video.mark
    # The limit allows the piece in the temporary folder, but not the growing video.
    with files_of_at_most(mark[1] + 100), pytest.raises(VideoError, match=r"cannot write .*a\.mp4: File too large"):
        video.append(clip[:1])
    assert (video.mark, video.path.stat().st_size) == (mark, mark[1])
    assert torch.equal(read_video(video.path), before)
    video.append(clip)
    assert probe(video.path).frames == 10


def test_a_video_that_was_written_over_does_not_go_on(tmp_path: Path) -> None:
    video = GrowingVideo(tmp_path / "a.mp4", fps=8)
    video.append(torch.zeros(3, 3, 16, 16))
    mark = video.mark
    other = GrowingVideo(tmp_path / "a.mp4", fps=8)
    other.append(torch.rand(30, 3, 16, 16))
    with pytest.raises(VideoError, match="its content has changed"):
        GrowingVideo(tmp_path / "a.mp4", fps=8, mark=mark)
    with pytest.raises(VideoError, match="its content has changed"):
        copy_video(tmp_path / "a.mp4", tmp_path / "b.mp4", mark)
    os.truncate(tmp_path / "a.mp4", 2000)
    with pytest.raises(VideoError, match="was changed by another program"):
        other.append(torch.rand(3, 3, 16, 16))


def test_a_video_is_cut_back(tmp_path: Path) -> None:
    for name in ("a.mp4", "a"):
        video = GrowingVideo(tmp_path / name, fps=8, format=None if name == "a.mp4" else "frames")
        empty = video.mark
        video.append(torch.zeros(3, 3, 16, 16))
        mark = video.mark
        video.append(torch.rand(3, 3, 16, 16))
        video.cut(mark)
        assert (video.mark, probe(video.path).frames) == (mark, 3)
        video.cut(empty)
        assert not video.path.exists()


def test_more_than_99999_pictures_stay_in_their_order(tmp_path: Path) -> None:
    """Names with one more digit must not be sorted first, or be taken for leftovers of a killed process."""
    video = GrowingVideo(tmp_path / "a", fps=8, format="frames")
    video.append(torch.zeros(1, 3, 16, 16))
    last = tmp_path / "a" / "frame_99999.png"
    (tmp_path / "a" / "frame_00000.png").rename(last)
    video.frames = 100_000
    for grey in (0.4, 0.6):
        video.append(torch.full((1, 3, 16, 16), grey))
    assert last.is_file()
    assert read_video(tmp_path / "a")[:, 0, 0, 0].tolist() == pytest.approx([0, 0.4, 0.6], abs=0.01)
