"""Rewards return the same scores on an accelerator as on the CPU."""

import pytest
import torch

from benchmarks.reward_shapes import RandomClip
from postgen import world
from postgen.rewards import RewardRunner
from postgen.rewards.world_judge import WorldJudgeNet
from postgen.rewards.world_net import prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXACT = [
    *("world", "world_motion", "parabola", "permanence", "depth_consistency"),
    *("motion_floor", "brightness_band", "sharpness_band"),
]
VIT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def batch():
    specs = [world.sample(k, event="falls" if k % 2 else None, camera="static", split="all") for k in range(4)]
    frames = world.render(specs, num_frames=17)
    return {
        "prompts": [world.simple_caption(spec) for spec in specs],
        "completions": list(frames.rgb_BF3HW),
        "spec": specs,
        "depth": list(frames.depth_BFHW),
        "flow": list(frames.flow_BF2HW),
    }


def scored(rewards, batch, device):
    moved = {**batch, "completions": [clip.to(device) for clip in batch["completions"]]}
    return RewardRunner(rewards, device=device, reward_error="raise")(**moved).values


def test_measured_rewards_are_the_same_there(batch):
    torch.testing.assert_close(
        scored(EXACT, batch, "cuda"), scored(EXACT, batch, "cpu"), atol=1e-3, rtol=0, equal_nan=True
    )


def test_a_clip_network_is_the_same_there_and_gives_its_memory_back(batch):
    torch.manual_seed(0)
    model = RandomClip(VIT, " ".join(batch["prompts"]))
    here = scored([model], batch, "cpu")
    torch.testing.assert_close(scored([model], batch, "cuda"), here, atol=1e-3, rtol=0)
    assert next(model.net.parameters()).is_cuda
    model.offload()
    assert not next(model.net.parameters()).is_cuda


def test_a_video_tower_is_the_same_there(batch):
    torch.manual_seed(0)
    net = WorldJudgeNet(video={"channels": [32, 48], "width": 64, "layers": 2, "grid": 4, "frames": 17}).eval()
    clips = torch.stack([prepare(clip, 17, 64) for clip in batch["completions"]])
    with torch.no_grad():
        here = net(clips)
        there = net.cuda()(clips.cuda()).cpu()
    torch.testing.assert_close(there, here, atol=1e-3, rtol=0)
