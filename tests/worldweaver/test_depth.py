"""Depth and flow as pictures, and depth sources."""

from __future__ import annotations

import math

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.worldweaver.depth import GREYS, DisparityRange, _percentile, disparity_of, flow_of_picture, flow_picture
from postgen.worldweaver.depth_sources import ExactDepth, TransformersDepth, align_scales


@pytest.fixture(scope="module")
def scene():
    spec = world.parse("a red ball rolls left")
    return spec, world.render([spec], num_frames=5, size=24)


def test_disparity_is_seen_and_read_again():
    disparity = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0]).view(
        2, 1, 1, 1
    )
    limits = DisparityRange.of(disparity)
    for row in range(2):
        expected = torch.quantile(disparity[row], torch.tensor([0.02, 0.98]))
        seen = limits.low[row] + torch.tensor(GREYS) * (limits.high[row] - limits.low[row])
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
    picture = limits.picture(disparity)
    assert picture.shape == (2, 3, 3, 6, 5)
    assert torch.equal(picture[:, :, 0], picture[:, :, 2])
    torch.testing.assert_close(torch.quantile(picture[1, :, 0], torch.tensor([0.02, 0.98])), torch.tensor(GREYS))
    a, b = (each.view(2, 1, 1, 1) for each in (limits.low, limits.high))
    torch.testing.assert_close(limits.disparity(picture), disparity.clamp(a, b), rtol=1e-5, atol=1e-6)
    # The mean over channels reduces noise in one channel to a third.
    noisy = picture.clone()
    noisy[:, :, 1] += 0.3
    torch.testing.assert_close(limits.disparity(noisy), disparity.clamp(a, b) + 0.1 * (b - a), rtol=1e-4, atol=1e-5)


def test_the_range_is_of_the_clip_and_stays():
    """The range of the first window is kept, so a later window that is nearer becomes brighter."""
    first = torch.linspace(0, 1, 100).view(1, 4, 5, 5)
    limits = DisparityRange.of(first)
    kept = DisparityRange.from_tensors(limits.tensors())
    assert torch.equal(kept.picture(first), limits.picture(first))
    assert DisparityRange.from_tensors({}) is None
    assert limits.picture(first + 0.25).mean() > limits.picture(first).mean() + 0.15
    # Equal disparities have equal grey values in all frames.
    picture = limits.picture(torch.stack([torch.full((5, 5), 0.4), torch.full((5, 5), 0.4)])[None])
    assert torch.equal(picture[0, 0], picture[0, 1])
    wall = torch.full((1, 2, 3, 3), 0.5)
    limits = DisparityRange.of(wall)
    torch.testing.assert_close(limits.disparity(limits.picture(wall)), wall)


def test_percentiles_of_many_values():
    values = torch.randn(2, 1001, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.02, 0.4999, 0.98, 1.0):
        torch.testing.assert_close(_percentile(values, share), torch.quantile(values, share, dim=1))


def test_flow_is_seen_and_read_again():
    height, width = 12, 16
    limit = 0.15 * math.hypot(height, width)
    flow = torch.randn(2, 3, 2, height, width, generator=torch.Generator().manual_seed(0))
    flow = flow / flow.norm(dim=2, keepdim=True) * torch.rand(2, 3, 1, height, width) * limit
    picture = flow_picture(flow)
    assert picture.shape == (2, 4, 3, height, width)
    assert torch.equal(picture[:, 3], picture[:, 2])
    assert picture.min() >= 0
    assert torch.equal(picture.amax(2), torch.ones(2, 4, height, width))
    torch.testing.assert_close(flow_of_picture(picture), flow, rtol=0, atol=1e-5 * limit)
    torch.testing.assert_close(flow_of_picture(0.5 * picture), flow, rtol=0, atol=1e-5 * limit)


def test_colours_of_flow():
    flow = torch.zeros(1, 1, 2, 4, 3)
    flow[0, 0, :, 0] = torch.tensor([[9.0, -9.0, 0.0], [0.0, 0.0, 0.0]])
    flow[0, 0, :, 1, 0] = 9 * torch.tensor([math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)])
    picture = flow_picture(flow)[0, 0]
    assert picture[:, 0, 0].tolist() == [1, 0, 0]  # right is red
    assert picture[:, 0, 1].tolist() == [0, 1, 1]  # left is cyan
    assert picture[:, 0, 2].tolist() == [1, 1, 1]  # still is white
    torch.testing.assert_close(picture[:, 1, 0], torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-6)
    # A vector beyond the limit is shortened and keeps its direction.
    assert torch.equal(flow_of_picture(flow_picture(flow))[0, 0, :, 0, 0], torch.tensor([0.15 * 5, 0.0]))


def test_depth_of_the_world_is_exact(scene):
    spec, frames = scene
    found = ExactDepth(spec)(frames.rgb_BF3HW[0].movedim(1, -1))
    assert found.shape == (5, 24, 24)
    assert torch.equal(found, disparity_of(frames.depth_BFHW[0]))
    assert (found[:, 0] == 0).any()  # the background is infinitely far
    with pytest.raises(UserError, match="24 x 23, but frames of the world are square"):
        ExactDepth(spec)(torch.zeros(5, 24, 23, 3))


def test_frames_are_aligned_by_what_stands_still(scene):
    """Every frame has another scale and shift, and a body moves: all frames get those of the first frame."""
    _, frames = scene
    truth = disparity_of(frames.depth_BFHW[0]).double()
    rgb = frames.rgb_BF3HW[0].movedim(1, -1)
    scale = torch.tensor([2.0, 0.5, 3.0, 1.1, 0.9], dtype=torch.float64).view(5, 1, 1)
    shift = torch.tensor([0.1, 0.4, -0.2, 0.0, 0.3], dtype=torch.float64).view(5, 1, 1)
    found = align_scales(scale * truth + shift, rgb, still=0.0)
    torch.testing.assert_close(found, 2 * truth + 0.1, rtol=1e-9, atol=1e-9)


def test_noise_does_not_shrink_the_scale():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 32, 32, generator=generator).expand(60, -1, -1)
    noisy = truth + 0.06 * torch.randn(60, 32, 32, generator=generator)
    found = align_scales(noisy, torch.zeros(60, 32, 32, 3))
    assert 0.95 < found[-1].std() / found[0].std() < 1.05


def test_a_frame_in_which_nothing_stands_still_goes_as_the_one_before():
    base = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    rgb = torch.zeros(3, 8, 8, 3)
    rgb[2] = 1
    found = align_scales(torch.stack([base, 2 * base + 1, 2 * base + 5]), rgb)
    torch.testing.assert_close(found, torch.stack([base, base, base + 2]))
    with pytest.raises(UserError, match=r"disparity has shape \(2, 8, 8\) and frames have \(3, 8, 8, 3\)"):
        align_scales(torch.zeros(2, 8, 8), rgb)


def depth_anything(folder, kind="relative"):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    model = DepthAnythingForDepthEstimation(config)
    # With its usual random weights the model predicts almost 0, and ReLU removes half of that.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.head.conv3.bias, 2)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    DPTImageProcessorPil(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(folder)
    return folder


def test_an_estimator_of_transformers(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = depth_anything(tmp_path)
    frames = torch.rand(3, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    source = TransformersDepth(folder, align=False)
    found = source(frames)
    assert found.shape == (3, 20, 24)
    assert found.std() > 0.1
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModelForDepthEstimation.from_pretrained(folder)
    pixels = list(frames.mul(255).round().to(torch.uint8).numpy())
    with torch.no_grad():
        raw = model(**processor(images=pixels, return_tensors="pt"))
    expected = processor.post_process_depth_estimation(raw, [(20, 24)] * 3)
    expected = torch.stack([each["predicted_depth"] for each in expected])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not source.metric
    still = frames[:1].expand(3, -1, -1, -1)
    assert torch.equal(TransformersDepth(folder)(still), align_scales(source(still), still))
    # Distances are converted to disparity.
    assert torch.allclose(TransformersDepth(folder, metric=True, align=False)(frames), 1 / found.clamp_min(1e-3))


def test_an_estimator_of_distances_says_so(tmp_path):
    assert TransformersDepth(depth_anything(tmp_path, "metric")).metric


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"depth must be above 0 everywhere, but its minimum is -1\.0"):
        disparity_of(torch.tensor([1.0, -1.0]))
    with pytest.raises(UserError, match=r"disparity has shape \(3, 4, 4\): give \(clips, frames, height, width\)"):
        DisparityRange.of(torch.zeros(3, 4, 4))
    with pytest.raises(UserError, match="not finite"):
        DisparityRange.of(torch.full((1, 1, 2, 2), torch.inf))
    limits = DisparityRange.of(torch.rand(2, 1, 4, 4))
    with pytest.raises(UserError, match="the range is of 2 clips, but 1 clips are given"):
        limits.picture(torch.rand(1, 1, 4, 4))
    with pytest.raises(UserError, match=r"give \(clips, frames, 3, height, width\)"):
        limits.disparity(torch.rand(2, 1, 1, 4, 4))
    with pytest.raises(UserError, match=r"give \(clips, frames - 1, 2, height, width\)"):
        flow_picture(torch.rand(1, 2, 3, 4, 4))
    with pytest.raises(UserError, match="at least 2 frames"):
        flow_of_picture(torch.rand(1, 1, 3, 4, 4))
