"""`postgen score` and `postgen serve-reward`."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from postgen import write_video
from postgen.rewards import get_reward


def grey(level, frames=4):
    return torch.full((frames, 3, 16, 16), level)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders with videos of three prompts, brighter in the first for two of them; one file is damaged."""
    root = tmp_path_factory.mktemp("score")
    for name, levels in (("a", (0.2, 0.6, 0.4)), ("b", (0.1, 0.3, 0.5))):
        for number, level in enumerate(levels):
            write_video(root / name / f"{number}.mp4", grey(level), fps=8)
            (root / name / f"{number}.json").write_text(json.dumps({"prompt": f"prompt {number}"}))
    (root / "a" / "broken.mp4").write_text("no video")
    (root / "a" / "broken.json").write_text(json.dumps({"prompt": "prompt 9"}))
    return root


def level(prompts, completions, fps=None):
    """A reward to import by its path."""
    assert all(isinstance(prompt, str) for prompt in prompts)
    return [float(c.mean()) for c in completions]


def words(prompts, target):
    """A reward of a column."""
    return [float(len(text)) for text in target]


LEVEL, WORDS = f"{__name__}.level", f"{__name__}.words"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_video_with_a_prompt(cli, folders, tmp_path):
    out = tmp_path / "deep" / "table.jsonl"
    result = cli("score", folders / "b" / "1.mp4", "--prompt", "x", "--reward", LEVEL, "-o", out)
    assert result.code == 0
    assert "1.mp4" in result.out
    (row,) = rows(out)
    assert row["file"].endswith("1.mp4")
    assert row["prompt"] == "x"
    assert row["level"] == pytest.approx(0.3, abs=0.02)
    assert row["error"] is None


def test_a_damaged_file_is_named_and_the_others_go_on(cli, folders, tmp_path):
    out = tmp_path / "table.csv"
    result = cli("score", folders / "a", "--reward", f"{LEVEL},brightness_band", "--weights", "2,1", "-o", out)
    assert result.code == 1
    assert re.search(r"cannot read .*broken\.mp4", result.err)
    table = list(csv.DictReader(out.open(newline="")))
    assert [row["file"].rpartition("/")[2] for row in table] == ["0.mp4", "1.mp4", "2.mp4", "broken.mp4"]
    for row in table[:3]:
        assert float(row["sum"]) == pytest.approx(2 * float(row["level"]) + float(row["brightness_band"]), abs=1e-5)
    assert table[3]["level"] == ""
    assert "broken.mp4" in table[3]["error"]


def test_two_folders_give_win_rates(cli, folders):
    result = cli("score", folders / "a", folders / "b", "--reward", LEVEL)
    lines = {line.split("│")[1].strip(): line for line in result.out.splitlines() if line.count("│") == 3}
    assert "1.0000" in lines["prompt 0"]
    assert "1.0000" in lines["prompt 1"]
    assert "0.0000" in lines["prompt 2"]
    assert "0.6667" in lines["all prompts"]
    assert "prompt 9" not in lines
    # A folder ties with itself.
    result = cli("score", folders / "b", folders / "b", "--reward", LEVEL)
    assert result.out.count("0.5000") == 3 + 1


def test_rows_of_a_file_become_prompts_and_columns(cli, folders, tmp_path):
    table, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    table.write_text(
        "".join(json.dumps({"prompt": f"p{k}", "file": f"{k}.mp4", "target": "x" * k}) + "\n" for k in (2, 1, 0))
    )
    assert cli("score", folders / "b", "--prompts", table, "--reward", WORDS, "-o", out).code == 0
    assert [(row["prompt"], row["words"]) for row in rows(out)] == [("p0", 0.0), ("p1", 1.0), ("p2", 2.0)]
    table.with_suffix(".txt").write_text("one\ntwo\nthree\n")
    assert cli("score", folders / "b", "--prompts", table.with_suffix(".txt"), "--reward", LEVEL, "-o", out).code == 0
    assert [row["prompt"] for row in rows(out)] == ["one", "two", "three"]


def test_a_folder_of_frames_is_one_video(cli, tmp_path):
    write_video(tmp_path / "frames", grey(0.25), fps=8, format="frames")
    result = cli("score", tmp_path / "frames", "--reward", "brightness_band", "-o", tmp_path / "t.jsonl")
    assert result.code == 0
    assert len(rows(tmp_path / "t.jsonl")) == 1
    # What `postgen generate --format frames` leaves: the contact sheets beside the folders are no frames.
    shutil.copytree(tmp_path / "frames", tmp_path / "run" / "one")
    shutil.copytree(tmp_path / "frames", tmp_path / "run" / "two")
    shutil.copy(next((tmp_path / "frames").glob("*.png")), tmp_path / "run" / "one.png")
    (tmp_path / "run" / "one.json").write_text(json.dumps({"prompt": "a"}))
    result = cli("score", tmp_path / "run", "--reward", "brightness_band", "-o", tmp_path / "t.jsonl")
    assert [(row["file"].rpartition("/")[2], row["prompt"]) for row in rows(tmp_path / "t.jsonl")] == [
        ("one", "a"),
        ("two", None),
    ]


def test_a_reward_that_fails_leaves_a_gap(cli, folders, tmp_path):
    out = tmp_path / "t.jsonl"
    video = folders / "b" / "0.mp4"
    result = cli("score", video, "--prompt", "a cat", "--reward", f"world,{LEVEL}", "-o", out)
    assert result.code == 1
    assert rows(out)[0]["world"] is None
    assert rows(out)[0]["level"] > 0
    assert result.err.splitlines()[-1].startswith(
        "postgen: world has no score for 1 of 1 video (0.mp4): the prompt names no"
    )


def test_many_rewards_are_several_tables(cli, folders):
    """A terminal of 80 columns has no room for all of them beside the names of the videos."""
    names = ["world", "motion_floor", "sharpness_band", "brightness_band", "vbench_flicker", "permanence"]
    result = cli("score", folders / "b", "--prompt", "a", "--reward", ",".join(names))
    heads = [line for line in result.out.splitlines() if line.startswith("┃")]
    assert len(heads) > 1
    assert all("video" in line and "prompt" in line and len(line) <= 80 for line in heads)
    assert [word for line in heads for word in line.strip("┃").replace("┃", " ").split()[2:]] == names
    assert result.out.count("0.mp4") == len(heads)


def test_a_row_each_for_the_clips_of_two_folders(cli, folders, tmp_path):
    """Also where each folder holds one video only."""
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        shutil.copy(folders / "b" / "0.mp4", tmp_path / name)
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    left, right = tmp_path / "left", tmp_path / "right"
    out = tmp_path / "out.jsonl"
    for paths, table, prompts in (
        ((left, right), "one.txt", ["one", "one"]),
        ((left / "0.mp4", right / "0.mp4"), "two.txt", ["one", "two"]),
    ):
        assert cli("score", *paths, "--prompts", tmp_path / table, "--reward", LEVEL, "-o", out).code == 0
        assert [row["prompt"] for row in rows(out)] == prompts


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (["b", "--reward", "wrold"], "Did you mean 'world'"),
        (["nowhere.mp4"], "does not exist: give videos"),
        (["b", "--prompt", "x", "--prompts", "y"], "not both"),
        (["b", "-o", "t.xlsx"], "must end in .jsonl or .csv"),
        (["b", "-o", "/proc/t.csv"], "cannot write /proc/t.csv"),
        (["b", "--weights", "1,2"], "weights must be a list of one number per reward, 1 in total"),
        (["b", "--weights", "a"], "must be numbers"),
        (["b", "--device", "abacus"], "abacus"),
        (["empty"], "has neither videos"),
        (["bare.mp4", "--reward", "world"], "world needs a prompt for bare.mp4"),
        (["bare.mp4", "--frames", "--prompt", "a"], "--frames scores a folder of images as one clip"),
        (["two.txt", "--reward", "world"], "two.txt is not a video or picture"),
        (["bare.mp4", "--prompt", " "], "--prompt is empty"),
        (["b", "--prompts", "two.txt"], "2 prompts for 3 videos"),
        (["b", "--prompts", "other.jsonl"], "no row of the prompts has the file 0.mp4"),
        (["b", "--prompts", "taken.jsonl"], "has the key 'fps'"),
        (["b", "--reward", WORDS], "needs the column 'target'"),
        (["b", "--reward", "http://127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_mistakes_are_one_line(cli, folders, monkeypatch, words_, message):
    monkeypatch.chdir(folders)
    (folders / "empty").mkdir(exist_ok=True)
    (folders / "two.txt").write_text("a\nb\n")
    (folders / "other.jsonl").write_text('{"prompt": "a", "file": "z.mp4"}\n')
    (folders / "taken.jsonl").write_text('{"prompt": "a", "fps": 8}\n' * 3)
    if not (folders / "bare.mp4").exists():
        write_video(folders / "bare.mp4", grey(0.5), fps=8)
    result = cli("score", *words_)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (["wrold"], "Did you mean 'world'"),
        (["motion_floor", "--port", "99999"], "port must be at least 0 and at most 65,535"),
        (["motion_floor", "--max-mb", "inf"], "--max-mb must be above 0"),
        (["motion_floor", "--device", "abacus"], "unknown --device 'abacus'"),
        (["motion_floor", "--timeout", "0"], "must be above 0"),
        (["world_clip(model='nowhere')"], "nowhere has no weights"),
    ],
)
def test_mistakes_of_a_server_are_one_line(cli, words_, message):
    result = cli("serve-reward", *words_)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_served_reward_is_a_reward():
    command = [sys.executable, "-m", "postgen", "serve-reward", "brightness_band", "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline()).group()
        remote = get_reward(url).function
        assert remote.health()["reward"] == "brightness_band"
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 130
    finally:
        server.kill()
        server.communicate()
