"""The renderer and its motion, compared with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.world.camera import FOCAL
from postgen.world.physics import WALL_X, WALL_Y
from postgen.world.plan import GRAVITY
from postgen.world.spec import Body, Spec

SIZE = 32


def draw(*bodies, frames=17, size=SIZE, **scene):
    return world.render([Spec(bodies=bodies, **scene)], num_frames=frames, size=size, supersample=1)


def ball(**values):
    return Body(**{"colour": "red", "shape": "ball", **values})


def test_shapes_types_and_ranges():
    specs = [world.sample(seed, num_bodies=n, num_frames=9) for seed, n in ((1, 1), (2, 3))]
    out = world.render(specs, size=SIZE, supersample=2)
    assert out.rgb_BF3HW.shape == (2, 9, 3, SIZE, SIZE)
    assert out.rgb_BF3HW.dtype == torch.float32
    assert 0 <= out.rgb_BF3HW.min() < out.rgb_BF3HW.max() <= 1
    assert out.depth_BFHW.shape == out.ids_BFHW.shape == (2, 9, SIZE, SIZE)
    assert out.depth_BFHW.min() > 0
    assert out.ids_BFHW.dtype == torch.uint8
    assert [set(ids.unique().tolist()) for ids in out.ids_BFHW] == [{0, 1}, {0, 1, 2, 3}]
    assert out.flow_BF2HW.shape == (2, 8, 2, SIZE, SIZE)
    assert out.flow_BF2HW.isfinite().all()
    assert out.pose_BF34.shape == (2, 9, 3, 4)
    assert out.positions_BFK3.shape == (2, 9, 3, 3)


def test_without_geometry_and_one_frame():
    out = world.render([world.sample(0)], num_frames=1, size=8, supersample=1, geometry=False)
    assert (out.depth_BFHW, out.ids_BFHW, out.flow_BF2HW) == (None, None, None)
    assert world.render([world.sample(0)], num_frames=1, size=8).flow_BF2HW.shape == (1, 0, 2, 8, 8)


def test_a_scene_looks_the_same_alone_and_in_a_batch():
    specs = [world.sample(seed, num_bodies=n) for seed, n in ((3, 1), (4, 3))]
    both = world.render(specs, size=SIZE, supersample=1, num_frames=5)
    for index, spec in enumerate(specs):
        alone = world.render([spec], size=SIZE, supersample=1, num_frames=5)
        assert torch.allclose(both.rgb_BF3HW[index], alone.rgb_BF3HW[0], atol=1e-5)
        assert torch.equal(both.ids_BFHW[index], alone.ids_BFHW[0])


def test_arguments_that_are_refused():
    spec = world.sample(0)
    for values in ({"size": 0}, {"supersample": 0}, {"num_frames": 0}):
        with pytest.raises(UserError, match="each must be at least 1"):
            world.render([spec], **values)
    with pytest.raises(UserError, match="at least one spec"):
        world.render([])
    with pytest.raises(UserError, match="chunk=0 must be at least 1"):
        next(world.stream(spec, 5, chunk=0))


@pytest.mark.parametrize("chunk", [1, 4, 17])
@pytest.mark.parametrize("camera", ["static", "orbit left"])
def test_joined_pieces_are_the_whole_clip(chunk, camera):
    spec = world.sample(5, num_bodies=2, camera=camera)
    whole = world.render([spec], num_frames=11, size=SIZE, supersample=1)
    parts = list(world.stream(spec, 11, size=SIZE, supersample=1, chunk=chunk))
    assert [p.rgb_BF3HW.shape[1] for p in parts] == [min(chunk, 11 - low) for low in range(0, 11, chunk)]
    for name in ("rgb_BF3HW", "positions_BFK3", "pose_BF34", "contact_BFK", "depth_BFHW", "ids_BFHW", "flow_BF2HW"):
        joined = torch.cat([getattr(p, name) for p in parts], 1)
        assert joined.shape == getattr(whole, name).shape, name
        assert torch.allclose(joined.double(), getattr(whole, name).double(), atol=1e-5, rtol=1e-5), name


def test_static_floor_keeps_its_depth_and_has_no_flow():
    out = draw(ball(position=(-1.0, 0.0, 0.6), velocity=(1.0, 0.0, 0.0)))
    floor = (out.ids_BFHW[:, :-1] == 0) & (out.ids_BFHW[:, 1:] == 0)
    before, after = out.depth_BFHW[:, :-1][floor], out.depth_BFHW[:, 1:][floor]
    assert torch.equal(before, after)
    assert out.flow_BF2HW.movedim(2, -1)[floor].abs().max() < 1e-3


def test_flow_of_a_sliding_cube_is_its_projected_displacement():
    velocity = torch.tensor([0.8, 0.6, 0.0])
    cube = Body(colour="blue", shape="cube", position=(-0.8, -0.5, 0.51), velocity=tuple(velocity.tolist()), yaw=0.4)
    out = draw(cube, frames=5, size=64)
    rotation, origin = out.pose_BF34[0, 0, :, :3].double(), out.pose_BF34[0, 0, :, 3].double()
    frame, row, column = torch.nonzero(out.ids_BFHW[0, :-1] == 1, as_tuple=True)
    at = torch.stack((column, row), -1).double() + 0.5
    ray = torch.cat(((at / 32 - 1) / FOCAL, torch.ones(len(at), 1, dtype=torch.double)), -1)
    point = origin + (ray * out.depth_BFHW[0, frame, row, column, None]) @ rotation
    seen = (point + velocity.double() / 8 - origin) @ rotation.T
    expected = (seen[:, :2] / seen[:, 2:] * FOCAL + 1) * 32 - at
    assert len(at) > 200
    assert (out.flow_BF2HW[0, frame, :, row, column] - expected).abs().max() < 1e-3


def test_flow_of_a_rolling_ball_follows_its_surface():
    speed, radius = 1.2, 0.8
    body = ball(size="large", position=(-0.8, 0.2, radius), velocity=(speed, 0.0, 0.0))
    out = draw(body, frames=2, size=96)
    rotation, origin = out.pose_BF34[0, 0, :, :3].double(), out.pose_BF34[0, 0, :, 3].double()
    row, column = torch.nonzero(out.ids_BFHW[0, 0] == 1, as_tuple=True)
    at = torch.stack((column, row), -1).double() + 0.5
    ray = torch.cat(((at / 48 - 1) / FOCAL, torch.ones(len(at), 1, dtype=torch.double)), -1)
    point = origin + (ray * out.depth_BFHW[0, 0, row, column, None]) @ rotation
    angle, centre = speed / 8 / radius, torch.tensor(body.position).double()
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]).double()
    arm = (point - centre) @ turn.T
    moved = centre + torch.tensor([speed / 8, 0, 0]) + arm
    seen = (moved - origin) @ rotation.T
    to = (seen[:, :2] / seen[:, 2:] * FOCAL + 1) * 48
    assert (out.flow_BF2HW[0, 0].movedim(0, -1)[row, column] - (to - at)).abs().max() < 0.02
    in_sight = ((origin - moved) * arm).sum(-1) > 0
    cell = to[in_sight].long()
    assert in_sight.float().mean() > 0.9
    assert (out.ids_BFHW[0, 1, cell[:, 1], cell[:, 0]] == 1).float().mean() > 0.97


@pytest.mark.parametrize("scene", [{"event": "falls"}, {"camera": "orbit right"}, {"camera": "dolly in"}])
def test_flow_leads_to_the_same_body_and_depth(scene):
    spec = world.sample(8, num_bodies=1, **scene)
    out = world.render([spec], size=96, supersample=1, num_frames=9)
    ids, depth = out.ids_BFHW[0], out.depth_BFHW[0]
    frame, row, column = torch.nonzero(ids[:-1] == 1, as_tuple=True)
    flow = out.flow_BF2HW[0, frame, :, row, column]
    to = torch.stack((column, row), -1) + flow.round().long()
    inside = ((to >= 0) & (to < 96)).all(-1)
    frame, to = frame[inside], to[inside]
    # At the outline, some surface points rotate out of sight, and their pixels land next to the body.
    assert (ids[frame + 1, to[:, 1], to[:, 0]] == 1).float().mean() > 0.97
    assert depth[frame + 1, to[:, 1], to[:, 0]].isfinite().all()


def test_depth_of_a_balls_centre():
    size = 65
    body = ball(position=(0.2, -0.4, 0.8), size="large")
    out = draw(body, frames=1, size=size)
    rotation, origin = out.pose_BF34[0, 0, :, :3], out.pose_BF34[0, 0, :, 3]
    offset = torch.tensor(body.position) - origin
    seen = rotation @ offset
    column, row = ((seen[:2] / seen[2] * FOCAL + 1) * size / 2).long().tolist()
    ray = torch.tensor([(column + 0.5) * 2 / size - 1, (row + 0.5) * 2 / size - 1, FOCAL]) / FOCAL
    assert out.ids_BFHW[0, 0, row, column] == 1
    distance = float(out.depth_BFHW[0, 0, row, column] * ray.norm())
    assert distance == pytest.approx(float(offset.norm()) - body.radius, abs=5e-3)


def test_free_fall():
    out = draw(ball(event="falls", position=(0.0, 0.0, 2.6)), frames=10, size=8)
    seconds = torch.arange(10) / 8
    expected = (2.6 - 0.5 * GRAVITY * seconds**2).clamp_min(0.6)
    assert (out.positions_BFK3[0, :, 0, 2] - expected).abs().max() < 1e-3


def test_a_bounce_keeps_its_share_of_speed():
    height, restitution = 1.5, 0.9
    body = ball(event="bounces", position=(0.0, 0.0, 0.6 + height), restitution=restitution)
    z = draw(body, frames=120, size=4, fps=32).positions_BFK3[0, :, 0, 2] - 0.6
    landing = math.sqrt(2 * height / GRAVITY) * 32
    second = z[int(landing) + 2 : int(landing * (1 + 2 * restitution)) - 1]
    assert z[: int(landing) + 2].min() < 0.03
    assert float(second.max()) == pytest.approx(restitution**2 * height, rel=0.03)


@pytest.mark.parametrize("sizes", [("medium", "medium"), ("small", "large")])
def test_a_collision_keeps_momentum(sizes):
    first = ball(event="collides", partner=1, size=sizes[0], velocity=(1.5, 0.0, 0.0))
    other = ball(colour="blue", size=sizes[1])
    first = ball(**{**fields(first), "position": (-2.0, 0.0, first.radius)})
    other = ball(**{**fields(other), "position": (0.0, 0.0, other.radius)})
    x = draw(first, other, frames=17, size=4).positions_BFK3[0, :, :, 0]
    speed = x.diff(dim=0) * 8
    mass = torch.tensor([first.radius**3, other.radius**3])
    assert speed[0].tolist() == pytest.approx([1.5, 0.0], abs=1e-3)
    assert float(speed[-1] @ mass) == pytest.approx(float(speed[0] @ mass), rel=1e-3)
    assert speed[-1, 1] > 0.3
    assert float(speed[-1, 1] - speed[-1, 0]) == pytest.approx(0.9 * 1.5, rel=0.05)


def fields(body):
    return {name: getattr(body, name) for name in ("colour", "shape", "size", "event", "partner", "velocity")}


def test_dolly_return_comes_back():
    spec = Spec(bodies=(ball(),), camera="dolly return", camera_amount=0.25)
    pose = world.render([spec], size=8, supersample=1).pose_BF34[0]
    assert torch.allclose(pose[0], pose[16], atol=1e-6)
    assert torch.allclose(
        pose[8, :, 3] - pose[0, :, 3], pose[8, 2, :3] * (pose[8, :, 3] - pose[0, :, 3]).norm(), atol=1e-4
    )
    assert (pose[8, :, 3] - pose[0, :, 3]).norm() > 1


@pytest.mark.parametrize("camera", ["pan left", "orbit right", "dolly in", "dolly return"])
def test_rotations_of_the_camera_are_rotations(camera):
    rotation = world.render([world.sample(2, camera=camera)], size=4, num_frames=40).pose_BF34[0, :, :, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(40, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(40), atol=1e-5)


def test_long_clips_stay_inside_the_walls():
    specs = [world.sample(seed, num_bodies=2, camera="static") for seed in range(12)]
    out = world.render(specs, num_frames=200, size=4, supersample=1, geometry=False)
    x, y, z = out.positions_BFK3.unbind(-1)
    assert x.abs().max() < WALL_X + 0.1
    assert y.abs().max() < WALL_Y + 0.1
    assert 0 < z.min() < z.max() < 4
    assert (out.positions_BFK3[:, 100:].diff(dim=1).norm(dim=-1) > 0.05).any()
