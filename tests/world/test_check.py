"""The judge of the synthetic world: correct on true and on spoilt clips, and hard to fool."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import world_corruptions as spoil
from benchmarks.world_check import ATTRIBUTES, CORRUPTIONS, Maker, corrupted, scenes, shares
from postgen import world
from postgen.errors import UserError
from postgen.world.check import check, check_batch, check_long, find_tracks, find_tracks_long
from postgen.world.check.segment import label
from postgen.world.spec import CAMERAS


@pytest.fixture(scope="module")
def make():
    return Maker("cpu", supersample=1)


@pytest.fixture(scope="module")
def true(make):
    """Return 45 scenes with a static camera (5 of each of `EVENTS`), 3 with a moving camera, and their clips."""
    specs = scenes(5, offset=300)
    specs += [world.sample(400 + k, camera=CAMERAS[1 + 2 * k], split="all") for k in range(3)]
    return specs, make(specs)


@pytest.fixture(scope="module")
def reports(true):
    return check_batch(true[1], true[0])


@pytest.mark.slow
def test_true_clips_are_called_right(reports):
    rows = shares(reports)
    assert len(reports) == 48
    assert rows["n_direction"] >= 20
    for name in ATTRIBUTES:
        assert rows[name] >= 0.95, (name, rows)
    assert rows["score"] > 0.9


def test_events_are_recognised_by_name(true, reports):
    named = [(s.bodies[0].event, r.bodies[0].found_event) for s, r in zip(true[0][:45], reports[:45], strict=True)]
    assert sum(a == b for a, b in named) >= 40, named


def test_filmed_clips_are_judged_without_their_events(reports):
    assert all(r.event is None and r.direction is None and r.all_right for r in reports[45:])


def test_tracks_follow_the_bodies(true, reports):
    """For a ball that moves left, x of the track falls in every frame, and the area is constant."""
    assert true[0][0].bodies[0].event == "moves left"
    track = reports[0].bodies[0].track
    xs = [point[0] for point in track if point]
    assert all(b < a for a, b in pairwise(xs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_spoilt_clips_are_caught(kind, true, make):
    wrong, stay, _ = CORRUPTIONS[kind]
    specs, clips = corrupted(kind, true[0][1:45:4], true[1][1:45:4], make)
    assert len(specs) >= 3
    rows = shares(check_batch(clips, specs))
    for name in wrong:
        assert rows[name] <= 0.2, (kind, name, rows)
    for name in stay:
        assert rows[name] >= 0.85, (kind, name, rows)


@pytest.mark.parametrize("kind", spoil.pretenders(5, 64, 1))
def test_pretenders_score_nothing(kind):
    clips = spoil.pretenders(5, 64, 2)[kind]
    for prompt in ("a red ball stays still", "an orange cube moves right"):
        for report in check_batch(clips, [prompt] * 2):
            assert report.score < 0.2
            assert not report.all_right


def test_a_wrong_count_scores_below_a_fifth(true, make):
    specs, clips = true
    one = next(i for i, s in enumerate(specs) if len(s.bodies) == 1)
    two = next(i for i, s in enumerate(specs) if len(s.bodies) == 2)
    more = replace(specs[one], bodies=specs[two].bodies)
    fewer = replace(specs[two], bodies=(replace(specs[two].bodies[0], event="stays", partner=None),))
    for clip, spec in ((clips[one], more), (clips[two], fewer)):
        report = check(clip, spec)
        assert not report.count
        assert report.score < 0.2


def test_two_bodies_of_one_colour_are_told_apart_by_shape(make):
    spec = world.parse("a red ball moves left and a red cube stays still")
    report = check(make([spec])[0], spec)
    assert report.all_right
    assert [b.found_shape for b in report.bodies] == ["ball", "cube"]


def test_a_colour_that_drifts_is_no_colour(true, reports):
    specs, clips = true
    spec, clip = specs[20], clips[20]
    assert spec.bodies[0].event == "stays"
    assert reports[20].colour
    drifting = torch.cat((clip[:8], clip[8:].roll(1, dims=1)))
    report = check(drifting, spec)
    assert not report.colour
    assert report.count


def test_a_softened_clip_is_still_right_and_a_smear_is_not(true):
    specs, clips = true
    soft = torch.stack([spoil.softened(c, 1) for c in clips[2:45:8]])
    assert all(r.all_right for r in check_batch(soft, specs[2:45:8]))
    smear = check(spoil.blurred(clips[2], 6.0), specs[2])
    assert not smear.all_right
    assert smear.score < 0.2


def test_it_is_deterministic_and_does_not_depend_on_the_batch(true, reports):
    specs, clips = true
    assert check(clips[7], specs[7]) == reports[7]
    assert check_batch(clips[5:9], specs[5:9]) == reports[5:9]


def test_a_prompt_does_as_well_as_a_spec(true, reports):
    specs, clips = true
    report = check(clips[0], world.simple_caption(specs[0]))
    assert report.all_right
    assert report.bodies[0].found_event == "moves left"


def test_labels_are_those_of_a_search(true):
    """Connected pieces equal those of a plain flood fill."""
    kind = torch.randint(-1, 2, (2, 13, 17), generator=torch.Generator().manual_seed(3))
    found = label(kind)
    for picture, numbers in zip(kind.tolist(), found.tolist(), strict=True):
        assert numbers == _flood(picture)


def _flood(picture):
    height, width = len(picture), len(picture[0])
    numbers = [[-1] * width for _ in range(height)]
    for start in range(height * width):
        y, x = divmod(start, width)
        if picture[y][x] < 0 or numbers[y][x] >= 0:
            continue
        stack = [(y, x)]
        while stack:
            v, u = stack.pop()
            inside = 0 <= v < height and 0 <= u < width
            if inside and numbers[v][u] < 0 and picture[v][u] == picture[y][x]:
                numbers[v][u] = start
                stack += [(v + 1, u), (v - 1, u), (v, u + 1), (v, u - 1)]
    return numbers


@pytest.mark.parametrize(
    ("shape", "prompt", "message"),
    [
        ((3, 64, 64), "a red ball stays", r"needs a clip \(F,3,H,W\)"),
        ((4, 3, 64, 64), "a red ball stays", "F >= 5"),
        ((5, 4, 64, 64), "a red ball stays", r"\(B,F,3,H,W\)"),
        ((5, 3, 64, 64), "a cat on a sofa", "names no body"),
    ],
)
def test_bad_input_is_refused(shape, prompt, message):
    with pytest.raises(UserError, match=message):
        check(torch.zeros(shape), prompt)


def test_as_many_specs_as_clips():
    with pytest.raises(UserError, match="2 clips and 1 specs"):
        check_batch(torch.zeros(2, 5, 3, 64, 64), ["a red ball stays"])


@pytest.mark.parametrize("event", ["collides", "passes behind"])
def test_two_bodies_that_are_never_seen_together_are_judged(make, event):
    """If a model turns one body into the other, the event of the pair is wrong, and no error occurs."""
    spec = world.sample(7, event=event, num_bodies=2, camera="static", split="all")
    alone = [
        world.Spec(bodies=(replace(b, event="stays", partner=None, velocity=(0.0, 0.0, 0.0)),)) for b in spec.bodies
    ]
    first, second = make(alone)
    report = check(torch.cat((first[:9], second[9:])), spec)
    assert report.event is False
    assert not report.all_right


@pytest.mark.parametrize("values", [torch.uint8, (0, 255), (-1, 1)])
def test_frames_in_other_units_are_refused(values):
    scene = world.sample(7)
    clip = world.render([scene]).rgb_BF3HW[0]
    other = (clip * 255).to(values) if isinstance(values, torch.dtype) else values[0] + clip * (values[1] - values[0])
    assert check(clip, scene).score == 1
    assert check(clip * 1.02 - 0.01, scene).score > 0.9  # values slightly outside [0, 1], as a decoder may return them
    for call in (
        lambda: check(other, scene),
        lambda: check_batch(other[None], [scene]),
        lambda: check_long(lambda: iter(other.split(8)), scene),
        lambda: find_tracks(other[None]),
        lambda: find_tracks_long(lambda: iter(other.split(8))),
    ):
        with pytest.raises(UserError, match=r"check needs frames (as floats )?in \[0,1\]"):
            call()
