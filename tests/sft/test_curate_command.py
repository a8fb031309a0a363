"""`postgen curate`: the counts of a folder with one fault of each kind, resume after kill -9, and wrong input."""

import json
import os
import shutil
import time
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from postgen.errors import UserError
from postgen.sft.curation import CurationConfig, MeasureStore, curate, measure
from postgen.sft.items import Item, read_items
from postgen.video import probe, read_video, write_video
from tests.children import Child
from tests.sft.curated_clips import MOVING, make_folder, scene

pytest.importorskip("cv2")

REMOVED = {
    "asked.mp4": "overlap",
    "broken.mp4": "readable",
    "dark.mp4": "brightness",
    "flat.mp4": "contrast",
    "short.mp4": "seconds",
    "slow.mp4": "fps",
    "soft.mp4": "sharpness",
    "still.mp4": "flow",
    "titled.mp4": "text_area",
    "twin.mp4": "duplicate_hash",
}
"""File -> filter that has to remove it."""


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder with the source and what the first curation of it wrote, and a copy of all that it wrote."""
    folder = tmp_path_factory.mktemp("curation")
    make_folder(folder / "data", [scene(seed) for seed in MOVING])
    (folder / "rl.txt").write_text("a red ball rolls to the right\nsomething else\n")
    faults = []
    items = read_items(str(folder / "data"), faults=faults)
    prompts = ["a red ball rolls to the right", "something else"]
    curate(items, folder / "out.jsonl", faults=faults, apart_from=prompts, workers=2)
    kept = tmp_path_factory.mktemp("kept")
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("data"), dirs_exist_ok=True)
    return folder, kept


@pytest.fixture
def place(curated):
    """The folder with the source and what the first curation of it wrote, for tests that may change it."""
    folder, kept = curated
    yield folder
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_lit_thing_on_black_is_kept_and_underexposed_clips_are_not(tmp_path):
    """As a night view of the Earth: mean luma 0.03, but contrast."""
    rows_, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    frames = [
        ((rows_**2 + (columns - 0.02 * k) ** 2 < 0.1) * (0.4 + 0.2 * torch.sin(40 * columns))).expand(3, -1, -1)
        for k in range(17)
    ]
    clips = {"earth": torch.stack(frames), "underexposed": (scene(MOVING[0]) ** 2.2 * 2.0**-8) ** (1 / 2.2)}
    (tmp_path / "data").mkdir()
    for name, clip in clips.items():
        write_video(tmp_path / "data" / f"{name}.mp4", clip, fps=8, quality=10)
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    funnel = curate(read_items(str(tmp_path / "data")), tmp_path / "out.jsonl")
    assert [one.item.key for one in funnel.kept] == ["earth.mp4"]
    assert 0.02 < funnel.kept[0].shot.values["brightness"] < 0.06


def test_each_filter_removes_the_clip_made_for_it(place):
    told = json.loads((place / "out-report" / "funnel.json").read_text())
    assert {one["key"]: one["removed_by"] for one in told["removed"]} == REMOVED
    assert [one["key"] for one in told["left_out"]] == ["silent.mp4"]
    steps = {step["name"]: (step["before"], step["after"]) for step in told["steps"]}
    assert steps["usable"] == (15, 14)
    assert steps["readable"] == (14, 13)
    assert steps["shots"] == (13, 14)
    assert list(steps.values())[-1][1] == told["kept"] == 5
    assert all(left == before for (_, left), (before, _) in pairwise(steps.values()))
    names = {file.name for file in (place / "out-report").iterdir()}
    assert names == {"funnel.json", "funnel.svg", "measures.svg"} | {
        f"removed-{name}.png" for name in REMOVED.values() if name != "readable"
    }
    for chart in ("funnel.svg", "measures.svg"):
        assert ElementTree.parse(place / "out-report" / chart).getroot().tag.endswith("svg")
    with Image.open(place / "out-report" / "removed-duplicate_hash.png") as pair:
        assert pair.width > 2 * 160  # the removed clip and the one that was kept


def test_kept_rows_are_a_data_set_of_shots_without_bars(place):
    kept = rows(place / "out.jsonl")
    assert [row["source"] for row in kept] == ["barred.mp4", "good.mp4", "picture.png", *["two_shots.mp4"] * 2]
    read = read_items(place / "out.jsonl")
    assert [item.kind for item in read] == ["video", "video", "image", "video", "video"]
    assert probe(read[0].path).height == 64  # without its bars of 16 rows
    assert [probe(read[k].path).frames for k in (3, 4)] == [17, 17]
    second = read_video(place / "data" / "two_shots.mp4", start=17)
    assert float((read_video(read[4].path) - second).abs().mean()) < 0.01
    assert sum(row["weight"] for row in kept) == pytest.approx(5, rel=1e-4)
    # Both shots have the caption of their file, so each weighs about half.
    assert kept[3]["weight"] == pytest.approx(kept[0]["weight"] / 2, rel=0.1)


def test_the_same_command_measures_nothing_again_and_thresholds_may_change(cli, place):
    out, store = place / "out.jsonl", place / "out.measures.jsonl"
    words = ["curate", place / "data", "-o", out, "--apart-from", place / "rl.txt", "--device", "cpu"]
    first, measured = out.read_bytes(), store.read_bytes()
    made = [file.stat().st_mtime_ns for file in sorted((place / "out-clips").iterdir())]
    done = cli(*words)
    assert done.code == 0, done.err
    assert "rows or files that cannot be used: 1; the first: silent.mp4" in done.err
    assert "files that cannot be read: 1; the first: cannot read" in done.err
    assert "out.jsonl: 5; the report is in" in done.err
    assert "duplicate_hash" in done.out
    assert (out.read_bytes(), store.read_bytes()) == (first, measured)
    assert [file.stat().st_mtime_ns for file in sorted((place / "out-clips").iterdir())] == made
    assert cli(*words, "--set", "text_area=null", "--set", "hash_distance=null", "--set", "density_power=0").code == 0
    assert {"titled.mp4", "twin.mp4"} <= {row["source"] for row in rows(out)}
    assert {row["weight"] for row in rows(out)} == {1.0}
    assert store.read_bytes() == measured


def test_without_a_clip_left_the_old_rows_stay(cli, place):
    out = place / "out.jsonl"
    kept = out.read_bytes()
    done = cli("curate", place / "data", "-o", out, "--set", "seconds=[100, null]", "--set", "height=[5000, null]")
    assert done.code == 2
    assert "no clip is left: height removed 14 of 14; change the thresholds" in done.err
    assert out.read_bytes() == kept


def test_a_killed_curation_goes_on_to_the_same_rows(place, tmp_path):
    names = ("good.mp4", "two_shots.mp4", "barred.mp4", "twin.mp4")
    (tmp_path / "data").mkdir()
    for name in names:
        for file in (name, name.replace(".mp4", ".txt")):
            shutil.copy(place / "data" / file, tmp_path / "data" / file)
    source = read_items(str(tmp_path / "data"))
    curate(source, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    words = ["curate", tmp_path / "data", "-o", out, "--device", "cpu", "--workers", "1"]
    store = tmp_path / "out.measures.jsonl"
    killed = Child("postgen", words)
    end = time.monotonic() + 60
    while not (store.exists() and store.stat().st_size) and killed.code is None and time.monotonic() < end:
        time.sleep(0.005)
    assert killed.kill() == -9
    assert not out.exists()
    known = store.read_text().count("\n")
    assert 1 <= known < 4
    with open(store, "a") as file:  # killed in the middle of a line
        file.write('{"key": "0123", "measured": {"hei')
    curate(source, out)
    assert store.read_text().count("\n") == 5
    same = [{**row, **({"video": ""} if "clips" in row["video"] else {})} for row in rows(out)]
    whole = [{**row, **({"video": ""} if "clips" in row["video"] else {})} for row in rows(tmp_path / "whole.jsonl")]
    assert same == whole
    for one, other in zip(rows(out), rows(tmp_path / "whole.jsonl"), strict=True):
        assert (tmp_path / one["video"]).read_bytes() == (tmp_path / other["video"]).read_bytes()


def test_a_changed_file_or_setting_is_measured_again(place, tmp_path):
    clip = tmp_path / "a.mp4"
    shutil.copy(place / "data" / "good.mp4", clip)
    config = CurationConfig(side=64)
    store = MeasureStore(tmp_path / "m.jsonl", config)
    key = store.key(clip)
    store.add(key, measure(clip, "video", config))
    assert MeasureStore(tmp_path / "m.jsonl", CurationConfig(side=64, brightness=(0.5, None))).get(key) == store.get(
        key
    )
    assert MeasureStore(tmp_path / "m.jsonl", CurationConfig(side=65)).key(clip) != key
    os.utime(clip, (1, 1))
    assert store.key(clip) != key


def test_frames_of_a_long_video_are_those_of_a_short_one(place, monkeypatch):
    """A video whose frames do not fit into memory is read again, with the same result."""
    path = place / "data" / "two_shots.mp4"
    config = CurationConfig(side=64)
    whole = measure(path, "video", config)
    monkeypatch.setattr("postgen.sft.curation.measured._HELD", 0)
    assert measure(path, "video", config) == whole
    assert len(whole.shots) == 2


def test_a_file_with_two_captions_is_no_duplicate_and_the_larger_twin_stays(tmp_path):
    clip = scene(3, 48)
    write_video(tmp_path / "small.mp4", clip, fps=8)
    write_video(tmp_path / "large.mp4", torch.nn.functional.interpolate(clip, scale_factor=2), fps=8)
    made = [
        Item("small.mp4", tmp_path / "small.mp4", "video", "a ball"),
        Item("large.mp4", tmp_path / "large.mp4", "video", "a round thing"),
        Item("large.mp4@2", tmp_path / "large.mp4", "video", "something red"),
    ]
    config = CurationConfig(embedding="thumbnail", hash_distance=None, embedding_distance=0.03)
    funnel = curate(made, tmp_path / "out.jsonl", config, workers=2)
    assert [(one.item.key, one.removed) for one in funnel.candidates] == [
        *(("small.mp4", "duplicate_embedding"), ("large.mp4", None), ("large.mp4@2", None)),
    ]
    assert [row["source"] for row in rows(tmp_path / "out.jsonl")] == ["large.mp4", "large.mp4"]
    # Curated once more, a clip keeps the name of its first source.
    again = curate(read_items(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", CurationConfig(hash_distance=None))
    assert [one.item.caption for one in again.kept] == ["a round thing", "something red"]
    assert [row["source"] for row in rows(tmp_path / "again.jsonl")] == ["large.mp4", "large.mp4"]
    # The weights of the user are multiplied in, those of a curation are not.
    own = [Item(item.key, item.path, item.kind, item.caption, {"weight": 3}) for item in made[1:]]
    curate(own, tmp_path / "own.jsonl", CurationConfig(hash_distance=None))
    curate(read_items(tmp_path / "own.jsonl"), tmp_path / "twice.jsonl", CurationConfig(hash_distance=None))
    for name, factor in (("again", 1), ("own", 3), ("twice", 3)):
        found = [row["weight"] for row in rows(tmp_path / f"{name}.jsonl")]
        assert found == pytest.approx([factor * row["weight"] for row in rows(tmp_path / "out.jsonl")], rel=1e-4)


def test_cuts_and_bars_may_remove_a_clip_or_be_ignored(place, tmp_path):
    made = [item for item in read_items(str(place / "data"), faults=[]) if item.key in ("two_shots.mp4", "barred.mp4")]
    with pytest.raises(UserError, match="no clip is left: cuts removed 1 of 2"):
        curate(made, tmp_path / "a.jsonl", CurationConfig(cuts="drop", bars="drop"))
    told = json.loads((tmp_path / "a-report" / "funnel.json").read_text())
    assert {one["key"]: one["removed_by"] for one in told["removed"]} == {
        "two_shots.mp4": "cuts",
        "barred.mp4": "bars",
    }
    funnel = curate(made, tmp_path / "b.jsonl", CurationConfig(cuts="keep", bars="keep"))
    assert [row["video"] for row in rows(tmp_path / "b.jsonl")] == [
        os.path.relpath(place / "data" / name, tmp_path) for name in ("barred.mp4", "two_shots.mp4")
    ]
    assert len(funnel.kept) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./absent", "-o", "x.jsonl"], "absent"),
        (["empty", "-o", "x.jsonl"], "holds no image or video"),
        (["data", "-o", "x.csv"], "--output must end in .jsonl"),
        (["data", "-o", "data/x.jsonl"], "is inside the source data"),
        (["data", "-o", "x.jsonl", "--workers", "0"], "--workers must be at least 1"),
        (["data", "-o", "x.jsonl", "--set", "flow"], "--set must be KEY=VALUE, got 'flow'"),
        (["data", "-o", "x.jsonl", "--set", "flow=[1"], "the value is not valid YAML"),
        (["data", "-o", "x.jsonl", "--set", "flows=[0, 1]"], "Did you mean 'flow'"),
        (["data", "-o", "x.jsonl", "--set", "flow=[nan, 1]"], "flow must be"),
        (["data", "-o", "x.jsonl", "--config", "absent.yaml"], "absent.yaml cannot be read"),
        (["data", "-o", "x.jsonl", "--config", "list.yaml"], "write lines 'key: value'"),
        (["data", "-o", "x.jsonl", "--config", "bad.yaml"], "not valid YAML"),
        (["data", "-o", "x.jsonl", "--apart-from", "absent.txt"], "absent.txt"),
        (["data", "-o", "x.jsonl", "--device", "tpu"], "device"),
        (["data", "-o", "x.jsonl", "--strict"], "silent.mp4"),
        (["data", "-o", "x.jsonl", "--caption-model", "./absent"], "absent"),
        (["rows.jsonl", "-o", "rows.jsonl"], "rows.jsonl would overwrite"),
        (["data", "-o", "other.jsonl"], "other.jsonl exists and was not written by `postgen curate`"),
        (["mute", "-o", "x.jsonl"], "2 of 2 files or rows cannot be used"),
        (["torn", "-o", "x.jsonl"], "1 of 1 files or rows cannot be used: broken.mp4: cannot read"),
    ],
)
def test_wrong_input_is_one_line(cli, place, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(place / "data")
    for folder, files in {"empty": (), "mute": ("silent.mp4",), "torn": ("broken.mp4", "broken.txt")}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            shutil.copy(place / "data" / file, tmp_path / folder / file)
    shutil.copy(place / "data" / "silent.mp4", tmp_path / "mute" / "also.mp4")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("flow: [1\n")
    (tmp_path / "rows.jsonl").write_text('{"video": "data/good.mp4", "prompt": "a"}\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "mine"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    done = cli("curate", *words)
    assert done.code == 2
    assert message in done.err
    said = [line for line in done.err.splitlines() if line.strip() and not line.startswith("Measuring")]
    assert len(said) == 1, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
