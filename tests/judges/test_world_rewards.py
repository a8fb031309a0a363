"""The methods `world_clip` and `world_judge` for a few steps at a tiny size, their folders, and the corruptions."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanPipeline

from postgen import world
from postgen.errors import UserError
from postgen.judges.spoil import LEVELS
from postgen.judges.world_clip import WorldClipTrainer, edited, evaluation_groups, sense
from postgen.judges.world_judge import WorldJudgeTrainer
from postgen.rewards import RewardRunner, get_reward
from postgen.rewards.world_clip import WorldClipNet
from postgen.rewards.world_net import prepare
from postgen.train import main
from postgen.training import checkpoint, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PLAIN = {
    "size": 32,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "device": "cpu",
    "learning_rate": 2e-3,
    "width": 32,
}
CLIP = {
    **PLAIN,
    "method": "world_clip",
    "frames": 5,
    "pool_clips": 8,
    "per_device_train_batch_size": 8,
    "video_layers": 1,
    "text_layers": 1,
    "eval_groups": 2,
    "max_steps": 12,
    "eval_steps": 12,
}
JUDGE = {
    **PLAIN,
    "method": "world_judge",
    "pool_clips": 4,
    "per_device_train_batch_size": 4,
    "layers": 1,
    "eval_clips": 2,
    "max_steps": 4,
    "eval_steps": 4,
    "save_steps": 2,
}


def run(folder, values, **more):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run"), **more}))
    assert main([str(path)]) == 0
    return folder / "run"


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("clip"), CLIP)


@pytest.fixture(scope="module")
def judge_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("judge"), JUDGE)


@pytest.fixture(scope="module")
def videos():
    specs = [world.sample(k) for k in range(3)]
    clips = world.render(specs, size=48, geometry=False).rgb_BF3HW
    return [*clips, clips[0][:3], clips[1][:, :, :32]]


def test_shipped_recipes_are_read():
    assert load_recipe(RECIPES / "world-clip.yaml")[0] is WorldClipTrainer
    trainer, config = load_recipe(RECIPES / "world-judge.yaml", ["--pipeline", str(RECIPES)])
    assert trainer is WorldJudgeTrainer
    assert config.size == 96


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**CLIP, "width": 40}, "width.*multiple of 32"),
        ({**CLIP, "frames": 18}, r"frames.*1\.\.17"),
        ({**CLIP, "pool_clips": 4}, "pool_clips.*one batch"),
        ({**JUDGE, "pipeline": "nowhere"}, "pipeline.*a folder"),
        ({**JUDGE, "samples": -1}, "samples.*at least 0"),
        ({**JUDGE, "kinds_per_step": 5}, r"kinds_per_step.*in 1\.\.per_device_train_batch_size \(4\)"),
        ({**JUDGE, "course_clips": 0}, "course_clips.*at least 1"),
        ({**JUDGE, "hard_share": 1.5}, r"hard_share.*in 0\.\.1"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, values, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path)}))
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_world_clip_learns_its_few_clips(clip_run):
    rows = log(clip_run)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    last = rows[-1] if "eval_retrieval" in rows[-1] else rows[-2]
    assert 0 <= last["eval_retrieval"] <= 1
    assert 0 <= last["eval_retrieval_held_out"] <= 1


def test_world_clip_is_a_reward(clip_run, videos):
    reward = get_reward("world_clip", model=clip_run / "export")
    prompts = ["a red ball moves left", "x", "", "a blue cube falls", "a red ball moves left " * 30]
    together = reward(prompts, videos)
    assert together == pytest.approx([reward([p], [v])[0] for p, v in zip(prompts, videos, strict=True)], abs=1e-4)
    assert all(-1.001 <= score <= 1.001 for score in together)
    vectors = reward.function.embed_text(prompts)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_world_clip_export_is_the_trained_net(clip_run):
    config = json.loads((clip_run / "export" / "config.json").read_text())
    net = WorldClipNet(video=config["video"], text=config["text"], embedding=config["embedding"])
    reward = get_reward("world_clip", model=clip_run / "export")
    read = reward.function.net.state_dict()
    assert net.state_dict().keys() == read.keys()
    assert all(value.dtype == torch.float32 for value in read.values())


def test_world_judge_is_a_reward_with_views(judge_run, videos):
    names = ("world_judge", "world_judge_visual", "world_judge_motion")
    rewards = [get_reward(name, model=judge_run / "export") for name in names]
    assert len({id(reward.function) for reward in rewards}) == 1
    runner = RewardRunner(rewards)
    values = runner([""] * 5, videos).values
    torch.testing.assert_close(values[:, 0], values[:, 1:].mean(1), atol=1e-4, rtol=0)
    alone = torch.cat([runner([""], [video]).values for video in videos])
    torch.testing.assert_close(values, alone, atol=1e-4, rtol=0)
    # Standardised by the scores of clean clips that are written beside the weights.
    judge, kept = rewards[0].function, json.loads((judge_run / "export" / "config.json").read_text())
    with torch.no_grad():
        raw = torch.cat([judge.net(prepare(video, judge.frames, judge.size)[None]) for video in videos])
    want = (raw - torch.tensor(kept["mean"])) / kept["std"]
    torch.testing.assert_close(values[:, 1:], want, atol=1e-4, rtol=0)


def test_world_judge_logs_every_kind(judge_run):
    last = next(row for row in reversed(log(judge_run)) if "eval_pairs_min" in row)
    assert {f"eval_pairs_{kind.replace(' ', '_')}" for kind in LEVELS} <= set(last)


def test_world_judge_resumes_with_what_it_got_wrong(judge_run, tmp_path):
    folder = run(tmp_path, JUDGE, resume_from_checkpoint=str(judge_run / "checkpoint-2"))
    errors = [checkpoint.read(path / "checkpoint-4").ranks[0]["method.errors"] for path in (judge_run, folder)]
    assert errors[0] == errors[1]
    assert sum(value != 0.5 for value in errors[0].values()) > JUDGE["per_device_train_batch_size"]
    weights = [(path / "export" / "model.safetensors").read_bytes() for path in (judge_run, folder)]
    assert weights[0] == weights[1]


def test_world_judge_takes_clips_of_a_pipeline(tmp_path, tiny_wan, monkeypatch):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    (model / "postgen.json").write_text('{"guidance_scale": 1.5, "width": 64, "num_frames": 33}')
    asked, call = [], WanPipeline.__call__

    def noting(pipe, *args, **kwargs):
        asked.append(kwargs)
        return call(pipe, *args, **kwargs)

    monkeypatch.setattr(WanPipeline, "__call__", noting)
    more = {"pipeline": str(model), "reconstructions": 2, "samples": 1, "sampling_steps": 1, "max_steps": 2}
    folder = run(tmp_path, JUDGE, **more)
    assert math.isfinite(log(folder)[0]["loss"])
    # Guided as the folder says, at the judge's own size and length.
    named = ("guidance_scale", "width", "height", "num_frames")
    assert [[call[name] for name in named] for call in asked] == [[1.5, 32, 32, 17]]


def test_weights_that_are_not_there_are_told(tmp_path):
    with pytest.raises(UserError, match=r"has no weights: train them with recipes/world-clip\.yaml"):
        get_reward("world_clip", model=tmp_path).load()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="does not contain a reward"):
        get_reward("world_judge", model=tmp_path).load()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is of another model"):
        get_reward("world_judge", model=tmp_path).load()


def test_edits_change_what_is_meant():
    import random

    rng = random.Random(0)
    for seed in range(20):
        spec = world.sample(seed)
        assert sense(edited(spec, rng)) != sense(spec)
    both = world.Spec(bodies=(world.Body(colour="red", shape="ball"), world.Body(colour="blue", shape="cube")))
    assert sense(both) == sense(world.Spec(bodies=both.bodies[::-1]))


def test_evaluation_groups_are_of_different_sense():
    groups = evaluation_groups(2)
    assert [len({sense(spec) for spec in group}) for group in groups] == [32, 32]
    assert [all(s.held_out for s in group) for group in groups] == [False, True]
