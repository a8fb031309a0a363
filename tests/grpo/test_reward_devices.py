"""Learned rewards compute on the device on which their process trains, unless they were given another one."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from postgen.errors import UserError
from postgen.grpo.guards import load_rewards
from postgen.grpo.scoring import Scoring, device_of_rewards
from postgen.rewards import RewardModel, RewardRunner, get_reward
from postgen.rewards.base import Reward
from postgen.rewards.compose import thresholded
from postgen.training import load_recipe
from tests.grpo.test_recipes import ROOT
from tests.grpo.toy import grpo

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 3), torch.device("mps")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Bright(RewardModel):
    """The mean of a clip, computed by a network of one weight; it records where the network was in a call."""

    name = "bright"

    def __init__(self, name="bright", **place):
        super().__init__(**place)
        self.name, self.seen = name, []

    def build(self):
        net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(net.weight)
        return net

    def place(self):
        return self.net.weight.device

    def __call__(self, completions):
        self.seen.append(self.place())
        means = torch.stack([clip.mean() for clip in completions]).to(self.device, self.dtype)
        return self.net(means[:, None])[:, 0].float().tolist()


def scoring(rewards, device, **settings):
    args = {"reward_device": None, "offload_reward": False, "reward_weights": [], "eval_reward_funcs": []}
    return Scoring(SimpleNamespace(**args | settings), rewards, (), TrainerState(), device)


@pytest.mark.parametrize(("asked", "trainer", "expected"), [(None, CPU, CPU), (None, GPU, GPU), (None, MPS, CPU)])
def test_device_of_rewards_follows_the_trainer(asked, trainer, expected):
    assert device_of_rewards(asked, trainer) == expected
    assert device_of_rewards("cpu", trainer) == CPU


def test_device_of_rewards_named_in_a_recipe(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of_rewards("cuda", GPU) == GPU  # each process has its own
    assert device_of_rewards("auto", GPU) == GPU
    assert device_of_rewards("cuda:1", GPU) == torch.device("cuda", 1)
    assert device_of_rewards("cuda", CPU) == torch.device("cuda")
    with pytest.raises(UserError, match="reward_device: there is no device cuda:4"):
        device_of_rewards("cuda:4", GPU)


@pytest.mark.parametrize("name", ["dancegrpo", "fast-image", "fast-video", "nft-video"])
def test_rewards_of_shipped_recipes_are_on_the_gpu_of_the_process(name):
    _, config = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    found = Scoring(config, (), (), TrainerState(), GPU)
    assert [runner.device for runner in (found.runner, found.gold)] == [GPU, GPU]
    assert all(reward.function.own_device is None for reward in (*found.runner.rewards, *found.gold.rewards))


def test_networks_move_to_the_trainer_except_those_with_a_device_of_their_own():
    free, fixed, inner = Bright(), Bright("fixed", device="cpu"), Bright("inner")
    found = scoring([free, fixed, thresholded(Reward(inner), 0.5)], torch.device("meta"))
    load_rewards([found.runner])
    assert [model.place().type for model in (free, fixed, inner)] == ["meta", "cpu", "meta"]
    load_rewards([scoring([fixed], CPU, reward_device="cpu").runner])
    assert fixed.place() == CPU


def test_the_runner_keeps_a_reward_on_its_own_device():
    fixed = get_reward(Bright, device="cpu")
    runner = RewardRunner([fixed], device="meta")  # a network on "meta" returns no numbers
    assert runner(["a"], [torch.ones(1, 3, 2, 2)]).values.tolist() == [[1.0]]
    assert fixed.function.seen == [CPU]


def test_a_trainer_hands_its_device_on(tmp_path):
    reward = Bright()
    trainer = grpo(tmp_path, reward=reward)
    assert trainer.runner.device == trainer.device == CPU


def test_a_device_that_does_not_exist_is_refused_before_weights_are_read():
    reward = get_reward("clip_score(model='nowhere', device='cuda:99')")
    with pytest.raises(UserError, match=r"the reward clip_score cannot use the device cuda:99: .*such as cpu"):
        reward.load()


def test_a_dtype_can_be_named():
    reward = get_reward(Bright, dtype="bfloat16")
    reward.load()
    assert reward.function.net.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype must be float16, bfloat16, float32 or float64, got 'int8'"):
        get_reward("clip_score(dtype='int8')")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("offload", [False, True])
def test_a_network_computes_on_the_gpu_of_the_trainer(tmp_path, offload):
    reward = Bright()
    trainer = grpo(tmp_path, reward=reward, device="cuda", offload_reward=offload, max_steps=1)
    trainer.train()
    assert {device.type for device in reward.seen} == {"cuda"}
    assert reward.place().type == ("cpu" if offload else "cuda")
