"""Truncated and damaged files are errors in every container; complete files of other programs are not."""

import itertools
import random
import subprocess

import imageio_ffmpeg
import pytest

from postgen.video import VideoError, probe, read_video, write_video
from postgen.video.containers import check_whole
from tests.test_video import ramp
from tests.video.making import MOVING, ffmpeg, make

VP9 = ("-c:v", "libvpx-vp9", "-cpu-used", "8")
H264 = ("-c:v", "libx264")
CODINGS = {
    "webm": VP9,
    "gif": (),
    "mkv": H264,
    "ts": H264,
    "m2ts": H264,
    "ogv": ("-c:v", "libtheora"),
    "avi": ("-c:v", "mpeg4"),
    "mov": H264,
    "mp4": (*H264, "-movflags", "+faststart"),
    "flv": H264,
    "asf": ("-c:v", "wmv2"),
    "ivf": VP9,
    "mpg": ("-c:v", "mpeg2video", "-r", "25"),
    "nut": H264,
    "apng": (),
}
# Streams of packets have no end mark: a cut between two packets leaves a valid, shorter file.
PACKETS = {"ts": 188, "m2ts": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def films(folder):
    """Return a video of 20 frames (50 for mpg) in each container."""
    return {suffix: make(folder / f"whole.{suffix}", *coding) for suffix, coding in CODINGS.items()}


@pytest.mark.parametrize("suffix", CODINGS)
def test_a_cut_file_is_an_error_and_the_whole_one_is_not(films, tmp_path, suffix):
    data = films[suffix].read_bytes()
    assert probe(films[suffix]).frames == len(read_video(films[suffix])) == (50 if suffix == "mpg" else 20)
    cut = tmp_path / f"cut.{suffix}"
    for share in (0.5, 0.8, 0.95, 0.99):
        length = int(len(data) * share)
        cut.write_bytes(data[: length + (length % PACKETS.get(suffix, 1) == 0 and suffix in PACKETS)])
        for action in (probe, read_video):
            with pytest.raises(VideoError, match=f"cannot read .*cut.{suffix} as a video"):
                action(cut)


@pytest.mark.parametrize("suffix", [suffix for suffix in CODINGS if suffix not in ("ts", "m2ts", "mpg", "ivf")])
def test_every_cut_is_seen_in_the_sizes(films, tmp_path, suffix):
    data, cut = films[suffix].read_bytes(), tmp_path / f"cut.{suffix}"
    check_whole(films[suffix])
    for length in random.Random(0).sample(range(1024, len(data)), 100):
        cut.write_bytes(data[:length])
        with pytest.raises(VideoError, match="cut or damaged"):
            check_whole(cut)


@pytest.mark.parametrize("suffix", ["webm", "gif", "mkv", "ts", "ogv", "flv", "apng"])
def test_a_hole_is_never_a_shorter_video(films, tmp_path, suffix):
    data, generator = films[suffix].read_bytes(), random.Random(1)
    errors = 0
    for _ in range(4):
        start = generator.randrange(len(data) // 4, len(data) - 1100)
        (tmp_path / f"hole.{suffix}").write_bytes(data[:start] + bytes(1000) + data[start + 1000 :])
        try:
            assert probe(tmp_path / f"hole.{suffix}").frames == 20  # the hole is inside the data of a frame
        except VideoError:
            errors += 1
    assert errors


def test_a_hole_between_the_frames_of_an_avi(films, tmp_path):
    data = films["avi"].read_bytes()
    start = data.index(b"00dc", data.index(b"movi") + 100)  # header of the second frame
    (tmp_path / "hole.avi").write_bytes(data[:start] + bytes(8) + data[start + 8 :])
    with pytest.raises(VideoError, match=f"no chunk starts at byte {start}"):
        probe(tmp_path / "hole.avi")


def test_live_files_that_do_not_know_their_length(films, tmp_path):
    pipes = {"mkv": ("matroska", H264), "webm": ("webm", VP9), "avi": ("avi", CODINGS["avi"]), "flv": ("flv", H264)}
    fragments = ("-movflags", "frag_keyframe+empty_moov", "-g", "5")
    for suffix, (container, coding) in {**pipes, "mp4": ("mp4", (*H264, *fragments))}.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", MOVING, *coding]
        data = subprocess.run([*command, "-f", container, "-"], check=True, capture_output=True).stdout
        live = tmp_path / f"live.{suffix}"
        live.write_bytes(data)
        assert probe(live).frames == 20
        live.write_bytes(data[: len(data) * 9 // 10])
        with pytest.raises(VideoError, match="as a video"):
            probe(live)


def test_live_webm_of_a_browser(films, tmp_path):
    # Browsers also write clusters with unknown length (all bits 1).
    data = films["webm"].read_bytes()
    segment, cluster = bytes.fromhex("18538067"), bytes.fromhex("1f43b675")
    start, at = data.index(segment) + 4, data.index(cluster) + 4
    width = 9 - data[at].bit_length()
    unknown = ((1 << 7 * width + 1) - 1).to_bytes(width)
    live = data[:start] + b"\x01" + b"\xff" * 7 + data[start + 8 : at] + unknown + data[at + width :]
    end = live.rindex(bytes.fromhex("1c53bb6b"))  # the index, which files of browsers do not have
    (tmp_path / "live.webm").write_bytes(live[:end])
    assert probe(tmp_path / "live.webm").frames == 20
    (tmp_path / "live.webm").write_bytes(live[: end - 5])
    with pytest.raises(VideoError, match="it ends early"):
        probe(tmp_path / "live.webm")


def test_frames_at_uneven_times_are_all_read(tmp_path):
    # Every third of 30 frames is missing, and one pause is a second long.
    uneven = "testsrc2=s=32x32:r=10:d=3,select=mod(n\\,3),setpts='PTS+gt(N,9)/TB'"
    for suffix in ("mp4", "mkv", "webm", "mov", "gif", "flv", "ts", "nut"):
        path = make(tmp_path / f"a.{suffix}", *CODINGS[suffix], "-fps_mode", "vfr", source=uneven)
        assert probe(path).frames == len(read_video(path)) == 20, suffix


def test_whole_files_of_many_settings(films, tmp_path):
    sound = ("-f", "lavfi", "-i", "sine=d=2", "-map", "0", "-map", "1", "-c:v", "copy")
    for suffix in ("mp4", "mkv", "ts", "avi", "mov", "flv", "asf", "webm", "mpg"):
        ffmpeg("-i", films[suffix], *sound, tmp_path / f"sound.{suffix}")
        assert probe(tmp_path / f"sound.{suffix}").frames == probe(films[suffix]).frames, suffix
    for flags in ("frag_keyframe+empty_moov", "frag_keyframe+dash", "frag_every_frame", "rtphint"):
        ffmpeg("-i", films["mkv"], "-c", "copy", "-movflags", flags, tmp_path / "a.mp4")
        assert probe(tmp_path / "a.mp4").frames == 20, flags


def test_what_hangs_on_behind_is_not_the_video(films, tmp_path):
    for suffix, tail in itertools.product(("mp4", "mkv", "gif", "avi"), (bytes(7), b"a note of another program")):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(films[suffix].read_bytes() + tail)
        check_whole(path)


def test_ours_are_whole(tmp_path):
    for suffix in ("mp4", "webm", "gif"):
        write_video(tmp_path / f"a.{suffix}", ramp(3, 33, 47), fps=8)
        check_whole(tmp_path / f"a.{suffix}")
