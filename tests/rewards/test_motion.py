"""Flow, dynamic degree and smoothness: on known motions and on real clips with their degraded twins."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from postgen.errors import UserError
from postgen.rewards import get_reward
from postgen.rewards.dynamic_degree import DynamicDegree, fastest
from postgen.rewards.flow import carried, dis_flow, raft, raft_flow
from postgen.rewards.flow_smoothness import FlowSmoothness, smoothness
from postgen.rewards.vbench import temporal_flickering
from postgen.video import read_video
from tests.offline_assets import installed

pytest.importorskip("cv2", reason="needs opencv-python-headless")

FRAMES = 13


def texture(height, width, seed=0):
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def panned(steps, height=72, width=96):
    """A window that goes `step` px to the right each time: things in it go to the left."""
    wide = texture(height, width + 80)
    starts = np.cumsum([20, *steps])
    return torch.stack([wide[:, :, x : x + width] for x in starts])


@pytest.fixture(scope="module")
def real():
    """Pieces of three real clips at about 25 frames per second, at most 320 px wide."""
    pieces = {}
    for name, start in (("clip-carphone", 0), ("clip-bunny", 0), ("clip-bikes", 0)):
        clip = read_video(installed(name), start=start, count=FRAMES)
        factor = 160 / clip.shape[-1]
        pieces[name] = interpolate(clip, scale_factor=factor, mode="area")
    return pieces


def flickered(clip):
    generator = torch.Generator().manual_seed(0)
    return (clip * (1 + 0.15 * torch.randn(len(clip), 1, 1, 1, generator=generator))).clamp(0, 1)


def shuffled(clip):
    return clip[torch.randperm(len(clip), generator=torch.Generator().manual_seed(1))]


def stuttering(clip):
    return clip[torch.arange(len(clip)) // 2 * 2]


def frozen(clip):
    return clip[:1].expand_as(clip)


def test_flow_of_a_known_motion():
    flow = dis_flow(panned([3, 3, 5]))
    assert flow.shape == (3, 2, 72, 96)
    inner = flow[..., 12:-12, 12:-12].median(-1).values.median(-1).values
    assert inner[:, 0].tolist() == pytest.approx([-3, -3, -5], abs=0.2)
    assert inner[:, 1].tolist() == pytest.approx([0, 0, 0], abs=0.2)


def test_carried_values():
    values = torch.arange(5.0).expand(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0] = 2
    moved, inside = carried(values, flow)
    assert moved[0, 0, 0].tolist() == [2, 3, 4, 4, 4]
    assert inside[0, 0].tolist() == [True, True, True, False, False]


def test_the_fastest_twentieth():
    flow = torch.zeros(1, 2, 10, 10)
    flow[0, 0, 0, :5] = torch.arange(1.0, 6.0)
    assert fastest(flow).tolist() == [3.0]
    assert fastest(torch.ones(1, 2, 3, 3)).tolist() == pytest.approx([2**0.5])


def test_dynamic_degree_counts_pairs():
    """6 px of 256 are 1.69 px of 72; of 9 frames round(2.25) = 2 pairs must go further."""
    slow, once, twice = panned([1] * 8), panned([1] * 7 + [3]), panned([1] * 6 + [3, 3])
    assert DynamicDegree()([""] * 3, [slow, once, twice]) == [0.0, 0.0, 1.0]
    graded = DynamicDegree(graded=True)([""] * 3, [slow, once, twice])
    assert graded[0] == pytest.approx(1 / 1.6875, abs=0.15)
    assert graded[2] == 1.0
    # At 16 frames per second every second frame is looked at: twice as far.
    assert DynamicDegree()([""], [slow], fps=16) == [1.0]
    # Two frames that do not move are not dynamic, as VBench's rounding would have it.
    assert DynamicDegree()([""], [frozen(slow[:2])]) == [0.0]


def test_smoothness_of_known_motions():
    even, uneven = panned([3] * 6), panned([1, 5, 1, 5, 1, 5])
    smooth, jerky = FlowSmoothness()(["", ""], [even, uneven])
    assert smooth > 0.9
    assert jerky < 0.5


def test_smoothness_follows_the_points():
    """A patch of 12 px that goes 6 px a frame: its points keep their velocity, places in its way do not."""
    flow = torch.zeros(3, 2, 12, 60)
    for frame in range(3):
        flow[frame, 0, :, 6 * frame + 6 : 6 * frame + 18] = 6
    # Covered background alone is a jerk, 6 of 18 columns that move; a place that the patch left is none.
    assert smoothness(flow, 1) == pytest.approx(1 - 6 / (2 * 12 + 6), abs=0.02)


@pytest.mark.parametrize("name", ["clip-carphone", "clip-bunny", "clip-bikes"])
def test_real_clips_before_their_degraded_twins(real, name):
    clip = real[name]
    steady, flicker = temporal_flickering(["", ""], [clip, flickered(clip)])
    assert steady > flicker + 0.02
    moving, still = DynamicDegree(graded=True)(["", ""], [clip, frozen(clip)])
    assert moving > still + 0.5
    assert still == 0.0
    twins = [clip, stuttering(clip), shuffled(clip), flickered(clip)]
    good, *bad = FlowSmoothness()([""] * 4, twins)
    assert all(good > value + 0.01 for value in bad)
    assert FlowSmoothness()([""], [frozen(clip)]) == [1.0]


def test_what_cannot_be_scored():
    clip = panned([3, 3])
    assert DynamicDegree()(["", ""], [clip[:1], clip[..., :8]]) == [None, None]
    assert FlowSmoothness()([""], [clip[:2]]) == [None]


def test_a_batch_scores_like_single_clips():
    clips = [panned([1 + k % 4] * (2 + k % 3)) for k in range(8)]
    for reward in (DynamicDegree(graded=True), FlowSmoothness()):
        assert reward([""] * 8, clips) == [reward([""], [c])[0] for c in clips]


def test_errors():
    with pytest.raises(UserError, match="allowed are dis, raft"):
        DynamicDegree(flow="farneback")
    with pytest.raises(UserError, match="has no weights"):
        get_reward("flow_smoothness", weights="raft.pth")
    with pytest.raises(UserError, match="above 0"):
        DynamicDegree()([""], [panned([1])], fps=0)


def test_raft_without_torchvision():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(UserError, match="needs torchvision"):
            DynamicDegree(flow="raft").load()
    else:
        pytest.skip("torchvision is installed")


def test_raft_is_torchvisions(tmp_path):
    try:
        from torchvision.models import optical_flow
    except (ImportError, RuntimeError):  # one that was built for another torch raises the latter
        pytest.skip("needs torchvision")
    torch.manual_seed(0)
    net = optical_flow.raft_large(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "raft.pth")
    clip = panned([3, 3], height=130, width=141)
    flow = raft_flow(raft(str(tmp_path / "raft.pth")).eval(), clip)
    padded = torch.nn.functional.pad(clip * 2 - 1, (1, 2, 3, 3), mode="replicate")
    want = net(padded[:-1], padded[1:], num_flow_updates=20)[-1][..., 3:133, 1:142]
    assert torch.allclose(flow, want, atol=1e-4)
