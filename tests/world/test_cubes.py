"""Cubes that a person labelled one by one: their clips, and the judge's verdicts on them."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks import world_cube_clips
from benchmarks.embedded_sheets import bytes_of
from benchmarks.world_check import Maker
from benchmarks.world_cube_cross import best_limit, mistakes, pairs_right, recorded, values
from benchmarks.world_cube_sheets import crops
from postgen import world
from postgen.world.check import edges, find_tracks, steady


@pytest.fixture(scope="module")
def spec():
    found = (
        world.sample(k, num_bodies=1, event="moves right", camera="static", num_frames=9) for k in itertools.count()
    )
    return next(spec for spec in found if spec.bodies[0].shape == "cube")


@pytest.fixture(scope="module")
def clip(spec):
    return bytes_of(Maker("cpu", 96, 1)([spec], 9))[0]


def test_the_labels_are_those_of_the_cubes_of_clips_that_are_made_again():
    told = json.loads(world_cube_clips.LABELS.read_text())["cubes"]
    assert {row["label"] for row in told} == {"cube", "not", "unclear"}
    assert len(world_cube_clips.labels()) == len(told) == 301
    first = {row.name: row for row in world_cube_clips.batch_rows(0)}
    assert len(first) == 8
    said = [row for row in told if row["clip"] in first]
    assert [(row["prompt"], row["seed"]) for row in said] == [
        (row.prompt, row.seed) for row in first.values() for _ in row.cubes
    ]
    assert [row["body"] for row in said] == [colour for row in first.values() for colour in row.cubes]


def test_a_recorded_clip_is_judged_as_the_judge_does(spec, clip):
    shot = recorded(clip, world.simple_caption(spec))
    assert shot.passes
    (value,) = values(edges.WEIGHTS, shot.cubes.values())
    (track,) = find_tracks(clip[None].float() / 255)[0]
    pieces = steady.looked_at(track)
    assert value == pytest.approx(steady.soft_value([p.soft for p in pieces], [p.round[0] for p in pieces]), abs=1e-4)
    for limit, failed in ((value + 0.1, 0), (value - 0.1, 1)):
        found = mistakes(edges.WEIGHTS, limit, {"clip": shot}, {"clip": True})
        assert found == {"clips": 1, "wrong_passed": 0, "right_failed": failed}


def test_a_sheet_shows_the_body_of_a_colour_and_nothing_where_there_is_none(spec, clip):
    own = spec.bodies[0].colour
    other = next(name for name in ("red", "green") if name != own)
    found = dict(crops(clip, [own, other]))
    assert len(found[own]) == 6
    assert found[other] == []


def test_the_limit_lies_between_cubes_and_bodies_that_are_none():
    assert -1 <= best_limit([-2.0, -1.0], [0.5, 1.0]) <= 0.5
    assert pairs_right([0.0, 1.0], [1.0, 2.0]) == 0.875
