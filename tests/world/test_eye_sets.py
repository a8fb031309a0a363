"""The judge compared with a person on sets of generated clips: sources of the verdicts, refusals."""

from __future__ import annotations

import json

import pytest

from benchmarks import world_eye
from benchmarks.embedded_sheets import bytes_of, write_clips
from benchmarks.world_check import Maker
from benchmarks.world_eye_clips import FIRST_FIFTH, PARTS
from postgen import world
from postgen.errors import UserError

SPEC = world.sample(3, event="moves left", num_bodies=1, camera="static", num_frames=9)
PROMPT = world.simple_caption(SPEC)


@pytest.fixture
def kept(tmp_path):
    """Return a folder of stored clips for each set, with one clip per part, all right clips of one scene."""
    clip = bytes_of(Maker("cpu", 64, 1)([SPEC], 9))[0]
    for number, name in enumerate(world_eye.SETS):
        folder = tmp_path / name
        folder.mkdir()
        for prefix, *_ in PARTS:
            write_clips(folder / f"{prefix}.safetensors", [clip], [PROMPT])
        clips = {f"{prefix}-000": {"prompt": PROMPT, "seed": number} for prefix, *_ in PARTS}
        (folder / "rows.json").write_text(json.dumps({"denoiser_sha256": "abc", "clips": clips}))
    return {name: tmp_path / name for name in world_eye.SETS}


@pytest.fixture
def say(tmp_path, monkeypatch):
    """Return a function that writes the verdicts of a set on its four clips."""
    monkeypatch.setattr(world_eye, "DATA", tmp_path)

    def write(name, verdicts, **more):
        seed = list(world_eye.SETS).index(name)
        names = [f"{prefix}-000" for prefix, *_ in PARTS]
        rows = {n: {"prompt": PROMPT, "seed": seed, "verdict": v} for n, v in zip(names, verdicts, strict=True)}
        told = {"denoiser_sha256": "abc", "clips": rows, **more}
        (tmp_path / world_eye.SETS[name][0]).write_text(json.dumps(told))

    return write


def test_each_set_is_judged_on_its_own_verdicts_and_the_gate_is_that_of_the_last(kept, say, tmp_path):
    say("generated", ["right", "right", "unclear", "wrong: count"])
    say("generated_fresh", ["right", "right", "wrong: colour", "wrong: count"])
    say("generated_third", ["right", "right", "wrong: colour", "wrong: count"])
    say("generated_fourth", ["right", "right", "right", "wrong: count"])
    say("generated_fifth", ["right", "wrong: shape", "wrong: colour", "wrong: count"])
    found = {name: world_eye.generated(name, "cpu", kept[name], tmp_path) for name in kept}
    assert [found[name]["agree"] for name in found] == [pytest.approx(2 / 3), 0.5, 0.5, 0.75, 0.25]
    assert [found[name]["judged"] for name in found] == [3, 4, 4, 4, 4]
    assert [found[name]["of_two"] for name in found] == [2, 2, 2, 2, 2]
    assert [row["clip"] for row in found["generated"]["apart"]] == ["1r-000"]
    table = {"kind": dict.fromkeys(world_eye.COLUMNS, 1)}
    eye = {"constructed": table, "constructed_fresh": table, "mirror": 1.0, **found}
    gate = next(row for row in world_eye.gates(eye, {"mirror": 1.0}, 1.0) if row["name"] == "eye_agreement")
    assert gate["value"] == 0.25
    assert not gate["ok"]


def test_missing_verdicts_other_models_and_exchanged_folders_are_one_clear_error(kept, say, tmp_path):
    say("generated", ["right"] * 4)
    say("generated_fresh", ["right"] * 4)
    say("generated_third", ["right"] * 4)
    say("generated_fourth", ["right"] * 4)
    with pytest.raises(UserError, match=rf"world_generated_fifth.json is missing.*--first {FIRST_FIFTH}"):
        world_eye.check_model(kept, tmp_path)
    say("generated_fifth", ["right"] * 4)
    world_eye.check_model(kept, tmp_path)
    with pytest.raises(UserError, match=f"clips of other seeds than generated_fifth.*--first {FIRST_FIFTH}"):
        world_eye.check_model({**kept, "generated_fifth": kept["generated"]}, tmp_path)
    say("generated_fifth", ["right"] * 4, denoiser_sha256="other")
    with pytest.raises(UserError, match="clips of another model"):
        world_eye.check_model(kept, tmp_path)


def test_two_persons_are_compared_where_both_are_sure(monkeypatch):
    pairs = [("right", "right"), ("wrong: shape", "wrong: melts"), ("right", "wrong: count"), ("unclear", "right")]
    rows = {str(k): {"verdict": first, "second": second} for k, (first, second) in enumerate(pairs)}
    monkeypatch.setattr(world_eye, "eye_verdicts", lambda _: {"clips": rows})
    assert world_eye.second_eye() == {"clips": 3, "agree": pytest.approx(2 / 3)}
