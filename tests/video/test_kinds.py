"""Videos are read as a player shows them: pixel formats, transparency, shape, rotation, covers, range."""

import os
import re
import signal

import pytest
import torch

import postgen.video.ffmpeg
from postgen.errors import UserError
from postgen.video import VideoError, iter_video, probe, read_video, write_video
from tests.test_video import children, ramp
from tests.video.making import COLOUR, FLAT, colour, ffmpeg, make

X265 = ("-c:v", "libx265", "-x265-params", "log-level=none")
KINDS = [
    ("mp4", "yuv420p10le", ("-c:v", "libx264")),
    ("mp4", "yuv422p10le", ("-c:v", "libx264")),
    ("mp4", "yuv444p", ("-c:v", "libx264")),
    ("mp4", "yuvj420p", ("-c:v", "libx264")),
    ("mp4", "yuv420p10le", X265),
    ("mp4", "yuv422p12le", X265),
    ("mp4", "gbrp10le", X265),
    ("mov", "yuv422p10le", ("-c:v", "prores_ks")),
    ("mov", "yuva444p10le", ("-c:v", "prores_ks")),
    ("webm", "yuv420p10le", ("-c:v", "libvpx-vp9", "-cpu-used", "8")),
    ("mkv", "gbrp16le", ("-c:v", "ffv1")),
    ("mkv", "yuva444p16le", ("-c:v", "ffv1")),
    ("mov", "rgb48le", ("-c:v", "png")),
]


@pytest.mark.parametrize(("suffix", "pixels", "coding"), KINDS, ids=lambda value: value if "," not in value else "")
def test_any_pixel_format_becomes_eight_bits(tmp_path, suffix, pixels, coding):
    matrix = "rgb" if pixels.startswith(("gbr", "rgb")) else "bt709"
    path = make(
        tmp_path / f"a.{suffix}", *coding, "-colorspace", matrix, "-frames:v", "3", source=f"{FLAT},format={pixels}"
    )
    clip = read_video(path)
    assert clip.shape == (3, 3, 16, 32)
    assert torch.equal(read_video(path, count=1), clip[:1])
    wrong = (clip * 255 - torch.tensor(COLOUR).view(3, 1, 1)).abs().max()
    assert wrong <= 2, colour(clip)


@pytest.mark.parametrize("pixels", ["gray", "gray10le"])
def test_grey_of_any_depth(tmp_path, pixels):
    source = f"color=c=0x808080:s=32x16:r=10:d=0.2,format=gray,format={pixels}"
    clip = read_video(make(tmp_path / "a.mp4", "-c:v", "libx264", source=source))
    assert all(abs(value - 128) <= 1 for value in colour(clip))


def test_ten_bit_video_of_moving_pictures(tmp_path):
    path = make(tmp_path / "ten.mp4", "-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv444p10le")
    eight = make(tmp_path / "eight.mkv", "-c:v", "ffv1", "-pix_fmt", "yuv444p16le")
    assert probe(path).frames == len(read_video(path)) == 20
    assert (read_video(path) - read_video(eight)).abs().max() <= 2 / 255


def test_transparent_video_lies_on_white(tmp_path):
    source = "color=red@0.5:s=32x16:r=10:d=0.3,format={}"
    webm = ("-c:v", "libvpx-vp9", "-auto-alt-ref", "0", "-cpu-used", "8")
    for name, pixels, coding in (("a.webm", "yuva420p", webm), ("a.mov", "argb", ("-c:v", "qtrle"))):
        red, green, blue = colour(read_video(make(tmp_path / name, *coding, source=source.format(pixels))))
        assert red >= 252
        assert all(abs(value - 128) <= 2 for value in (green, blue)), name


def test_pixels_that_are_not_square_are_stretched_as_players_do(tmp_path):
    path = make(tmp_path / "a.mp4", source="testsrc2=s=48x32:r=10:d=0.3,setsar=4/3")
    assert (probe(path).width, probe(path).height) == (64, 32)
    assert read_video(path).shape == (3, 3, 32, 64)
    assert probe(path, square=False).width == 48
    stored = read_video(path, square=False)
    assert stored.shape == (3, 3, 32, 48)
    wide = torch.nn.functional.interpolate(stored, size=(32, 64), mode="bicubic", align_corners=False)
    assert (wide.clamp(0, 1) - read_video(path)).abs().mean() < 0.02


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_video_is_turned_as_it_says(tmp_path, angle):
    plain = make(tmp_path / "plain.mp4", "-frames:v", "2", source="testsrc2=s=48x32:r=10:d=1")
    ffmpeg("-display_rotation", angle, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    turned, upright = read_video(tmp_path / "turned.mp4"), read_video(plain)
    assert (probe(tmp_path / "turned.mp4").height, probe(tmp_path / "turned.mp4").width) == turned.shape[2:]
    # The display matrix counts counterclockwise. Chroma is rotated before it is upsampled, so values are rounded.
    assert (turned - torch.rot90(upright, angle // 90, (2, 3))).abs().mean() < 0.02


def test_cover_is_not_the_video(tmp_path):
    cover = make(tmp_path / "cover.png", "-frames:v", "1", source="color=blue:s=16x16")
    film = make(tmp_path / "film.mp4")
    both = ("-i", cover, "-i", film, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg(*both, tmp_path / "both.mp4")
    assert torch.equal(read_video(tmp_path / "both.mp4"), read_video(film))
    assert probe(tmp_path / "both.mp4") == probe(film)
    sound = ("-f", "lavfi", "-i", "sine=d=0.2", "-i", cover, "-map", "0", "-map", "1", "-c:v", "copy")
    ffmpeg(*sound, "-disposition:v:0", "attached_pic", tmp_path / "song.m4a")
    for action in (probe, read_video):
        with pytest.raises(VideoError, match="matches no streams"):
            action(tmp_path / "song.m4a")


@pytest.mark.parametrize("curve", ["arib-std-b67", "smpte2084"])
def test_high_dynamic_range_is_brought_down(tmp_path, curve):
    # Code of diffuse white, 203 cd/m2 (ITU-R BT.2408): 75 % of HLG, 58 % of PQ. Unconverted codes look grey.
    code = {"arib-std-b67": 0xBF, "smpte2084": 0x94}[curve]
    source = f"color=c=0x{code:02x}{code:02x}{code:02x}:s=32x16:r=10:d=0.2,format=gbrp,scale=out_color_matrix=bt2020"
    tags = f"log-level=none:transfer={curve}:colorprim=bt2020:colormatrix=bt2020nc"
    path = make(tmp_path / "a.mp4", "-c:v", "libx265", "-x265-params", tags, source=f"{source},format=yuv420p10le")
    red, green, blue = colour(read_video(path))
    assert max(red, green, blue) - min(red, green, blue) <= 2
    assert 205 <= green <= 235


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "frames"])
def test_flat_colours_come_back_and_the_tenth_copy_is_the_first(tmp_path, kind):
    squares = [COLOUR, (255, 0, 0), (10, 200, 90), (250, 250, 3)]
    clips = [torch.tensor(value, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 18, 34) for value in squares]
    clips[1] = clips[1][..., :17, :33]  # chroma of odd sizes is stored differently in mp4
    path = tmp_path / ("a" if kind == "frames" else f"a.{kind}")
    for clip in clips:
        copies = [clip.float() / 255]
        for _ in range(10 if clip is clips[0] else 3):
            write_video(path, copies[-1], fps=8, format=kind)
            copies.append(read_video(path))
        assert (copies[1] - copies[0]).abs().max() <= 2.01 / 255
        assert torch.equal(copies[-1], copies[1])


def test_ten_copies_keep_the_levels_of_a_picture(tmp_path):
    clip = first = 0.2 + 0.6 * ramp(3, 32, 48)  # inside the range of BT.709, which clips values at its ends
    for number in range(10):
        write_video(tmp_path / "a.mp4", clip, fps=8)
        clip = read_video(tmp_path / "a.mp4")
        first = clip if number == 0 else first
    assert (clip - first).mean(dim=(0, 2, 3)).abs().max() < 0.5 / 255


def test_reader_that_stops_early_ends_its_ffmpeg(tmp_path):
    path, before = make(tmp_path / "a.mp4", source="testsrc2=s=64x64:r=10:d=20"), children()
    assert len(read_video(path, count=1)) == 1
    assert children() == before
    for _ in iter_video(path, chunk=1):
        break
    assert children() == before


def test_stalled_decoder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(postgen.video.ffmpeg, "PATIENCE", 0.5)
    path, before = make(tmp_path / "a.mp4", source="testsrc2=s=256x256:r=10:d=20"), children()
    clips = iter_video(path, chunk=1)
    next(clips)
    (decoder,) = children() - before
    os.kill(decoder, signal.SIGSTOP)
    with pytest.raises(VideoError, match=re.escape(f"cannot read {path}: ffmpeg produced no output for 0.5 seconds")):
        list(clips)
    assert children() == before


def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    for action in (probe, read_video):
        with pytest.raises(VideoError, match="not a regular file"):
            action(tmp_path / "a.mp4")


def test_no_ffmpeg_is_one_line(tmp_path, monkeypatch):
    film = make(tmp_path / "a.mp4")
    for program, message in ((tmp_path / "none", "cannot start"), (None, "install imageio-ffmpeg")):
        without_ffmpeg(monkeypatch, program)
        for action in (probe, read_video):
            with pytest.raises(UserError, match=message):
                action(film)
        with pytest.raises(UserError, match=message):
            write_video(tmp_path / "b.mp4", ramp(2), fps=8)
    assert write_video(tmp_path / "c", ramp(2), fps=8, format="frames").frames == 2


def without_ffmpeg(monkeypatch, program=None):
    """Make imageio-ffmpeg find `program`, or no ffmpeg, as on a machine without one."""

    def get_ffmpeg_exe():
        if program is None:
            raise RuntimeError("No ffmpeg exe could be found.")
        return str(program)

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", get_ffmpeg_exe)
