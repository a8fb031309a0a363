"""Clips without a prompt or without a score: who needs a prompt, and what is said where there is no number."""

import csv
import json
from functools import partial

import pytest
import torch

from postgen import world, write_video
from postgen.errors import UserError
from postgen.rewards import RewardRunner, get_reward, known_rewards
from postgen.rewards.base import prompted_by, promptless
from postgen.rewards.compose import guarded, per_frame, thresholded
from postgen.rewards.table import Table

UNPROMPTED = {
    *("aesthetic", "brightness_band", "brisque", "depth_consistency", "dynamic_degree", "flow_smoothness"),
    *("geneval_hf", "motion_floor", "permanence", "sharpness_band", "world_judge", "world_judge_motion"),
    *("vbench_aesthetic", "vbench_background", "vbench_flicker", "vbench_subject", "world_judge_visual"),
}
SPEC = world.sample(7)


def level(completions):
    return [float(clip.mean()) for clip in completions]


class Marked:
    @promptless
    def __call__(self, prompts, completions):
        return level(completions)


def test_who_needs_a_prompt():
    assert {name for name in known_rewards() if not get_reward(name).needs_prompts} == UNPROMPTED

    def named(prompts, completions):
        return level(completions)

    def optional(completions, prompts=None):
        return level(completions)

    def instead(prompts, completions, note=None):
        return level(completions)

    assert get_reward(named).needs_prompts
    assert not get_reward(optional).needs_prompts
    assert not get_reward(promptless(partial(named))).needs_prompts
    assert not get_reward(partial(partial(promptless(partial(named))))).needs_prompts
    assert not get_reward(Marked()).needs_prompts
    by_note = get_reward(prompted_by("note")(instead))
    assert [by_note.lacks_prompt(*row) for row in [(None, {}), (None, {"note": 1}), ("", {})]] == [True, False, False]
    assert guarded(by_note, [level]).lacks_prompt(None, {})
    assert not guarded(by_note, [level]).lacks_prompt(None, {"note": 1})
    assert not thresholded(level, 0.5).needs_prompts


def test_a_clip_without_a_prompt_fails_alone():
    clips = [torch.full((2, 3, 8, 8), value) for value in (0.25, 0.5, 0.75)]
    seen = []

    def named(prompts, completions):
        seen.extend(prompts)
        return level(completions)

    result = RewardRunner([named, level])(prompts=["a", None, "b"], completions=clips)
    assert seen == ["a", "b"]
    torch.testing.assert_close(result.column("named"), torch.tensor([0.25, torch.nan, 0.75]), equal_nan=True)
    assert result.column("level").tolist() == [0.25, 0.5, 0.75]
    assert result.failures == {"named": {1: "it needs a prompt, but the clip has none"}, "level": {}}
    assert (result.errors, result.reasons) == ({}, {"named": {}, "level": {}})
    spec = RewardRunner(["world"])(
        prompts=[None], completions=[world.render([SPEC]).rgb_BF3HW[0]], spec=[SPEC], must_score=False
    )
    assert spec.values.item() == 1


def test_reasons_and_failures_are_of_single_clips():
    def odd(completions, log_reasons):
        log_reasons(["it is\n dark" if float(clip.mean()) < 0.1 else None for clip in completions])
        if any(float(clip.mean()) == 1 for clip in completions):
            raise RuntimeError("too bright")
        return [None if float(clip.mean()) < 0.6 else 1.0 for clip in completions]

    clips = [torch.full((2, 3, 8, 8), value) for value in (0.0, 0.5, 0.75, 1.0)]
    runner = RewardRunner([odd], batch_bytes=1)
    result = runner(prompts=[""] * 4, completions=clips)
    assert result.reasons == {"odd": {0: "it is dark", 1: "it returned no finite number"}}
    assert result.failures == {"odd": {3: "RuntimeError: too bright"}}
    wrapped = RewardRunner([thresholded(odd, 0.5), per_frame(level, name="frame")])
    assert wrapped(prompts=[""] * 2, completions=clips[:2], must_score=False).reasons["odd"][0] == "it is dark"


@pytest.mark.parametrize(
    ("reward", "prompt", "clip", "reason"),
    [
        ("world", "a cat", (5, 64), "names no scene of the world"),
        ("world", "a red ball", (4, 64), "it has 4 frames of 64x64, and needs at least 5 frames of 32 px a side"),
        ("world", "a red ball", (5, 16), "16x16, and needs at least 5 frames of 32 px"),
        ("world_motion", "a cat", (5, 64), "names no scene of the world"),
        ("world_motion", "a red ball falls", (1, 64), "at least 2 frames"),
        ("world_motion", "a red ball stays", (5, 64), "nothing moves in this scene"),
        ("parabola", "a cat", (5, 64), "names no scene of the world"),
        ("parabola", "a red ball stays", (5, 64), "no falling or bouncing body"),
        ("parabola", "a red ball falls", (4, 64), "at least 5 frames"),
        ("permanence", None, (1, 64), "it has 1 frame of 64x64"),
        ("vbench_flicker", None, (1, 64), "at least 2 frames"),
        ("dynamic_degree", None, (5, 8), "at least 2 frames of 12 px"),
        ("flow_smoothness", None, (2, 64), "at least 3 frames"),
        ("brisque", None, (5, 64), "at least 128 px"),
        ("ocr", "a sign", (1, 64), "no text is wanted"),
    ],
)
def test_rewards_say_why_they_have_no_score(reward, prompt, clip, reason):
    frames, side = clip
    result = RewardRunner([reward])(
        prompts=[prompt], completions=[torch.rand(frames, 3, side, side)], must_score=False
    )
    assert reason in result.reasons[reward][0]
    assert result.errors == {}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_folder_with_files_that_have_no_prompt(cli, tmp_path, suffix):
    for name, prompt in (("a", "a cat"), ("b", None), ("c", "a dog")):
        write_video(tmp_path / f"{name}.webm", torch.full((5, 3, 32, 32), 0.5), fps=8)
        if prompt:
            (tmp_path / f"{name}.json").write_text(json.dumps({"prompt": prompt}))
    out = tmp_path / f"t.{suffix}"
    words = ["score", tmp_path, "--reward", "world,motion_floor", "-o", out]
    for _ in range(2):  # the second call takes the reasons of the first
        done = cli(*words)
        assert done.code == 1
        assert "world failed for 1 of 3 videos (b.webm): it needs a prompt, but the clip has none" in done.err
        assert "world has no score for 2 of 3 videos (a.webm, c.webm): the prompt names no scene" in done.err
        text = out.read_text()
        rows = [*csv.DictReader(text.splitlines())] if suffix == "csv" else [*map(json.loads, text.splitlines())]
        assert [float(row["motion_floor"]) for row in rows] == [0, 0, 0]
        assert [(row["no_score"] or "")[:28] for row in rows] == [
            "world: the prompt names no s",
            "",
            "world: the prompt names no s",
        ]
        assert [row["error"] or None for row in rows] == [
            None,
            "world: it needs a prompt, but the clip has none",
            None,
        ]
    assert "2 of 3 rows are already in" in done.err
    (tmp_path / "a.json").unlink()
    (tmp_path / "c.json").unlink()
    assert "world needs a prompt for a.webm and 2 more: use --prompt" in cli(*words).err
    assert cli("score", tmp_path, "--reward", "motion_floor").code == 0


def test_two_calls_begin_one_table_at_once(tmp_path, monkeypatch):
    path = tmp_path / "new" / "t.jsonl"
    first, second = (Table(path, [], ["level"]) for _ in range(2))
    replace = Table._replace

    def meanwhile(self, clips):
        with pytest.raises(UserError, match="another process is writing"):
            second.__enter__()
        replace(self, clips)

    monkeypatch.setattr(Table, "_replace", meanwhile)
    with first:
        assert path.read_text() == ""
    monkeypatch.setattr(Table, "_replace", lambda self, clips: 1 / 0)
    path.unlink()
    with pytest.raises(ZeroDivisionError):
        second.__enter__()
    assert not path.exists()  # nor is an empty table left


def stop(completions):
    """Ctrl-C at the third clip."""
    if any(len(clip) == 4 for clip in completions):
        raise KeyboardInterrupt
    return [0.0 for _ in completions]


def test_a_stop_says_how_far_it_came(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("postgen.rewards.scoring._MOST_CLIPS", {"cpu": 1})
    for number in range(5):
        write_video(tmp_path / "in" / f"{number}.webm", torch.full((number + 2, 3, 16, 16), 0.5), fps=8)
    words = ["score", tmp_path / "in", "--reward", f"{__name__}.stop"]
    done = cli(*words, "-o", tmp_path / "t.jsonl")
    assert done.code == 130
    assert done.err.endswith(
        f"postgen: stopped; 2 of 5 rows are in {tmp_path / 't.jsonl'}; to continue, run the same command again\n"
    )
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2
    assert "stopped; the scores of 2 of 5 are lost; -o t.jsonl keeps them" in cli(*words).err
    monkeypatch.setattr("postgen.rewards.serve.RewardServer.serve_forever", lambda self: stop([[0] * 4]))
    assert "stopped; requests scored: 0" in cli("serve-reward", "motion_floor", "--port", "0").err
