"""`postgen score`: rows as they come, going on where it stopped, pictures, long videos, and files that are none."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from postgen import world, write_video
from postgen.rewards import scoring
from postgen.rewards.table import Table

SEEN = []
OWN = f"{__name__}.level"


def level(completions):
    """Notes how many frames the clips have, and fails for a black one."""
    SEEN.extend(len(clip) for clip in completions)
    values = [float(clip.mean()) for clip in completions]
    if min(values) == 0:
        raise RuntimeError("too dark")
    return values


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five videos of 2 to 6 frames."""
    monkeypatch.setattr(scoring, "_MOST_CLIPS", {"cpu": 1})
    for number in range(5):
        write_video(tmp_path / "in" / f"{number}.webm", torch.full((number + 2, 3, 16, 16), 0.5), fps=8)
    SEEN.clear()
    return tmp_path / "in"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_same_command_goes_on_where_it_stopped(cli, folder, tmp_path, suffix):
    out = tmp_path / f"t.{suffix}"
    words = ["score", folder, "--reward", OWN, "--prompt", 'a "b"\nc', "-o", out]
    assert cli(*words).code == 0
    whole = out.read_bytes()
    assert SEEN == [2, 3, 4, 5, 6]
    again = cli(*words)
    assert (again.code, SEEN[5:]) == (0, [])
    assert "5 of 5 rows are already in" in again.err
    assert again.out.count("0.5") == 6
    # Killed in the middle of a row; nothing but that row is lost.
    out.write_bytes(whole[: whole.rfind(b"webm") + 30])
    assert cli(*words).code == 0
    assert (SEEN[5:], out.read_bytes()) == ([6], whole)
    # A row between others is missing: it comes to its place.
    lines = whole.split(b"\n") if suffix == "jsonl" else whole.split(b"\r\n")
    out.write_bytes(b"\n".join(lines[:1] + lines[2:]))
    assert cli(*words).code == 0
    assert (SEEN[6:], out.read_bytes()) == ([3] if suffix == "jsonl" else [2], whole)


def test_what_has_changed_is_scored_anew(cli, folder, tmp_path):
    out = tmp_path / "t.jsonl"

    def scored(*more):
        SEEN.clear()
        assert cli("score", folder, "-o", out, *(more or ("--reward", OWN))).code == 0
        return SEEN[:]

    assert scored() == [2, 3, 4, 5, 6]
    write_video(folder / "1.webm", torch.full((9, 3, 16, 16), 0.25), fps=8)
    assert scored() == [9]
    (folder / "2.json").write_text(json.dumps({"prompt": "now it has one"}))
    assert scored() == [4]
    assert scored("--reward", f"{OWN},brightness_band") == [2, 9, 4, 5, 6]
    assert scored("--reward", f"{OWN},brightness_band", "--weights", "2,1") == []
    assert rows(out)[0]["sum"] == pytest.approx(2 * rows(out)[0]["level"] + rows(out)[0]["brightness_band"])
    (folder / "0.webm").unlink()
    assert scored("--reward", f"{OWN},brightness_band") == []
    assert [Path(row["file"]).name for row in rows(out)] == [f"{k}.webm" for k in range(1, 5)]


def test_rows_are_there_when_it_is_stopped(cli, folder, tmp_path, monkeypatch):
    out = tmp_path / "t.jsonl"
    written = Table.add

    def stop(self, clip):
        written(self, clip)
        if clip.path.stem == "2":
            raise KeyboardInterrupt

    monkeypatch.setattr(Table, "add", stop)
    assert cli("score", folder, "--reward", OWN, "-o", out).code == 130
    assert [row["level"] for row in rows(out)] == pytest.approx([0.5] * 3, abs=0.01)
    monkeypatch.setattr(Table, "add", written)
    assert cli("score", folder, "--reward", OWN, "-o", out).code == 0
    assert (SEEN, len(rows(out))) == ([2, 3, 4, 5, 6], 5)


def test_no_bad_file_ends_the_others(cli, folder, tmp_path):
    Image.new("RGB", (16, 16), "white").save(folder / "picture.mp4", format="PNG")
    (folder / "empty.mp4").touch()
    (folder / "text.avi").write_text("no video")
    (folder / "folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to("nowhere")
    write_video(folder / "9dark.webm", torch.zeros(4, 3, 16, 16), fps=8)
    out = tmp_path / "t.jsonl"
    done = cli("score", folder, "--reward", f"{OWN},brightness_band", "-o", out)
    assert done.code == 1
    assert "postgen: 5 of 11 scored, 6 failed" in done.err.splitlines()
    assert "Traceback" not in done.err
    table = {Path(row["file"]).name: row for row in rows(out)}
    assert sum(row["error"] is None for row in table.values()) == 5
    assert table["9dark.webm"]["error"] == "level: RuntimeError: too dark"
    assert table["9dark.webm"]["brightness_band"] == 0
    for name in ("picture.mp4", "empty.mp4", "text.avi", "folder.mp4", "gone.mp4"):
        assert table[name]["error"]
        assert table[name]["level"] is None
    # What failed is tried again, the rest stays.
    SEEN.clear()
    assert cli("score", folder, "--reward", f"{OWN},brightness_band", "-o", out).code == 1
    assert SEEN == [4]


def test_pictures_are_stills_or_frames(cli, tmp_path):
    for number, kind in enumerate(("png", "jpg", "webp", "bmp")):
        place = tmp_path / "in" / f"{number}.{kind}"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (50 * number + 50,) * 3).save(place)
    out = tmp_path / "t.jsonl"
    SEEN.clear()
    done = cli("score", tmp_path / "in", "--reward", OWN, "-o", out)
    assert (done.code, SEEN) == (0, [1, 1, 1, 1])
    assert "4 images are scored one by one (as one clip with --frames)" in done.err
    assert [row["level"] for row in rows(out)] == pytest.approx([k * 50 / 255 for k in (1, 2, 3, 4)], abs=0.01)
    shutil.copytree(tmp_path / "in", tmp_path / "more" / "one", ignore=shutil.ignore_patterns("0.png"))
    shutil.copytree(tmp_path / "in", tmp_path / "more" / "two")
    SEEN.clear()
    assert cli("score", tmp_path / "more", "--frames", "--reward", OWN, "-o", out).code == 0
    assert SEEN == [3, 1]  # beside PNG pictures the others are no frames
    assert cli("score", tmp_path / "in" / "1.jpg", "--reward", OWN, "-o", out).code == 0
    assert rows(out)[0]["level"] == pytest.approx(100 / 255, abs=0.01)
    Image.new("RGB", (20, 16)).save(tmp_path / "more" / "two" / "5.png")
    done = cli("score", tmp_path / "more" / "two", "--frames", "--reward", OWN)
    assert done.code == 1
    assert "frame 1 is 20x16, the frames before it are 16x16" in done.err


def test_a_long_video_is_read_in_windows(cli, folder, tmp_path, monkeypatch):
    out = tmp_path / "t.jsonl"
    rewards = f"{OWN},brightness_band,motion_floor"
    assert cli("score", folder, "--reward", rewards, "-o", out).code == 0
    before = rows(out)
    monkeypatch.setattr(scoring, "_LONG", 12 * 16 * 16 * 4)
    out.unlink()
    done = cli("score", folder, "--reward", rewards, "-o", out, "--whole-mb", "0.016")
    assert done.code == 1
    assert "1 of 5 videos (4.webm): TooLongError: all frames are needed at once, and 6 frames of 16x16" in done.err
    for one, other in zip(before, rows(out), strict=True):
        assert one["brightness_band"] == pytest.approx(other["brightness_band"], abs=1e-6)
    assert [row["error"] is None for row in rows(out)] == [True] * 4 + [False]


def test_words_that_look_like_markup(cli, folder, tmp_path):
    done = cli("score", folder / "0.webm", "--reward", OWN, "--prompt", "a [/b] ball [red]")
    assert done.code == 0
    assert "a [/b]" in done.out


def test_the_output_is_no_input(cli, folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n' * 5)
    done = cli("score", folder, "--reward", OWN, "--prompts", prompts, "-o", prompts)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert rows(prompts) == [{"prompt": "a"}] * 5
    done = cli("score", folder, "--reward", OWN, "--whole-mb", "nan")
    assert (done.code, done.err) == (2, "postgen: error: --whole-mb must be above 0 and at most 1,048,576, got nan\n")


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.csv", "prompt,seed\na ball,3\n", "file"),
        ("a.csv", "file,prompt\n0.webm,a ball\n", "no_score"),
        ("a.csv", "my notes\n", "file"),
        ("a.jsonl", '{"prompt": "a", "file": "0.webm"}\n', "file"),
        ("a.jsonl", '{"file": 3, "key": "k"}\n{"a": 1}\n', "prompt"),
        ("a.jsonl", '[{"file": "0.webm"}]\n', "file"),
        ("a.jsonl", "my notes\n", "file"),
    ],
)
def test_a_file_that_is_no_table_is_not_replaced(cli, folder, tmp_path, name, content, column):
    place = tmp_path / name
    place.write_text(content)
    done = cli("score", folder, "--reward", OWN, "-o", place)
    message = (
        f"{place} exists and is not a table of `postgen score` (it has no column '{column}'): give another output"
    )
    assert (done.code, done.err) == (2, f"postgen: error: {message}\n")
    assert (place.read_text(), SEEN) == (content, [])


@pytest.mark.parametrize(("name", "content"), [("a.csv", "\n"), ("a.jsonl", '{"file": "0.we'), ("a.jsonl", "")])
def test_an_empty_or_torn_table_is_replaced(cli, folder, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert cli("score", folder, "--reward", OWN, "-o", tmp_path / name).code == 0
    assert len((tmp_path / name).read_text().splitlines()) == 5 + name.endswith("csv")


@pytest.mark.slow
def test_ctrl_c_ends_processes_of_the_judge_and_leaves_whole_rows(tmp_path):
    """With a time limit the judge is waited for in a thread, which Ctrl-C does not reach."""
    spec = world.sample(3, num_frames=9, num_bodies=1, camera="static")
    clip = world.render([spec], num_frames=9, size=64, geometry=False).rgb_BF3HW[0]
    write_video(tmp_path / "in" / "00.mp4", clip, fps=8)
    for number in range(1, 40):
        shutil.copy(tmp_path / "in" / "00.mp4", tmp_path / "in" / f"{number:02}.mp4")
    out = tmp_path / "t.jsonl"
    command = [sys.executable, "-m", "postgen", "score", str(tmp_path / "in"), "-o", str(out)]
    command += ["--reward", "world(workers=2)", "--prompt", "a red ball", "--timeout", "60"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while (not out.exists() or out.read_text().count("\n") < 2) and time.monotonic() < end:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, told = run.communicate(timeout=20)
    finally:
        run.kill()
    assert run.returncode == 130, told
    assert time.monotonic() - start < 10
    assert "Traceback" not in told
    assert len(rows(out)) >= 2
    assert out.read_text().endswith("\n")
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == run.pid]
    assert left == []


def _parent(pid):
    try:
        return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_csv_has_its_columns_from_the_start(cli, folder, tmp_path):
    (folder / "a.mp4").write_text("none")
    out = tmp_path / "t.csv"
    assert cli("score", folder / "a.mp4", "--reward", OWN, "-o", out).code == 1
    (row,) = csv.DictReader(out.open(newline=""))
    assert list(row) == ["file", "prompt", "level", "no_score", "error", "key"]


@pytest.mark.parametrize("value", ['"abc"', "1" + "0" * 400, "[1]", "true", "NaN", "1e999", '{"a": 1}'])
def test_a_cell_that_is_no_score_is_scored_anew(cli, folder, tmp_path, value):
    out = tmp_path / "t.jsonl"
    words = ["score", folder / "0.webm", folder / "1.webm", "--reward", OWN, "-o", out]
    assert cli(*words).code == 0
    whole = out.read_text()
    first = whole.splitlines()[0]
    out.write_text(whole.replace(f'"level": {rows(out)[0]["level"]}', f'"level": {value}', 1))
    assert out.read_text().splitlines()[0] != first
    SEEN.clear()
    done = cli(*words)
    assert (done.code, SEEN, out.read_text()) == (0, [2], whole)
    assert "1 of 2 rows are already in" in done.err


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_names_of_files_need_not_be_unicode(cli, folder, tmp_path, suffix):
    os.rename(os.fsencode(folder / "3.webm"), os.fsencode(folder) + b"/\xff.webm")
    out = tmp_path / f"t.{suffix}"
    for known in range(2):
        done = cli("score", folder, "--reward", OWN, "-o", out)
        assert (done.code, "\\udcff.webm" in done.out) == (0, True)
        assert ("5 of 5 rows are already in" in done.err) is bool(known)
        assert out.read_text(encoding="utf-8").count("\\udcff.webm") == 1


def test_a_second_call_does_not_write_to_the_table_of_another(cli, folder, tmp_path):
    out = tmp_path / "t.jsonl"
    with Table(out, [], ["level"]):
        before = out.stat().st_ino
        done = cli("score", folder, "--reward", OWN, "-o", out)
        assert (done.code, out.stat().st_ino, out.read_text()) == (2, before, "")
        assert f"another process is writing {out}" in done.err
    assert cli("score", folder, "--reward", OWN, "-o", out).code == 0
    assert len(rows(out)) == 5


def test_rows_for_files_of_one_name_are_told_apart_by_their_folders(cli, folder, tmp_path):
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        shutil.copy(folder / "0.webm", tmp_path / side / "1.webm")
    prompts, out = tmp_path / "p.jsonl", tmp_path / "t.jsonl"
    words = ["score", tmp_path / "before", tmp_path / "after", "--reward", OWN, "--prompts", prompts, "-o", out]
    told = [{"prompt": side, "file": f"{side}/1.webm"} for side in ("after", "before")]
    prompts.write_text("\n".join(map(json.dumps, told)))
    assert cli(*words).code == 0
    assert [row["prompt"] for row in rows(out)] == ["before", "after"]
    prompts.write_text("\n".join(json.dumps({**row, "file": "1.webm"}) for row in told))
    done = cli(*words)
    assert (done.code, "2 rows of the prompts have the file 1.webm" in done.err) == (2, True)
    prompts.write_text(json.dumps({**told[0], "file": "1.webm"}))  # one for both, as before
    assert cli(*words).code == 0
    assert [row["prompt"] for row in rows(out)] == ["after", "after"]


def test_a_sidecar_may_have_a_byte_order_mark_and_need_not_be_a_file(cli, folder, tmp_path):
    (folder / "0.json").write_bytes(b'\xef\xbb\xbf{"prompt": "a ball"}')
    os.mkfifo(folder / "1.json")
    (folder / "2.json").write_text('{"prompt": "\\ud800"}')
    assert cli("score", folder, "--reward", OWN, "-o", tmp_path / "t.jsonl").code == 0
    assert [row["prompt"] for row in rows(tmp_path / "t.jsonl")] == ["a ball"] + [None] * 4


def test_a_path_that_cannot_be_looked_at_is_one_line(cli):
    done = cli("score", "a" * 300, "--reward", OWN)
    assert (done.code, done.err.count("\n"), "File name too long" in done.err) == (2, 1, True)


@pytest.mark.parametrize("words", [("score", "x"), ("score",), ("generate", "\udcff", "--model", "no")])
def test_half_a_character_is_no_prompt(cli, folder, tmp_path, words):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ok"}\n{"prompt": "a\\ud800"}')
    if words[0] == "score":
        how = ("--prompts", prompts) if len(words) == 1 else ("--prompt", "a\udcff")
        words = ("score", folder, "--reward", OWN, *how)
    done = cli(*words)
    assert (done.code, done.err.count("\n"), "is not UTF-8 text: character" in done.err) == (2, 1, True)


@pytest.mark.parametrize("name", ["a.webm", "a.json"])
def test_a_link_to_a_file_that_is_scored_is_no_place_for_a_table(cli, tmp_path, name):
    folder, link = tmp_path / "in", tmp_path / "t.jsonl"
    write_video(folder / "a.webm", torch.full((5, 3, 16, 16), 0.5), fps=8)
    (folder / "a.json").write_text('{"prompt": "a cat"}')
    before = (folder / name).read_bytes()
    link.symlink_to(folder / name)
    done = cli("score", folder, "--reward", "motion_floor", "-o", link)
    assert done.code == 2
    assert "would overwrite" in done.err
    assert (folder / name).read_bytes() == before
    assert cli("score", folder, "--reward", "motion_floor", "-o", folder / "t.jsonl").code == 0
    assert cli("score", folder, "--reward", "motion_floor", "-o", folder / "t.jsonl").code == 0
