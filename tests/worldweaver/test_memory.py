"""The memory bank: which frames it selects, their noise, and which frames it drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from postgen.errors import UserError
from postgen.worldweaver.levels import Role
from postgen.worldweaver.memory import MemoryBank, capacity_for
from postgen.worldweaver.selection import POLICIES, CameraOverlap, DepthSimilarity, Query, policy_of, register_policy
from tests.worldweaver.oracle import clean


def filled(frames, group=2, rows=1, **words):
    bank, video = MemoryBank(**words), clean(frames, rows)
    for start in range(0, frames, group):
        bank.add(video[:, :, start : start + group], start)
    return bank, video


@pytest.mark.parametrize("policy", ["recent", "logspace", "uniform", "depth_sim"])
def test_a_window_has_the_same_frames_count_once_filled(policy):
    bank, video = MemoryBank(long=4, short=2, policy=policy), clean(30, rows=2)
    assert bank.select() is None
    for frame in range(30):
        bank.add(video[:, :, frame : frame + 1], frame)
        window = bank.select(Query(group=2))
        count = min(frame + 1, 6)
        assert window.z.shape == (2, 4, count, 2, 3)
        assert window.levels.role.tolist() == [Role.LONG] * max(0, count - 2) + [Role.SHORT] * min(count, 2)
        index = window.frame_index
        assert bool((index[:, 1:] > index[:, :-1]).all())
        assert index[:, 0].tolist() == [0, 0]
        assert index[:, -1].tolist() == [frame, frame]


def test_which_frames_a_policy_shows():
    query = Query(group=2)
    for policy, expected in {
        "recent": [0, 35, 36, 37, 38, 39],
        "logspace": [0, 30, 34, 36, 38, 39],  # 2, 4 and 8 frames before the short memory
        "uniform": [0, 1, 19, 37, 38, 39],
    }.items():
        bank, _ = filled(40, policy=policy)
        assert bank.select(query).frame_index.tolist() == [expected]
    bank, _ = filled(40, long=2, short=1, sink=0, policy="uniform")
    assert bank.select(query).frame_index.tolist() == [[0, 38, 39]]
    bank, _ = filled(40, long=2, short=0, sink=1)
    assert bank.select(query).frame_index.tolist() == [[0, 37]]


def test_noise_is_on_colour_of_long_memory_only():
    bank, video = filled(12, rows=2, modalities=2)
    window = bank.select()
    clean_z = torch.stack([video[row][:, window.frame_index[row]] for row in range(2)])
    assert torch.equal(window.z[:, 2:], clean_z[:, 2:])
    assert torch.equal(window.z[:, :, 4:], clean_z[:, :, 4:])
    noise = (window.z[:, :2, :4] - 0.88 * clean_z[:, :2, :4]) / 0.12
    assert 0.7 < noise.std() < 1.3
    assert (noise.flatten(1)[0] - noise.flatten(1)[1]).abs().min() > 0
    again = bank.select()
    assert not torch.equal(again.z[:, :2, :4], window.z[:, :2, :4])
    twin, _ = filled(12, rows=2)
    assert torch.equal(twin.select().z, window.z)
    twin.reset()
    assert (len(twin), twin.select()) == (0, None)
    three, _ = filled(12, modalities=1, mem_noise=0.0)
    assert torch.equal(three.select().z[0], clean(12)[0][:, three.select().frame_index[0]])


def test_noise_of_a_model_with_alpha_bars():
    bank, video = filled(12, mem_noise=0.3)
    flow = filled(12, mem_noise=0.3)[0].select()
    bars = bank.select(alpha_bar=lambda sigma: (1 - sigma).square())
    index = bars.frame_index[0, :4]
    truth = video[:, :2, index]
    noise = (flow.z[:, :2, :4] - 0.7 * truth) / 0.3
    torch.testing.assert_close(bars.z[:, :2, :4], 0.7 * truth + (1 - 0.49) ** 0.5 * noise)


def test_eviction_keeps_the_ages_spaced_by_their_logarithm():
    bank, video = MemoryBank(capacity=16), clean(1)
    for frame in range(2000):
        bank.add(video, frame)
        assert len(bank) <= 16
    index = torch.tensor(bank.frame_index, dtype=torch.float64)
    assert index[:1].tolist() == [0]
    assert index[-3:].tolist() == [1997, 1998, 1999]
    ratios = (2000 - index[:-1]).log().diff().neg()
    # 16 frames cover ages up to 2000; even spacing would be a factor of 1.66. There are no ages between 1, 2 and 3.
    assert ratios[:-3].exp().min() > 1.2
    assert ratios.exp().max() < 2.5


def test_sink_short_memory_and_selection_are_not_evicted():
    bank, video = MemoryBank(long=3, short=2, sink=1, capacity=6, policy="uniform"), clean(1)
    for frame in range(40):
        before = set(bank.frame_index)
        window = bank.select()
        chosen = [] if window is None else window.frame_index[0, window.levels.role == Role.LONG].tolist()
        bank.add(video, frame)
        gone = before - set(bank.frame_index)
        assert not gone & {0, frame - 1, *chosen}
        assert len(gone) == (1 if frame >= 6 else 0)


def test_views_do_not_keep_what_they_are_views_of():
    bank = MemoryBank(dtype=torch.bfloat16, device="cpu")
    bank.add(clean(50), 0)
    (z,) = {frame.z.untyped_storage().nbytes() for frame in bank._frames}
    assert z == 4 * 2 * 3 * 2
    assert bank.select().z.dtype == torch.float32


def test_depth_finds_the_place_again_whatever_the_colour():
    """Depth of each row equals that of one earlier frame, while RGB equals that of another."""
    bank, video = MemoryBank(long=2, short=1, policy="depth_sim"), clean(20, rows=2)
    video[0, 2:, 19], video[1, 2:, 19] = 3 * video[0, 2:, 6], 2 * video[1, 2:, 11]
    video[:, :2, 19] = video[:, :2, 3]
    for frame in range(20):
        bank.add(video[:, :, frame : frame + 1], frame)
    assert bank.select(Query(group=1)).frame_index.tolist() == [[0, 6, 19], [0, 11, 19]]


def test_depth_choices_stand_apart():
    frames = clean(1).expand(1, 4, 20, 2, 3).clone()
    bank = MemoryBank(long=4, short=1, policy=DepthSimilarity(apart=4))
    bank.add(frames, 0)
    # All frames are equal: the newest is selected first, then frames at least four frames apart.
    assert bank.select().frame_index.tolist() == [[0, 10, 14, 18, 19]]
    bank = MemoryBank(long=4, short=1, policy=DepthSimilarity(apart=100))
    bank.add(frames, 0)
    assert bank.select().frame_index.tolist() == [[0, 16, 17, 18, 19]]
    bare = MemoryBank(policy="depth_sim", modalities=1)
    bare.add(clean(9), 0)
    with pytest.raises(UserError, match="depth_sim compares depth latents"):
        bare.select()
    unknown = MemoryBank(policy="depth_sim")
    unknown.add(clean(9), 0, unknown=["depth"])
    with pytest.raises(UserError, match="depth_sim compares depth latents"):
        unknown.select()


def test_hidden_modalities_are_noise_in_a_window_and_part_of_the_state():
    bank, video = filled(6, long=2, short=2, mem_noise=0.0, modalities=2, hidden=["depth"])
    window = bank.select()
    shown = video[:, :, window.frame_index[0]]
    assert torch.equal(window.z[:, :2], shown[:, :2])
    assert not torch.isclose(window.z[:, 2:], shown[:, 2:]).any()
    assert window.levels.sigma[0].tolist() == [[0.0, 1.0]] * 4
    again = MemoryBank(**bank.settings)
    again.load_state_dict(bank.state_dict())
    assert again.hidden == ("depth",)
    with pytest.raises(UserError, match=r"with hidden=\['depth'\] does not fit a memory bank with hidden=\[\]"):
        MemoryBank(2, 2, mem_noise=0.0).load_state_dict(bank.state_dict())
    with pytest.raises(UserError, match=r"hidden modalities \['flow'\] are not allowed: choose from depth"):
        MemoryBank(hidden=["flow"])


def turned(angles):
    """Return cameras at one position, rotated about the vertical axis, (1, n, 3, 4)."""
    angle = torch.tensor(angles)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    right = torch.stack([angle.cos(), angle.sin(), zero], -1)
    forward = torch.stack([-angle.sin(), angle.cos(), zero], -1)
    rotation = torch.stack([right, torch.stack([zero, zero, -one], -1), forward], -2)
    return torch.cat([rotation, torch.zeros(len(angles), 3, 1)], -1)[None]


def test_cameras_that_saw_what_will_be_seen():
    angles = [0.1 * frame for frame in range(20)]
    bank = MemoryBank(long=3, short=1, policy=CameraOverlap(age_weight=0.0))
    bank.add(clean(20), 0, poses=turned(angles))
    assert 5 in bank.select(Query(poses=turned([0.5]))).frame_index[0]
    # With two cameras far apart, a view that one frame saw does not count again, so the other view comes next.
    wide = bank.select(Query(poses=turned([0.2, 1.5]))).frame_index.tolist()
    assert wide == [[0, 2, 15, 19]]
    with pytest.raises(UserError, match="the policy camera needs the camera of every frame"):
        bank.select()
    # A much newer frame with a slightly smaller overlap is preferred.
    aged = MemoryBank(long=2, short=1, policy=CameraOverlap(age_weight=0.9))
    aged.add(clean(20), 0, poses=turned([0.5 if frame == 2 else 0.55 if frame == 18 else 3.0 for frame in range(20)]))
    assert aged.select(Query(poses=turned([0.5]))).frame_index.tolist() == [[0, 18, 19]]


def test_the_world_has_cameras_of_this_kind():
    from postgen import world

    poses = world.render([world.sample(0, num_frames=5)], num_frames=5, size=8, geometry=False).pose_BF34
    bank = MemoryBank(long=2, short=1, policy="camera")
    bank.add(clean(5), 0, poses=poses)
    assert bank.select(Query(poses=poses[:, :1])).frame_index.shape == (1, 3)
    overlap = CameraOverlap()
    points = (poses[:, 0, :, :3].double().mT @ overlap._grid() + poses[:, 0, :, 3:].double()).mT
    assert overlap._sees(poses[:, 0].double(), points).all()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_state_is_taken_up(policy):
    words = {"long": 3, "short": 2, "capacity": 9, "policy": policy, "mem_noise": 0.2}
    bank = MemoryBank(**words)
    bank.seed([5])
    bank.add(clean(9), 0, poses=turned([0.1 * frame for frame in range(9)]))
    query = Query(poses=turned([0.3]))
    bank.select(query)
    other = MemoryBank(**bank.settings)
    other.load_state_dict(bank.state_dict())
    first, second = bank.select(query), other.select(query)
    assert torch.equal(first.z, second.z)
    assert torch.equal(first.frame_index, second.frame_index)
    assert bank.state_dict()["selected"] == other.state_dict()["selected"]
    with pytest.raises(UserError, match=r"a state with mem_noise=0.2 does not fit a memory bank with mem_noise=0.12"):
        MemoryBank(**{**words, "mem_noise": 0.12}).load_state_dict(bank.state_dict())


def test_policies_of_others():
    @dataclass(frozen=True)
    class Oldest:
        name: ClassVar[str] = "oldest"
        per_row: ClassVar[bool] = False

        def choose(self, candidates, count, query):
            return torch.arange(count)[None]

    bank = MemoryBank(policy=Oldest())
    bank.add(clean(20), 0)
    assert bank.select().frame_index.tolist() == [[0, 1, 2, 3, 18, 19]]
    with pytest.raises(UserError, match="Oldest is not registered"):
        bank.state_dict()
    try:
        register_policy(Oldest)
        assert MemoryBank(**bank.settings).policy == Oldest()
        with pytest.raises(UserError, match="a policy 'oldest' is already registered"):
            register_policy(type("Other", (Oldest,), {}))
    finally:
        POLICIES.pop("oldest", None)
    with pytest.raises(UserError, match=r"'logspce' is not known: choose from recent, .*Did you mean 'logspace'\?"):
        policy_of("logspce")


def test_what_does_not_fit_is_refused():
    for words, message in (
        ({"long": 2, "sink": 3}, "sink must be at least 0 and at most 2"),
        ({"capacity": 5}, "capacity must be at least 6"),
        ({"mem_noise": 1.5}, "mem_noise must be at least 0 and at most 1"),
        ({"modalities": 4}, "modalities must be at least 1 and at most 3"),
    ):
        with pytest.raises(UserError, match=message):
            MemoryBank(**words)
    bank = MemoryBank()
    bank.add(clean(2), 4)
    with pytest.raises(UserError, match="frames from 5 on cannot be added after frame 5"):
        bank.add(clean(1), 5)
    with pytest.raises(UserError, match=r"frames have shape \(1, 4, 3, 3\), stored frames have \(1, 4, 2, 3\)"):
        bank.add(clean(1, shape=(4, 3, 3)), 6)
    with pytest.raises(UserError, match=r"channels of 2 modalities"):
        bank.add(clean(1, shape=(5, 2, 3)), 6)
    with pytest.raises(UserError, match=r"unknown modalities \['rgb'\]"):
        bank.add(clean(1), 6, unknown=["rgb"])
    with pytest.raises(UserError, match=r"poses have shape \(1, 2, 3, 4\): give \(1, 1, 3, 4\)"):
        bank.add(clean(1), 6, poses=turned([0.0, 1.0]))
    with pytest.raises(
        UserError, match="a memory of 12 frames cannot hold the selections of 4 rows, which may need 15"
    ):
        MemoryBank(capacity=12, policy="depth_sim").add(clean(1, rows=4), 0)
    MemoryBank(capacity=12).add(clean(1, rows=4), 0)


@pytest.mark.parametrize(
    ("policy", "rows", "expected"), [("logspace", 64, 64), ("camera", 1, 64), ("depth_sim", 64, 195)]
)
def test_a_capacity_for_a_batch_holds_the_selections_of_all_rows(policy, rows, expected):
    shape = {"long": 4, "short": 2, "sink": 1}
    assert capacity_for(policy, rows, **shape) == expected
    MemoryBank(**shape, capacity=capacity_for(policy, rows, **shape), policy=policy).check_rows(rows, posed=True)
