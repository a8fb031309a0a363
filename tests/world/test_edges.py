"""Faults of generated clips: cubes with round sides, and bodies that melt where they meet."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.world_check import Maker
from postgen import world
from postgen.errors import UserError
from postgen.judges.edge_bodies import Prism, corners, picture, plain
from postgen.judges.edge_clips import as_bytes, course, cut
from postgen.judges.world_edges import learn_looked, learn_prisms, read_bags, read_net, write_net
from postgen.world.camera import camera_path
from postgen.world.check import check, contact, edges, find_tracks, steady
from postgen.world.check.edges import EdgeNet
from postgen.world.raycast import Solids, camera_rays, nearest
from postgen.world.spec import COLOURS


def prism(roundness, x=0.0, tall=1.0):
    return Prism((x, 0.0, 0.0), 0.6, 1.2 * tall, 0.4, COLOURS["green"], (roundness,) * 4)


#: Area in pixels that is large enough for the network's full confidence.
LARGE = torch.full((3,), 400.0)


@pytest.fixture(scope="module")
def shots():
    spec = plain(random.Random(0), 1)
    return torch.stack([picture([prism(r)], replace(spec, camera="static"), 0, 96) for r in (0.0, 0.5, 1.0)])


@pytest.fixture(scope="module")
def windows(shots):
    return cut(shots)[0]


def test_a_prism_with_sharp_corners_covers_the_pixels_of_the_worlds_cube():
    spec = replace(plain(random.Random(1), 1), camera="static", background="grey")
    position, rotation = camera_path(spec, 0, 1)
    one, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    members = [(none, none), (one, one), (none, none)]
    solids = Solids(
        torch.tensor([[[0.0, 0.0, 0.6]]]),
        torch.tensor([[0.6 / 0.85]]),
        torch.tensor([[0.4]]),
        torch.tensor([[1]]),
        members,
    )
    origin = tuple(position[:, k, None] for k in range(3))
    _, slot = nearest(origin, camera_rays(rotation, 192, 1), solids)
    drawn = picture([prism(0.0)], spec, 0, 96)
    bare = picture([prism(0.0, x=900.0)], spec, 0, 96)
    cover = torch.nn.functional.avg_pool2d((slot == 0).float().reshape(1, 192, 192), 2)[0]
    changed = (drawn - bare).abs().amax(0) > 0.02
    assert changed[cover == 1].all()
    # Outside the body there is only its shadow, which has no colour.
    tinted = (drawn[1] - drawn[0]) > 0.1
    assert not tinted[cover == 0].any()
    assert tinted[cover == 1].all()


def test_the_rounder_the_corners_the_higher_the_value_and_a_mirror_image_has_the_same(windows):
    values = edges.roundness(windows, LARGE)
    assert values[0] < -1 < values[1] < values[2]
    assert values[2] > 1
    assert torch.allclose(values, edges.roundness(windows.flip(-1), LARGE), atol=1e-5)


def test_a_body_of_few_pixels_is_held_to_be_less_round(windows):
    tiny, small, large = (edges.roundness(windows, torch.full((3,), side**2)) for side in (12.0, 13.5, 15.0))
    assert (tiny < small).all()
    assert (small < large).all()
    assert torch.equal(large, edges.roundness(windows, LARGE))


def test_the_brightness_of_the_light_does_not_count(windows):
    darker = windows * torch.tensor([1.0, 0.6])[:, None, None]
    assert torch.allclose(edges.roundness(windows, LARGE), edges.roundness(darker, LARGE), atol=1e-3)


def test_a_drum_of_the_height_of_a_cube_is_no_cube(shots):
    cube, _, drum = (check(shot.expand(5, -1, -1, -1), "a green cube stays still") for shot in shots)
    assert cube.shape
    assert not drum.shape
    assert drum.score < 0.5 * cube.score


def test_corners_drawn_are_what_their_roundness_says():
    rng = random.Random(0)
    found = [Prism((0, 0, 0), 0.5, 1.0, 0.0, (1, 0, 0), corners(rng, 0)).roundness for _ in range(200)]
    assert found.count(0.0) > 40
    assert found.count(1.0) > 40
    assert prism(0.0).roundness == 0
    assert prism(1.0).roundness == 1


def test_a_course_keeps_the_height_of_a_cube_and_rests_on_the_floor_or_above():
    for seed in range(20):
        bodies = course(random.Random(seed), 1, COLOURS["red"])
        assert len({body.height for body in bodies}) == 1
        assert all(body.foot[2] >= 0 for body in bodies)
        if max(body.roundness for body in bodies) == 0:
            assert 0.94 < bodies[0].height / (2 * bodies[0].half) < 1.06


def test_both_stages_learn_and_the_second_from_the_word_on_a_whole_clip(windows):
    kept = as_bytes(windows[[0, 2]]).repeat(8, 1, 1, 1)
    torch.set_num_threads(1)
    net = learn_prisms(kept, torch.tensor([0.0, 1.0]).repeat(8), steps=4)
    again = learn_prisms(kept, torch.tensor([0.0, 1.0]).repeat(8), steps=4)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    right, wrong = kept[::2], torch.cat((kept[::2], kept[1:4:2]))
    before = net(kept[:2].float() / 255)
    after = learn_looked(net, [(right, False), (wrong, True)], steps=12)(kept[:2].float() / 255)
    assert after[1] - after[0] > before[1] - before[0]
    with pytest.raises(UserError, match="got 1 right and 0 wrong"):
        learn_looked(net, [(right, False)], steps=1)


def test_bags_are_read_as_they_were_written(windows, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "looked.safetensors"
    numbers, wrong = torch.tensor([0, 1, 1]), torch.tensor([True, False])
    save_file({"window": as_bytes(windows), "bag": numbers, "wrong": wrong, "set": torch.tensor([0, 2])}, path)
    (first, none), (second, whole) = read_bags(path)
    assert (len(first), none, len(second), whole) == (1, True, 2, False)
    assert [wrong for _, wrong in read_bags(path, but=0)] == [False]


def test_a_net_is_read_as_it_was_written_and_the_shipped_one_is_small(tmp_path):
    torch.manual_seed(0)
    net = EdgeNet().half().float()
    write_net(net, tmp_path / "net.safetensors")
    again = read_net(tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert edges.WEIGHTS.stat().st_size <= 150_000


def test_of_two_that_meet_one_is_whole_unless_they_melt():
    spec = world.sample(4, num_frames=17, event="passes behind", camera="static", split="all")
    tracks = [t for t in find_tracks(Maker("cpu", 96, 1)([spec]))[0] if len(t.visible) > 5]
    assert contact.apart(tracks) == [1.0, 1.0]
    before = [list(track.pieces) for track in tracks]

    def spoilt(more, where=lambda piece: piece.touch):
        for track, pieces, by in zip(tracks, before, more, strict=True):
            track.pieces = [
                replace(p, misfit=tuple(m + by for m in p.misfit)) if p and p.misfit and where(p) else p
                for p in pieces
            ]
        return contact.apart(tracks)

    # The body behind (the first) may look like anything. The body in front may not, where it cuts off the other.
    assert spoilt((0.2, 0.0)) == [1.0, 1.0]
    assert max(spoilt((0.0, 0.2))) < 0.5
    little, much = spoilt((0.020, 0.020)), spoilt((0.06, 0.06))
    assert 1 > little[0] == little[1] > 0.5 > much[0]
    # This also holds while the other body is completely hidden.
    covering = [p for p, other in zip(before[1], before[0], strict=True) if other is None]
    assert max(spoilt((0.0, 0.06), lambda piece: any(piece is one for one in covering[:1]))) < 0.5
    assert contact.apart([]) == []


def test_one_frame_of_another_hue_shows_and_so_does_a_hue_that_differs_within_a_body():
    spec = world.sample(5, num_frames=17, event="moves right", num_bodies=1, camera="static")
    (track,) = find_tracks(Maker("cpu", 96, 1)([spec]))[0]
    assert steady.hue(track) == 1
    before = list(track.pieces)

    def changed(frames, **by):
        track.pieces = [
            replace(p, **{name: getattr(p, name) + more for name, more in by.items()}) if f in frames else p
            for f, p in enumerate(before)
        ]
        return steady.hue(track)

    assert changed([8], tint=0.02) == 1
    assert changed([8], tint=0.05) < 0.5
    assert changed([8], tint=-0.05) < 0.5
    # A body with the same wrong hue in all frames counts as constant.
    assert changed(range(17), tint=0.05) == 1
    assert changed([8], mixed=0.05) == 1
    assert changed([7, 8, 9], mixed=0.05) < 0.5
