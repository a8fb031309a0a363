"""`WorldDepthNet` and `WorldDepth`: causality in time, long clips in pieces, files."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from postgen.errors import UserError
from postgen.worldweaver.depth_net import WEIGHTS, WorldDepth, WorldDepthNet, load_depth_net

TINY = {"channels": (8, 8, 12), "blocks": (1, 1, 1)}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = WorldDepthNet(**TINY).eval()
    with torch.no_grad():  # random weights, because an untrained network does not mix frames
        for name, value in net.named_parameters():
            if ".out." in name or ".taps" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    return net


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip():
    return torch.rand(1, 13, 3, 33, 42, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_no_frame_sees_a_later_one_and_each_those_of_its_history(net, clip):
    whole = net(clip)
    assert whole.shape == (1, 13, 33, 42)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(net(clip[:, :4]), whole[:, :4])
    assert net.history == 6
    torch.testing.assert_close(net(clip[:, 12 - 6 :])[:, -1], whole[:, -1])
    assert (net(clip[:, 12 - 5 :])[:, -1] - whole[:, -1]).abs().max() > 1e-7


@torch.no_grad()
def test_a_still_clip_is_its_picture(net, clip):
    still = net(clip[:, :1].expand(-1, 5, -1, -1, -1))
    torch.testing.assert_close(still, net(clip[:, :1]).expand(-1, 5, -1, -1))


@torch.no_grad()
def test_a_new_network_takes_each_frame_alone():
    fresh = WorldDepthNet(**TINY)
    x = torch.rand(1, 3, 3, 32, 32)
    torch.testing.assert_close(fresh(x)[:, 2], fresh(x[:, 2:])[:, 0])


@torch.no_grad()
def test_pieces_are_the_whole(net, folder, clip):
    whole = net(clip)[0]
    for piece in (1, 4, 32):
        torch.testing.assert_close(WorldDepth(folder, piece=piece)(clip[0]), whole)


def test_frames_in_any_form(folder, clip):
    source = WorldDepth(folder)
    channels_last = (clip[0, :2].movedim(1, -1) * 255).round().to(torch.uint8)
    first = source(channels_last)
    assert torch.equal(source(channels_last.numpy()), first)
    assert torch.equal(source(channels_last.float() / 255), first)
    assert torch.equal(source((channels_last.float() / 255).movedim(-1, 1)), first)
    assert torch.equal(source(np.asarray(channels_last, dtype=np.float64) / 255), first)


def test_large_frames_are_looked_at_smaller(folder, net, clip):
    small = functional.interpolate(clip[0, :2], (32, 41), mode="bilinear", antialias=True).clamp(0, 1)
    with torch.no_grad():
        want = functional.interpolate(net(small[None])[0][:, None], (33, 42), mode="bilinear")[:, 0]
    assert torch.equal(WorldDepth(folder, largest=41)(clip[0, :2]), want)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(4, 32, 32), r"\(4, 32, 32\): give \(T,H,W,3\)"),
        (torch.zeros(2, 4, 32, 32), "T at least 1"),
        (torch.zeros(0, 3, 32, 32), "T at least 1"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.int64), r"int64: give uint8, or a float type"),
    ],
)
def test_other_frames_are_refused(folder, frames, message):
    with pytest.raises(UserError, match=message):
        WorldDepth(folder)(frames)


def test_folders_that_hold_no_network_are_told(folder, tmp_path):
    with pytest.raises(UserError, match=r"no depth network in .*recipes/world-depth\.yaml"):
        WorldDepth(tmp_path)
    with pytest.raises(UserError, match="at least 32 pixels and 1 frame"):
        WorldDepth(folder, piece=0)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="holds no depth network"):
        load_depth_net(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    for other in ({"channels": [8, 8, 16]}, {"blocks": [1, 1, 2]}, {"channels": [8, 8], "blocks": [1, 1]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **other}))
        with pytest.raises(UserError, match="holds no depth network"):
            load_depth_net(tmp_path)


def test_half_precision_file_of_the_whole_network_is_small_and_read_in_full_precision(tmp_path):
    net = WorldDepthNet()
    net.half().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size <= 1_000_000
    read = load_depth_net(tmp_path)
    assert read.history == 10
    for name, value in net.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.float())
