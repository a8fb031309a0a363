"""Long videos: reading only the requested frames, and contact sheets."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from postgen.video import Footage, TooLongError, VideoError, contact_sheet, footage, read_video, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return a video of 23 frames with different grey values."""
    path = tmp_path_factory.mktemp("footage") / "long.mp4"
    clip = torch.arange(23.0).view(23, 1, 1, 1).expand(23, 3, 16, 16) / 32
    write_video(path, clip, fps=8)
    return path


@pytest.fixture
def long(video, monkeypatch):
    monkeypatch.setattr(footage, "WINDOW", 5 * 16 * 16)
    return Footage(video)


def test_it_has_the_shape_of_its_clip(video, long):
    clip = read_video(video)
    assert (long.shape, len(long), long.numel(), long.ndim) == (clip.shape, len(clip), clip.numel(), clip.ndim)
    assert torch.equal(long.whole(), clip)
    assert torch.equal(long.frames([0, 4, 5, 22]), clip[[0, 4, 5, 22]])
    assert [len(part) for part in long.picked([0, 1, 8, 22])] == [2, 1, 1]


@pytest.mark.parametrize(
    ("overlap", "step"), [(0, 1), (1, 1), (2, 1), (7, 1), (0, 3), (1, 3), (2, 7), (1, 22), (1, 30)]
)
def test_windows_are_the_whole_clip(video, long, overlap, step):
    clip = read_video(video)[::step]
    windows = list(long.windows(overlap, step))
    assert torch.equal(torch.cat([windows[0], *(window[overlap:] for window in windows[1:])]), clip)
    for before, window in pairwise(windows):
        assert len(window) > overlap
        assert not overlap or torch.equal(window[:overlap], before[-overlap:])
    assert max(map(len, windows)) <= max(5, overlap + 1) + overlap or step > 1


def test_what_it_refuses(video, long):
    with pytest.raises(TooLongError, match="23 frames of 16x16 take 0 MiB, more than the 0 MiB allowed"):
        Footage(video, most=1000).whole()
    windows = long.windows()
    next(windows)
    long.closed = True
    with pytest.raises(VideoError, match="closed"):
        next(windows)
    assert "closed" in long.error


def test_a_file_that_changes_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, torch.rand(8, 3, 16, 16), fps=8)
    long = Footage(path)
    write_video(path, torch.rand(5, 3, 16, 16), fps=8)
    with pytest.raises(VideoError, match="had 8 frames and now has 5"):
        list(long.windows())


def shades(path, count):
    with Image.open(path) as picture:
        return [picture.getpixel((6 + 15 * column + 4, 6 + 15 + 4))[0] for column in range(count)]


def test_sheets_hold_what_they_show(tmp_path, monkeypatch):
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def frames(count):
        nonlocal alive, most
        for index in range(count):
            alive += 1
            most = max(most, alive)
            yield torch.full((3, 9, 9), index % 256, dtype=torch.uint8).as_subclass(Counted)

    assert shades(contact_sheet(frames(20), tmp_path / "a.png", limit=5), 5) == [0, 5, 10, 14, 19]
    drawn = shades(contact_sheet(frames(250), tmp_path / "b.png", limit=5), 5)
    assert (drawn[0], drawn[-1]) == (0, 249)
    assert drawn == pytest.approx([0, 62, 124, 187, 249], abs=8)
    assert most <= 4 * 5 + 4


def test_a_sheet_of_footage_is_that_of_its_clip(video, long, tmp_path):
    one = contact_sheet(long, tmp_path / "one.png", limit=6)
    assert one.read_bytes() == contact_sheet(read_video(video), tmp_path / "two.png", limit=6).read_bytes()
