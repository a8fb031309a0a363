"""Placed memory: exact identities of the latents that a coming frame sees."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.worldweaver.pinhole import Pinhole
from postgen.worldweaver.placed import PlacedMemory
from postgen.worldweaver.state import RolloutState
from tests.worldweaver.oracle import Mixer, begun, rollout

FOCAL = 2.0
CELLS, PIXELS = 6, 24
STRAIGHT = torch.eye(3, dtype=torch.float64)


def pose(x=0.0, y=0.0, z=0.0, rotation=STRAIGHT):
    position = torch.tensor([[x], [y], [z]], dtype=torch.float64)
    return torch.cat([rotation, position], 1)[None, None]


def latents(seed=0, frames=1, rows=1):
    return torch.randn(rows, 4, frames, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))


def wall(depth=8.0):
    return torch.full((1, 1, PIXELS, PIXELS), depth)


def memory(**words):
    words = {"mem_noise": 0.0, "newest": 99, **words}
    return PlacedMemory(Pinhole(focal=FOCAL), **words)


def split(seen):
    return seen[:, :-1, 0], seen[:, -1, 0]


@cache
def scene():
    """Return a scene with a moving camera: RGB as latents of 12 x 12 cells, exact depth and cameras."""
    spec = world.sample(36, num_frames=17)
    assert spec.camera == "pan right"
    frames = world.render([spec], num_frames=17, size=96)
    z = torch.nn.functional.avg_pool2d(frames.rgb_BF3HW[0], 8).movedim(0, 1)[None]
    return z, frames.depth_BFHW, frames.pose_BF34


def test_the_same_pose_is_the_identity():
    """For an equal camera the latents are bitwise equal for any depth; cells without depth are 0."""
    z, depth, poses = scene()
    bank = PlacedMemory(Pinhole(), mem_noise=0.0, modalities=1)
    bank.add(z[:, :, :1], depth[:, :1], poses[:, :1], 0)
    found, mask = split(bank.read(poses[:, :1], 9))
    assert 0.5 < mask.mean() < 1
    known = depth[0, 0].isfinite().view(12, 8, 12, 8).float().mean((1, 3)) >= 0.4
    assert torch.equal(mask[0].bool(), known)
    assert torch.equal(found, torch.where(known, z[:, :, 0], 0))


@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, 1), (-2, 1)])
def test_a_pan_by_whole_cells_is_an_exact_shift(x, y):
    z, step = latents(), 2 * 8.0 / FOCAL / CELLS  # width of a cell on a wall at distance 8
    bank = memory()
    bank.add(z, wall(), pose(), 0)
    found, mask = split(bank.read(pose(x * step, y * step), 1))
    shifted = z[:, :, 0].roll((-y, -x), (2, 3))
    seen = torch.ones(CELLS, CELLS).roll((0, 0), (0, 1))
    seen[:, CELLS - x if x > 0 else 0 : CELLS if x > 0 else -x] = 0
    seen[CELLS - y if y > 0 else 0 : CELLS if y > 0 else -y] = 0
    assert torch.equal(mask[0], seen)
    assert torch.equal(found, shifted * seen)


def test_half_a_cell_is_the_mean_of_two():
    z, step = latents(), 2 * 8.0 / FOCAL / CELLS
    bank = memory()
    bank.add(z, wall(), pose(), 0)
    found, _ = split(bank.read(pose(step / 2), 1))
    torch.testing.assert_close(found[..., :-1], (z[:, :, 0, :, :-1] + z[:, :, 0, :, 1:]) / 2)


def test_what_is_nearer_wins():
    """A near screen hides a wall of another frame, in either order; for one surface the newer frame is used."""
    far, near, again = (latents(1), pose(z=5.0), 3.0), (latents(2), pose(), 2.0), latents(3)
    for order in ((far, near), (near, far)):
        bank = memory()
        for number, (z, camera, depth) in enumerate(order):
            bank.add(z, wall(depth), camera, number)
        found, mask = split(bank.read(pose(), 5))
        assert mask.all()
        assert torch.equal(found, near[0][:, :, 0])
        assert torch.equal(bank.read(pose(), 5), bank.read(pose(), 5))
    bank.add(again, wall(2.05), pose(), 2)
    assert torch.equal(split(bank.read(pose(), 5))[0], again[:, :, 0])


def test_an_occluded_surface_is_not_shown_for_what_hides_it():
    """A near post hides part of the wall: for a camera at its side, that part is unknown and the rest is placed."""
    z, depth = latents(), wall(8.0)
    depth[..., 8:16] = 2.0  # the middle two columns of cells
    bank = memory()
    bank.add(z, depth, pose(), 0)
    step = 2 * 2.0 / FOCAL / CELLS  # width of a cell at the distance of the post
    found, mask = split(bank.read(pose(step), 1))
    assert torch.equal(found[..., 1:3], z[:, :, 0, :, 2:4])  # the post moves by one cell, the wall by a quarter
    assert mask[..., 1:3].all()
    assert not mask[..., 3].any()
    assert mask[..., 0].all()


def test_moving_the_world_changes_nothing():
    z, depth, poses = scene()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turn = turn * torch.linalg.det(turn)
    moved = torch.cat(
        [poses[..., :3].double() @ turn.T, turn @ poses[..., 3:].double() + torch.tensor([[3.0], [-7.0], [2.0]])], -1
    )
    results = []
    for cameras in (poses, moved):
        bank = PlacedMemory(Pinhole(), newest=99, mem_noise=0.0, modalities=1)
        bank.add(z[:, :, [0, 8]], depth[:, [0, 8]], cameras[:, [0, 8]], 0)
        results.append(bank.read(cameras[:, [4, 16]], 9))
    same = results[0][:, -1] == results[1][:, -1]
    assert same.float().mean() > 0.995  # points on the border of two pixels may differ
    torch.testing.assert_close(*(each.movedim(1, -1)[same] for each in results), rtol=0, atol=1e-5)


def test_it_is_nearer_to_the_truth_than_the_frame_itself():
    """With a panning camera, placed latents have a tenth of the error of the nearest stored frame without warping."""
    z, depth, poses = scene()
    bank = PlacedMemory(Pinhole(), mem_noise=0.0, modalities=1)
    bank.add(z[:, :, :9], depth[:, :9], poses[:, :9], 0)
    found, mask = split(bank.read(poses[:, 16:17], 16))
    known = mask.bool()[:, None].expand_as(found)
    placed = (found - z[:, :, 16])[known].square().mean()
    copied = (z[:, :, 8] - z[:, :, 16])[known].square().mean()
    assert mask.mean() > 0.4
    assert placed < 0.1 * copied


def test_a_body_that_moves_is_not_placed():
    """A ball rolls under a fixed camera: at its earlier positions the floor that was seen later is placed."""
    spec = world.parse("a red ball rolls left")
    frames = world.render([spec], num_frames=13, size=96)
    z = torch.nn.functional.avg_pool2d(frames.rgb_BF3HW[0], 8).movedim(0, 1)[None]
    ball = torch.nn.functional.avg_pool2d((frames.ids_BFHW[0, :, None] > 0).float(), 8)[:, 0]
    bank = PlacedMemory(Pinhole(), newest=99, mem_noise=0.0, modalities=1)
    bank.add(z, frames.depth_BFHW, frames.pose_BF34, 0)
    found, mask = split(bank.read(frames.pose_BF34[:, :1], 20))
    left = (ball[:-1].amax(0) > 0) & (ball[-1] == 0)
    red = (found[0, 0] - found[0, 1])[left]
    assert (z[0, 0] - z[0, 1]).amax(0)[left].max() > 0.3
    assert red.max() < 0.1
    assert mask[0][left].all()


def test_storage_is_bounded_by_what_is_seen():
    bank = memory(newest=2, voxel=4.0)
    for number in range(40):
        bank.add(latents(number), wall(), pose(), number)
    assert len(bank) == 2
    found, mask = split(bank.read(pose(), 50))
    assert torch.equal(found, latents(39)[:, :, 0])
    assert mask.all()
    # Frames of other places are kept up to the capacity.
    bank = memory(newest=1, voxel=4.0, capacity=5)
    for number in range(12):
        bank.add(latents(number), wall(), pose(100.0 * number), number)
    assert len(bank) == 5
    assert bank.read(pose(1100.0), 20)[:, -1].all()


def test_noise_is_on_colour_and_by_frame():
    bank = memory(mem_noise=0.3)
    z = latents(rows=2)
    bank.add(z, wall().expand(2, -1, -1, -1), pose().expand(2, -1, -1, -1), 0)
    cameras = pose().expand(2, 3, -1, -1)
    found = bank.read(cameras, 5)
    assert torch.equal(found[:, 2:4], z[:, 2:].expand(-1, -1, 3, -1, -1))
    noise = (found[:, :2] - 0.7 * z[:, :2]) / 0.3
    assert 0.8 < noise.std() < 1.2
    assert not torch.allclose(noise[0], noise[1])
    assert not torch.allclose(noise[:, :, 0], noise[:, :, 1])
    assert torch.equal(bank.read(cameras[:, :1], 6), found[:, :, 1:2])
    alone = memory(mem_noise=0.3, seeds=[1])
    alone.add(z[1:], wall(), pose(), 0)
    assert torch.equal(alone.read(cameras[1:], 5), found[1:])


def test_a_state_is_taken_up():
    z, depth, poses = scene()
    bank = PlacedMemory(Pinhole(), modalities=1)
    assert bank.read(poses, 0) is None
    assert bank.state_dict() == {}
    bank.add(z[:, :, :5], depth[:, :5], poses[:, :5], 0)
    other = PlacedMemory(Pinhole(), modalities=1)
    other.load_state_dict({**bank.state_dict(), "disparity.low": torch.zeros(1)})
    for each in (bank, other):
        each.add(z[:, :, 5:8], depth[:, 5:8], poses[:, 5:8], 5)
    assert torch.equal(bank.read(poses[:, 9:11], 9), other.read(poses[:, 9:11], 9))


def test_what_does_not_fit_is_refused():
    bank = memory()
    with pytest.raises(UserError, match=r"give \(batch, channels, frames, h, w\) and \(batch, frames, H, W\)"):
        bank.add(latents(), wall()[0], pose(), 0)
    with pytest.raises(UserError, match=r"depth has \(25, 24\) pixels for \(6, 6\) cells"):
        bank.add(latents(), torch.ones(1, 1, 25, 24), pose(), 0)
    with pytest.raises(UserError, match=r"poses have shape \(1, 2, 3, 4\): give \(1, 1, 3, 4\)"):
        bank.add(latents(), wall(), pose().expand(1, 2, 3, 4), 0)
    with pytest.raises(UserError, match="2 seeds for 1 rows"):
        memory(seeds=[1, 2]).add(latents(), wall(), pose(), 0)
    bank.add(latents(), wall(), pose(), 0)
    with pytest.raises(UserError, match=r"poses have shape \(3, 4\): give \(1, frames, 3, 4\)"):
        bank.read(pose()[0, 0], 0)


def test_a_rollout_with_placed_memory_resumes_to_the_bit(tmp_path):
    """The network receives placed memory, and the saved state contains the stored frames."""
    cameras = pose().expand(1, 40, -1, -1)

    class Seeing(Mixer):
        def predict(self, z, levels, condition, guidance):
            answer = super().predict(z, levels, condition, guidance)
            if (placed := condition.get("placed")) is not None:
                answer[:, :, -placed.shape[2] :] += placed[:, :-1]
            return answer

    def run(state=None, groups=7):
        bank = memory(mem_noise=0.12)

        def extras(start, stop):
            seen = bank.read(cameras[:, start:stop], start)
            return {} if seen is None else {"placed": seen}

        made = rollout(Seeing(), extras=extras)
        if state is None:
            state = begun(made, shape=(4, CELLS, CELLS), num_latents=14)
        bank.load_state_dict(state.extra)

        def keep(group):
            frames = slice(group.start_frame, group.start_frame + group.latents.shape[2])
            bank.add(group.latents, wall().expand(1, 2, -1, -1), cameras[:, frames], group.start_frame)
            state.extra |= bank.state_dict()

        return [group.latents for group in islice(made.groups(state, on_group=keep), groups)], state

    whole, _ = run()
    first, state = run(groups=3)
    state.save(tmp_path)
    rest, _ = run(RolloutState.load(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole, strict=True))
    plain = rollout(Mixer())
    without = list(plain.groups(begun(plain, shape=(4, CELLS, CELLS), num_latents=14)))
    assert not torch.allclose(without[-1].latents, whole[-1])
