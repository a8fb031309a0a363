"""Rows and rewards for training an enhancer, and both trainers of TRL, unchanged, with a tiny language model."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.prompt import ChatRewriter, PromptEnhancer, Target
from postgen.prompt.styles import STYLES
from postgen.prompt.training import (
    SimilarityReward,
    StructureReward,
    VideoGenerationReward,
    to_rl_rows,
    to_sft_pairs,
)
from tests.prompt.tiny_chat import tiny_chat
from tests.tiny_wan import wan_components

PROMPTS = ["red ball", "blue cube", "green ball", "pink cube"]
GOOD = ["A red ball rolls over short green grass in light.", "A blue cube slides over ice in soft morning light."]
PREVIEW: dict[str, Any] = {"num_inference_steps": 1, "num_frames": 5, "height": 16, "width": 16}


def brightness(completions: list[Tensor], **columns: Any) -> list[float]:
    return [float(clip.mean()) for clip in completions]


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import WanPipeline

    made = WanPipeline(**wan_components())
    made.set_progress_bar_config(disable=True)
    return made


class Counting:
    """A real pipeline that records its calls."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.calls = pipe, list[dict[str, Any]]()

    def __call__(self, **call: Any) -> Any:
        self.calls.append(call)
        if "broken" in str(call["prompt"]):
            raise RuntimeError("no\nvideo")
        return self.pipe(**call)


def test_rewrites_of_a_prompt_start_from_the_same_noise(pipe: Any) -> None:
    counting = Counting(pipe)
    reward = VideoGenerationReward(counting, [brightness], **PREVIEW)
    state = torch.random.get_rng_state()
    scores = reward(None, [GOOD[0], "A red ball."], original_prompt=["red ball"] * 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [call["generator"].initial_seed() for call in counting.calls] == [reward.seed_for("red ball")] * 2
    assert reward.seed_for("red ball") != reward.seed_for("blue cube")
    generator = torch.Generator().manual_seed(reward.seed_for("red ball"))
    frames = pipe(prompt=GOOD[0], generator=generator, output_type="pt", **PREVIEW).frames
    assert scores[0] == pytest.approx(float(frames.mean()), abs=1e-6)
    assert scores[0] != scores[1]
    batched = VideoGenerationReward(pipe, [brightness], batch_size=2, **PREVIEW)
    assert batched(None, [GOOD[0], "A red ball."], original_prompt=["red ball"] * 2) == pytest.approx(scores, abs=1e-5)


def test_scores_are_against_the_original_prompt(pipe: Any) -> None:
    seen: list[Any] = []

    def words(completions: list[Tensor], prompts: list[str], hint: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, hint, strict=True))
        return [float(len(prompt)) for prompt in prompts]

    reward = VideoGenerationReward(pipe, [words, brightness], weights=[1.0, 0.0], **PREVIEW)
    messages = [[{"role": "assistant", "content": f"Sure: {text}"}] for text in GOOD]
    scores = reward(PROMPTS[:2], messages, original_prompt=PROMPTS[:2], hint=["x", "y"], trainer_state=object())
    assert scores == [8.0, 9.0]
    assert seen == [("red ball", "x"), ("blue cube", "y")]


def test_scores_are_cached_by_text_seed_and_settings(pipe: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    counting, path = Counting(pipe), tmp_path / "scores.jsonl"
    given: dict[str, Any] = {"original_prompt": ["red ball"] * 3}
    first = VideoGenerationReward(counting, [brightness], cache=path, **PREVIEW)
    scores = first(None, [GOOD[0], GOOD[0], ""], **given)
    assert (scores[0], scores[2], len(counting.calls)) == (scores[1], None, 1)
    assert (first.counts.videos, first.counts.cached, first.counts.failed) == (1, 1, 1)
    again = VideoGenerationReward(counting, [brightness], cache=path, **PREVIEW)
    assert again(None, [GOOD[0], GOOD[0], ""], **given) == scores
    assert len(counting.calls) == 1
    for changed in ({"seed": 1}, {"num_inference_steps": 2}, {"weights": [2.0]}, {"call": {"negative_prompt": "x"}}):
        other = VideoGenerationReward(counting, [brightness], cache=path, **{**PREVIEW, **changed})
        before = len(counting.calls)
        other(None, GOOD[:1], original_prompt=["red ball"])
        assert len(counting.calls) == before + 1
    tuned = WanPipeline(**wan_components())
    tuned.transformer.proj_out.weight.data.mul_(2)
    tuned.set_progress_bar_config(disable=True)
    other = VideoGenerationReward(tuned, [brightness], cache=path, **PREVIEW)
    other(None, GOOD[:1], original_prompt=["red ball"])
    assert (other.counts.videos, other.counts.cached) == (1, 0)
    first(None, GOOD[:1], original_prompt=["a red ball"])
    first(None, GOOD[:1], original_prompt=["red ball"], hint=["x"])
    assert first.counts.videos == 3


def test_failures_are_none_and_logged_once(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    def half(completions: list[Tensor], prompts: list[str], **columns: Any) -> list[float | None]:
        return [None if "blue" in prompt else 1.0 for prompt in prompts]

    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    counting = Counting(pipe)
    reward = VideoGenerationReward(counting, [half], **PREVIEW)
    answers = [*GOOD, "A broken red ball.", "Another broken red ball."]
    originals = ["red ball", "blue cube", "red ball", "red ball"]
    with caplog.at_level(logging.WARNING):
        scores = reward(
            None,
            answers,
            original_prompt=originals,
            log_metric=metrics.__setitem__,
            log_extra=extra.__setitem__,
        )
    assert scores == [1.0, None, None, None]
    assert metrics == {"video/videos": 4, "video/failed": 0.75, "video/half": 1.0}
    assert extra == {"video_half": [1.0, None, None, None]}
    told = [record.getMessage() for record in caplog.records if record.name.startswith("postgen.prompt")]
    assert told.count("video: the pipeline made no video: RuntimeError: no video") == 1
    # What failed is tried again.
    reward(None, ["A broken red ball."], original_prompt=["red ball"])
    assert len(counting.calls) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"fps": 0}, "fps"),
        ({"weights": [1.0, 2.0]}, "weights"),
        ({"pipeline": 3}, "pipeline must be"),
        ({"pipeline": "/nowhere"}, "of the video reward cannot be loaded: there is no model folder"),
        ({"rewards": "nothing"}, "nothing"),
    ],
)
def test_wrong_settings_of_the_video_reward(pipe: Any, settings: dict[str, Any], message: str) -> None:
    given = {"pipeline": pipe, "rewards": [brightness], **settings}
    with pytest.raises(UserError, match=message):
        VideoGenerationReward(given.pop("pipeline"), given.pop("rewards"), **given)


@pytest.mark.parametrize("kind", [StructureReward, SimilarityReward])
def test_rewards_need_the_original_prompt(pipe: Any, kind: Any) -> None:
    for reward in (kind(), VideoGenerationReward(pipe, [brightness], **PREVIEW)):
        with pytest.raises(UserError, match="needs the column original_prompt"):
            reward(None, ["a"])
        with pytest.raises(UserError, match="must be 1 texts"):
            reward(None, ["a"], original_prompt=[""])
        with pytest.raises(UserError, match="a completion must be"):
            reward(None, [3], original_prompt=["a"])


def test_structure() -> None:
    reward = StructureReward(Target(style=STYLES["short"]), least_words=4)
    given = {
        "a red ball rolls": {"form": 1.0, "length": 1.0, "facts": 1.0},
        "Sure: a red ball rolls": {"form": 0.5, "length": 1.0, "facts": 1.0},
        "a red ball": {"form": 1.0, "length": 0.75, "facts": 1.0},
        "a ball rolls fast": {"form": 1.0, "length": 1.0, "facts": 0.5},
        "a red ball and one more blue ball": {"form": 1.0, "length": 1.0, "facts": 0.5},
        "I'm sorry, I cannot show a red ball": {"form": 0.0, "length": 0.0, "facts": 0.0},
        "": {"form": 0.0, "length": 0.0, "facts": 0.0},
        "a red ball " + "rolls " * 100: {"form": 1.0, "length": 0.0, "facts": 1.0},
        "<think>round</think> a red ball rolls": {"form": 0.5, "length": 1.0, "facts": 1.0},
    }
    for answer, parts in given.items():
        assert reward.parts("red ball", answer) == pytest.approx(parts), answer
    thinking = StructureReward(least_words=4, reasoning=True)
    assert thinking(None, ["<think>round</think> a red ball rolls"], original_prompt=["red ball"]) == [1.0]
    metrics: dict[str, float] = {}
    reward(None, list(given)[:2], original_prompt=["red ball"] * 2, log_metric=metrics.__setitem__)
    assert metrics == {"structure/form": 0.75, "structure/length": 1.0, "structure/facts": 1.0}
    for wrong in (0, 1000):
        with pytest.raises(UserError, match="least_words"):
            StructureReward(Target(style=STYLES["short"]), least_words=wrong)


def test_similarity() -> None:
    same, longer, other, none = SimilarityReward()(
        None, ["red ball", GOOD[0], "a dog", ""], original_prompt=["red ball"] * 4
    )
    assert (same, none) == (1.0, 0.0)
    assert 0.9 < longer <= 1.0
    assert other < 0.2
    table = {"red ball": [1.0, 0.0], "a": [1.0, 1.0], "b": [-1.0, 0.0]}
    encoded = SimilarityReward(lambda texts: torch.tensor([table[text] for text in texts]))
    assert encoded(None, ["a", "b"], original_prompt=["red ball"] * 2) == pytest.approx([0.5**0.5, 0.0])
    for found, message in (
        ([1.0], "must return a tensor"),
        (torch.zeros(1), "must return a tensor"),
        (torch.full((2, 1), torch.nan), "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            SimilarityReward(lambda texts, found=found: found)(None, ["a"], original_prompt=["a"])


def test_pairs_pass_the_guard() -> None:
    rows = [
        {"prompt": "red ball", "enhanced_prompt": GOOD[0]},
        {"prompt": "red ball", "enhanced_prompt": "A ball rolls."},
        {"prompt": "red ball", "enhanced_prompt": "red ball"},
        {"prompt": "blue cube", "enhanced_prompt": f"Sure: {GOOD[1]}"},
    ]
    pairs = to_sft_pairs(rows)
    assert [row["completion"][0]["content"] for row in pairs.rows] == GOOD
    assert pairs.rows[0]["prompt"][-1] == {"role": "user", "content": "red ball"}
    assert pairs.refused == {"red is missing": 1, "unchanged": 1}
    made = to_sft_pairs(["red ball", "word " * 80], PromptEnhancer())
    assert (len(made.rows), made.refused) == (1, {"unchanged": 1})
    for source, message in (
        ([], "the source is empty"),
        (rows[1:2], "1 x red is missing"),
        ([{"prompt": "a"}], "enhanced_prompt of row 0"),
        (["a"], "or give an enhancer"),
    ):
        with pytest.raises(UserError, match=message):
            to_sft_pairs(source)  # type: ignore[arg-type]


def test_rows_keep_their_columns() -> None:
    rows = to_rl_rows([{"prompt": "red ball", "hint": 1}, {"prompt": "blue cube", "hint": 2}])
    assert [(row["original_prompt"], row["hint"], row["prompt"][-1]["content"]) for row in rows] == [
        ("red ball", 1, "red ball"),
        ("blue cube", 2, "blue cube"),
    ]
    assert to_rl_rows(["red ball"], messages=False) == [{"prompt": "red ball\n", "original_prompt": "red ball"}]
    for wrong in ([], [{}], [" "]):
        with pytest.raises(UserError, match="prompt"):
            to_rl_rows(wrong)  # type: ignore[arg-type]


def test_both_trainers_of_trl(pipe: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    trl = pytest.importorskip("trl", reason="trl is not installed")
    teacher = PromptEnhancer(target=Target(style=STYLES["short"]))
    model, tokenizer = tiny_chat([*PROMPTS, *teacher(PROMPTS)])
    quick: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    quick |= {"disable_tqdm": True, "logging_steps": 1}
    rows = datasets.Dataset.from_list(to_sft_pairs(PROMPTS, teacher).rows)
    args = trl.SFTConfig(str(tmp_path), max_steps=60, learning_rate=5e-3, per_device_train_batch_size=4, **quick)
    trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    rewriter = ChatRewriter(model.eval(), tokenizer, examples=False, max_new_tokens=64)
    made = PromptEnhancer(rewriter, target=teacher.target)(PROMPTS)
    assert made == [text.lower() for text in teacher(PROMPTS)]  # the tokenizer lower-cases

    video = VideoGenerationReward(pipe, [brightness], **PREVIEW)
    rewards = [video, StructureReward(least_words=4), SimilarityReward()]
    args = trl.GRPOConfig(str(tmp_path), max_steps=2, num_generations=2, per_device_train_batch_size=4, **quick)
    args.max_completion_length = 40
    asked = datasets.Dataset.from_list(to_rl_rows([{"prompt": prompt, "hint": "x"} for prompt in PROMPTS]))
    before = [value.clone() for value in model.parameters()]
    trainer = trl.GRPOTrainer(model, reward_funcs=rewards, args=args, train_dataset=asked, processing_class=tokenizer)
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    logged = [row for row in trainer.state.log_history if "rewards/video/mean" in row]
    assert len(logged) == 2
    assert all(0 < row["rewards/video/mean"] < 1 for row in logged)
    assert {"video/brightness", "video/failed", "structure/facts"} <= logged[0].keys()
    assert video.counts.videos + video.counts.cached + video.counts.failed == 8
