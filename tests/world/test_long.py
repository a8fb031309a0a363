"""Scenes of any length: seeds, bodies that return, and geometry with moving camera and bodies."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.world.camera import camera_path
from postgen.world.long import HORIZON, LEAST_ABSENCE, _course
from postgen.world.physics import Simulation
from postgen.world.spec import Spec

LATER = ("camera_turn", "camera_start")
MOVES = ("pan left", "orbit right", "dolly in")


@pytest.fixture(scope="module")
def filmed():
    """Return scenes with moving bodies and a moving camera, with their render over the whole camera path."""
    specs = [
        world.sample_long(seed, num_bodies=2, camera=camera) for seed, camera in zip((2, 3, 4), MOVES, strict=True)
    ]
    return specs, world.render(specs, num_frames=12, size=48, supersample=1)


def test_scenes_of_old_seeds_are_what_they_were():
    rows = []
    for seed, frames in itertools.product(range(60), (9, 17, 33)):
        spec = world.sample(seed, num_frames=frames, split=("train", "held_out", "all")[seed % 3]).to_dict()
        assert [spec.pop(name) for name in LATER] == [None, 0]
        rows.append(json.dumps(spec))
    found = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    assert found.startswith("d1c54cac568870c3")


def test_a_seed_fixes_a_scene_at_every_length():
    short, long = (world.sample_long(7, num_frames=n) for n in (17, 1000))
    assert (short.num_frames, long.num_frames) == (17, 1000)
    assert {**short.to_dict(), "num_frames": 1000} == long.to_dict()
    assert len({repr(world.sample_long(seed)) for seed in range(40)}) == 40
    assert Spec.from_dict(json.loads(json.dumps(long.to_dict()))) == long


def test_splits_hold_for_both_ways_of_a_body():
    turned = {"moves left": "moves right", "moves right": "moves left"}
    for seed in range(30):
        train = world.sample_long(seed, split="train")
        assert not train.held_out
        for body in train.bodies:
            assert not world.is_held_out(body.colour, body.shape, turned.get(body.event, body.event))
    held = [world.sample_long(seed, split="held_out") for seed in range(10)]
    assert any(spec.held_out for spec in held)


def absences(visible):
    """Return the length in frames of each absence of a body that is visible before and after it."""
    shown = [frame for frame, seen in enumerate(visible) if seen]
    return [b - a - 1 for a, b in itertools.pairwise(shown) if b > a + 1]


@pytest.mark.parametrize("absence", ["leaves", "hidden"])
def test_a_body_is_gone_and_comes_back(absence):
    specs = [world.sample_long(seed, absence=absence) for seed in range(4)]
    ids = world.render(specs, num_frames=HORIZON, size=32, supersample=1).ids_BFHW
    for spec, clip in zip(specs, ids, strict=True):
        area = torch.stack([(clip == k + 1).sum((1, 2)) for k in range(len(spec.bodies))])
        assert area[:, 0].min() >= 3, "every body is in the first frame"
        assert any(body.event != "stays" for body in spec.bodies)
        assert max(gap for row in area for gap in [0, *absences((row >= 3).tolist())]) >= LEAST_ABSENCE


def test_the_plan_is_what_the_physics_does():
    specs = [world.sample_long(seed, num_bodies=2, camera="static") for seed in range(4)]
    frames = 130
    motion = Simulation(specs).run(frames).positions_BFK3
    planned = [[[_course(b, f, s.fps)[0] for b in s.bodies] for f in range(frames)] for s in specs]
    assert (motion - torch.tensor(planned)).abs().max() < 1e-3
    assert (motion[:, 100:].diff(dim=1).norm(dim=-1).amax(2).mean(1) > 0.05).all(), "something moves, later too"


@pytest.mark.parametrize("camera", MOVES)
def test_poses_recur_bit_for_bit(camera):
    spec = world.sample_long(1, camera=camera)
    turn = spec.camera_turn
    position, rotation = camera_path(spec, 0, 1100)
    poses = torch.cat((position[:, None], rotation), 1)
    assert len(poses.unique(dim=0)) == turn + 1
    assert torch.equal(poses[1000], poses[1000 % (2 * turn)])
    end = turn - spec.camera_start
    assert all(torch.equal(poses[end + k], poses[end - k]) for k in range(end))
    assert not torch.equal(poses[end], poses[end + turn])


def test_what_stands_still_has_the_same_pixels_on_return():
    spec = world.sample_long(5, num_bodies=1, camera="pan right")
    first = spec.camera_turn - spec.camera_start
    near = world.render([spec], num_frames=first + 5, size=32, supersample=1)
    a, b = first - 4, first + 4
    floor = (near.ids_BFHW[0, [a, b]] == 0).all(0)
    assert floor.float().mean() > 0.5
    assert torch.equal(near.depth_BFHW[0, a][floor], near.depth_BFHW[0, b][floor])
    assert torch.equal(near.texels_BF2HW[0, a][:, floor].nan_to_num(), near.texels_BF2HW[0, b][:, floor].nan_to_num())
    change = (near.rgb_BF3HW[0, a] - near.rgb_BF3HW[0, b]).abs().amax(0)[floor]
    assert (change == 0).float().mean() > 0.9, "but for the body's shadow"


def test_points_are_those_that_the_camera_sees(filmed):
    _, out = filmed
    points = torch.cat((out.points_BF3HW, torch.ones_like(out.points_BF3HW[:, :, :1])), 2).double()
    seen = torch.einsum("bfij,bfjhw->bfihw", out.extrinsics_BF44.double()[:, :, :3], points)
    assert (seen[:, :, 2] - out.depth_BFHW).nan_to_num().abs().max() < 1e-2
    pixel = torch.einsum("ij,bfjhw->bfihw", out.intrinsics_33.double(), seen)
    v, u = torch.meshgrid(*[torch.arange(48) + 0.5] * 2, indexing="ij")
    near = out.depth_BFHW < 50
    assert (pixel[:, :, :2] / pixel[:, :, 2:] - torch.stack((u, v))).movedim(2, -1)[near].abs().max() < 1e-3
    assert torch.equal(out.points_BF3HW[:, :, 0].isnan(), out.depth_BFHW.isinf())
    floor = (out.ids_BFHW == 0) & near
    assert out.points_BF3HW[:, :, 2][floor].abs().max() < 1e-4
    assert torch.equal(out.texels_BF2HW[:, :, 0].isnan(), (out.ids_BFHW > 0) | out.depth_BFHW.isinf())
    assert torch.equal(out.disparity_BFHW > 0, out.depth_BFHW.isfinite())
    assert torch.equal(out.disparity_BFHW[near], 1 / out.depth_BFHW[near])


def test_flow_is_exact_where_camera_and_bodies_move(filmed):
    """The surface point of a pixel, moved with its body and projected by the next camera, is at pixel + flow."""
    specs, out = filmed
    for row, spec in enumerate(specs):
        points, ids = out.points_BF3HW[row, :-1].double(), out.ids_BFHW[row, :-1]
        moved = points.clone()
        for k, body in enumerate(spec.bodies):
            if body.shape == "ball" and body.event != "stays":
                ids = torch.where(ids == k + 1, 99, ids)  # balls roll, so their surface rotates
            step = out.positions_BFK3[row, 1:, k] - out.positions_BFK3[row, :-1, k]
            moved += (ids == k + 1)[:, None] * step[:, :, None, None].double()
        world_to_camera = out.extrinsics_BF44[row, 1:].double()
        seen = torch.einsum("fij,fjhw->fihw", world_to_camera[:, :3, :3], moved) + world_to_camera[:, :3, 3:, None]
        pixel = torch.einsum("ij,fjhw->fihw", out.intrinsics_33.double(), seen)
        v, u = torch.meshgrid(*[torch.arange(48) + 0.5] * 2, indexing="ij")
        expected = pixel[:, :2] / pixel[:, 2:] - torch.stack((u, v))
        known = (ids != 99) & (out.depth_BFHW[row, :-1] < 50)
        error = (out.flow_BF2HW[row] - expected).movedim(1, -1)[known]
        assert error.abs().max() < 2e-3
        assert out.flow_BF2HW[row].movedim(1, -1)[known].norm(dim=-1).mean() > 0.2, "the camera moves"


def test_an_endless_stream_of_several_scenes_is_their_render(filmed):
    specs, whole = filmed
    pieces = list(itertools.islice(world.stream(specs, None, size=48, supersample=1, chunk=4), 3))
    for name in ("rgb_BF3HW", "depth_BFHW", "ids_BFHW", "flow_BF2HW", "pose_BF34"):
        joined = torch.cat([getattr(piece, name) for piece in pieces], 1)
        assert torch.allclose(joined.double(), getattr(whole, name).double(), atol=1e-5, rtol=1e-5), name


def test_captions_follow_bodies_and_camera():
    spec = world.sample_long(4, num_bodies=1, camera="orbit left")
    assert world.caption_at(spec, 0) == world.simple_caption(spec)
    assert world.caption_at(spec, 0, seed=3) == world.caption(spec, 3)
    turn = spec.camera_turn - spec.camera_start
    said = [world.caption_at(spec, frame) for frame in range(200)]
    assert all("the camera orbits left" in text for text in said[:turn])
    assert all("the camera orbits right" in text for text in said[turn : turn + spec.camera_turn])
    position = Simulation([spec]).run(120).positions_BFK3[0, :, 0, :2]
    words = (("left", "right"), ("closer", "away"))
    axis = 0 if spec.bodies[0].velocity[0] else 1
    for frame, step in enumerate(position.diff(dim=0)[:, axis].tolist()):
        turns = step * float(position[frame, axis] - position[max(0, frame - 1), axis]) < 0
        assert turns or words[axis][step > 0] in said[frame].partition(",")[0] or abs(step) < 0.07


def test_shades_hold_the_colours_of_bodies():
    spec = world.sample_long(0, num_bodies=2)
    out = world.render([spec], num_frames=2, size=64, supersample=1)
    for k, body in enumerate(spec.bodies):
        pixels = out.rgb_BF3HW.movedim(2, -1)[out.ids_BFHW == k + 1]
        table = world.shades([body.colour])[0]
        assert torch.cdist(pixels, table).amin(1).max() < 0.09
    assert world.shades(count=3).shape == (8, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"num_bodies": 4}, "num_bodies must be 1, 2 or 3, not 4"),
        ({"camera": "dolly return"}, "Unknown camera 'dolly return' of a long scene"),
        ({"absence": "sleeps"}, "Known: leaves, hidden"),
        ({"absence": "hidden", "num_bodies": 1}, "a body hides behind another one"),
        ({"split": "most"}, "Known: train, held_out, all"),
    ],
)
def test_long_scenes_that_cannot_be_drawn(arguments, text):
    with pytest.raises(UserError, match=text):
        world.sample_long(0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"camera_start": 3}, "camera_start=3 without camera_turn"),
        ({"camera": "pan left", "camera_turn": 0}, "camera_turn=0"),
        ({"camera": "pan left", "camera_turn": 4.5}, "whole frames"),
        ({"camera": "pan left", "camera_turn": 4, "camera_start": -1}, "camera_start=-1"),
        ({"camera_turn": 4}, "Camera 'static' with camera_turn=4"),
        ({"camera": "dolly return", "camera_turn": 4}, "only pan, orbit, dolly in"),
    ],
)
def test_paths_that_no_camera_takes(arguments, text):
    with pytest.raises(UserError, match=text):
        Spec(bodies=world.sample(0).bodies, **arguments)


def test_what_needs_geometry_says_so():
    out = world.render([world.sample(0)], num_frames=1, size=8, geometry=False)
    for name in ("disparity_BFHW", "points_BF3HW", "texels_BF2HW"):
        with pytest.raises(UserError, match="hold no geometry"):
            getattr(out, name)
    with pytest.raises(UserError, match="at least one spec"):
        next(world.stream([], 5))
    with pytest.raises(UserError, match="size=0"):
        next(world.stream(world.sample(0), 5, size=0))
