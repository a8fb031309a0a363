"""The kinds of spoiling that `world_judge` is trained on and measured by."""

import pytest
import torch

from postgen import world
from postgen.judges.spoil import COURSES, HEAD, LEVELS, Picked, corrupt, render_takes, shows
from postgen.judges.spoil.courses import course_frames
from postgen.judges.spoil.layers import first_body
from postgen.judges.world_judge import pair_accuracy
from postgen.rewards.world_judge import HEADS
from postgen.world.physics import Simulation


@pytest.fixture(scope="module")
def takes():
    specs = [
        world.sample(k, event="moves left" if k % 2 else "stays", num_bodies=1, camera="static") for k in range(4)
    ]
    specs += [world.sample(4, event="collides", num_bodies=2), world.sample(5, event="falls", num_bodies=1)]
    return render_takes(specs, 48, "cpu")


def spoilt(kind, level, takes, rows, seed=3):
    picked = takes.pick(torch.tensor(rows))
    levels = torch.full((len(rows),), level)
    return picked.clean, corrupt(kind, levels, picked, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", list(LEVELS))
def test_level_0_leaves_a_clip_and_more_changes_more(kind, takes):
    rows = [row for row, spec in enumerate(takes.specs) if shows(kind, spec)]
    clean, same = spoilt(kind, 0, takes, rows)
    torch.testing.assert_close(same, clean, atol=1e-6, rtol=0)
    if kind == "teleport":  # two places that do not overlap differ by the same number of pixels, however far apart
        change = [leap(spoilt(kind, level, takes, [0])[1][0]) for level in range(1, 5)]
    else:
        change = [float((spoilt(kind, level, takes, rows)[1] - clean).abs().mean()) for level in range(1, 5)]
    assert change[0] > 0
    assert change == sorted(change)
    assert HEAD[kind] in HEADS


def leap(clip):
    """Pixels between the place of the coloured body in the first frame and in the last."""
    colour = (clip.amax(1) - clip.amin(1)) > 0.3
    x = torch.arange(clip.shape[-1]).float()
    place = [(frame.sum(0) * x).sum() / frame.sum() for frame in (colour[0], colour[-1])]
    return float((place[1] - place[0]).abs())


def test_freezing_repeats_and_vanishing_empties_frames(takes):
    clean, frozen = spoilt("freeze", 2, takes, [1])
    repeats = (frozen[0].diff(dim=0).abs().amax((1, 2, 3)) == 0).sum()
    assert repeats - (clean[0].diff(dim=0).abs().amax((1, 2, 3)) == 0).sum() == 4
    assert not shows("freeze", takes.specs[0])
    clean, gone = spoilt("vanishing", 3, takes, [0])
    assert int(((gone - clean)[0].abs().amax((1, 2, 3)) > 0).sum()) == 4


def test_levels_may_differ_within_a_batch(takes):
    for kind in LEVELS:
        row = int(takes.rows(kind)[0])
        picked = takes.pick(torch.tensor([row, row, row]))
        mixed = corrupt(kind, torch.tensor([0, 2, 4]), picked, torch.Generator().manual_seed(0))
        assert torch.equal(mixed[0], picked.clean[0])


def test_pair_accuracy_is_a_share_by_kind(takes):
    perfect = pair_accuracy(lambda clips: -sharpness_error(clips, takes), takes, level=4)
    assert perfect["noise"] == 1.0
    assert pair_accuracy(lambda clips: torch.zeros(len(clips)), takes, level=2) == dict.fromkeys(LEVELS, 0.0)


def sharpness_error(clips, takes):
    """Distance from the nearest clean clip: an oracle."""
    clean = takes.clean.float() / 255
    return torch.stack([(clip - clean).abs().mean((1, 2, 3, 4)).min() for clip in clips])


def test_takes_pick_floats(takes):
    picked = takes.pick(torch.tensor([1, 2]))
    assert isinstance(picked, Picked)
    assert takes.courses["teleport"].clips.shape[:2] == (4, 6)
    assert picked.course("teleport", torch.tensor([0, 4])).shape == picked.clean.shape
    assert 0 <= picked.clean.min() <= picked.clean.max() <= 1


def test_takes_are_what_the_renderer_gives(takes):
    want = world.render(takes.specs, size=48)
    assert torch.equal(takes.clean, (want.rgb_BF3HW * 255).round().to(torch.uint8))
    # The matte is the share of four rays, the ids are those of one in the middle: both agree away from edges.
    whole = takes.matte[:, :, 0] == 255
    assert whole.any()
    assert bool((want.ids_BFHW[whole] == 1).all())


def test_a_body_over_its_empty_scene_is_the_scene(takes):
    picked = takes.pick(torch.arange(6))
    body = first_body(picked)
    torch.testing.assert_close(body.over(picked.empty), picked.clean, atol=1e-6, rtol=0)
    same = body.placed(body.centre, torch.ones_like(body.radius))
    torch.testing.assert_close(same.paint, body.paint, atol=1e-4, rtol=0)
    own = body.painted(picked.colour, picked.colour)
    # The light of an edge's pixel holds the shadow round it as well.
    inside = body.cover.expand_as(body.paint) == 1
    torch.testing.assert_close(own.paint[inside], body.paint[inside], atol=0.01, rtol=0)


def test_equal_seeds_spoil_in_the_same_way(takes):
    _, some = spoilt("strobe", 2, takes, [1])
    clean, more = spoilt("strobe", 4, takes, [1])
    torch.testing.assert_close(some, clean + 0.4 * (more - clean), atol=1e-5, rtol=0)
    _, again = spoilt("strobe", 4, takes, [1])
    assert torch.equal(more, again)


def places(spec, kind, strength):
    true = Simulation([spec]).run(course_frames(17)).positions_BFK3[0]
    return true, COURSES[kind].way(true, spec, strength)


def test_ways_are_wrong_by_as_much_as_they_say():
    spec = world.sample(4, event="collides", num_bodies=2)
    towards = 1 if spec.bodies[0].velocity[0] > 0 else -1
    true, apart = places(spec, "gap", 0.6)
    torch.testing.assert_close(towards * (apart - true)[:, 1, 0], torch.full((25,), 0.6))
    true, late = places(spec, "mistimed hit", 3)
    moved = [int((p[:, 1, 0].diff().abs() > 1e-4).nonzero()[0]) for p in (true, late)]
    assert abs(moved[1] - moved[0]) == 3
    fall = world.sample(5, event="falls", num_bodies=1)
    true, hung = places(fall, "floating", 0.3)
    assert float(hung[16, 0, 2]) == pytest.approx(float(true[16, 0, 2]) + 0.3, abs=1e-5)
    assert torch.equal(hung[0], true[0])
    true, slid = places(fall, "slides off", 1.1)
    assert float((slid - true)[16, 0].norm()) == pytest.approx(1.1, abs=1e-5)
    assert torch.equal(slid[:5], true[:5])
    assert not shows("gap", fall)


def test_bodies_overlap_by_as_much_as_they_say():
    hit = world.Body(colour="red", shape="ball", size="small", event="collides", partner=1, position=(-2, 0, 0.45))
    hit = world.Body(**{**{n: getattr(hit, n) for n in hit.__slots__}, "velocity": (2.0, 0.0, 0.0)})
    spec = world.Spec(bodies=(hit, world.Body(colour="blue", shape="ball", size="small", position=(0, 0, 0.45))))
    true, deep = places(spec, "overlap", 0.3)
    nearest = [float((p[:, 1, 0] - p[:, 0, 0]).min()) for p in (true, deep)]
    assert nearest[0] - nearest[1] == pytest.approx(0.3, abs=1e-5)


def test_guests_are_other_scenes(takes):
    picked = takes.pick(torch.arange(6))
    guests = picked.guests(torch.Generator().manual_seed(0))
    assert not bool((guests.rows == picked.rows).any())
    assert 4 not in guests.rows.tolist()
