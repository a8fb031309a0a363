"""The contract of a reward, and the runner."""

import asyncio
import logging
import math
import threading
import time

import pytest
import torch

from postgen.errors import UserError
from postgen.rewards import AllRewardsFailed, Reward, RewardModel, RewardRunner, get_reward
from postgen.rewards.compose import guarded


def clip(value=0.5, frames=3, size=8):
    return torch.full((frames, 3, size, size), value)


def level(prompts, completions, **columns):
    return [float(c.mean()) for c in completions]


def broken(prompts, completions):
    raise RuntimeError("no weights today")


async def quick(prompts, completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)


def call(rewards, count=2, *, must_score=True, options=None, **columns):
    runner = RewardRunner(rewards, **(options or {}))
    prompts = [f"p{k}" for k in range(count)]
    completions = [clip(k / 10) for k in range(count)]
    return runner(prompts=prompts, completions=completions, must_score=must_score, **columns)


class Pair(RewardModel):
    """Two outputs, counted calls."""

    outputs = ("low", "high")
    name = "pair"

    def __init__(self, *, shift=0.0, **place):
        super().__init__(**place)
        self.shift, self.calls = shift, 0

    def build(self):
        return torch.nn.Linear(1, 1)

    def __call__(self, completions):
        self.calls += 1
        values = [float(c.mean()) + self.shift for c in completions]
        return {"low": values, "high": [v + 1 for v in values]}


def test_values_weights_and_names():
    result = call([level, quick], options={"weights": [2.0, 0.5]})
    assert result.names == ("level", "quick")
    assert result.values.dtype == torch.float32
    torch.testing.assert_close(result.values, torch.tensor([[0.0, 1.0], [0.1, 1.0]]))
    torch.testing.assert_close(result.weighted(), torch.tensor([0.5, 0.7]))
    torch.testing.assert_close(result.column("level"), torch.tensor([0.0, 0.1]))
    assert result.failed == {"level": 0, "quick": 0}
    assert result.seconds["quick"] >= 0.2


def test_async_rewards_run_side_by_side():
    begun = set()

    def waits_for(other, name, value):
        async def reward(prompts, completions):
            begun.add(name)
            while other not in begun:
                await asyncio.sleep(0.01)
            return [value] * len(completions)

        reward.__name__ = name
        return reward

    result = call([waits_for("b", "a", 1.0), waits_for("a", "b", 2.0)], options={"timeout": 20.0})
    assert result.values.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_runner_works_inside_a_running_loop():
    async def inside():
        return call([quick])

    assert asyncio.run(inside()).values.tolist() == [[1.0], [1.0]]


def test_only_named_arguments_are_passed():
    seen = {}

    def picky(completions, depth, fps=None, trainer_state=None):
        seen.update(depth=depth, fps=fps, state=trainer_state)
        return [0.0] * len(completions)

    def everything(**columns):
        seen["all"] = set(columns)
        return [0.0] * len(columns["completions"])

    columns = {"depth": [1, 2], "target": ["a", "b"], "self": [1, 2]}
    call([picky, everything], **columns, fps=8.0, trainer_state="s")
    assert (seen["depth"], seen["fps"], seen["state"]) == ([1, 2], 8.0, "s")
    assert {*columns, "prompts", "completions", "log_extra", "log_metric", "latents"} <= seen["all"]


def test_pictures_and_images_where_the_signature_asks():
    def pil(frames_pil):
        return [float(pictures[0].getpixel((0, 0))[0]) for pictures in frames_pil]

    def one_image(images):
        return [float(image.ndim) for image in images]

    runner = RewardRunner([pil, one_image])
    assert runner(["a"], [clip(1.0, frames=1)]).values.tolist() == [[255.0, 3.0]]
    with pytest.raises(AllRewardsFailed, match="per_frame"):
        RewardRunner([one_image])(["a"], [clip(frames=2)])


def test_a_missing_column_is_told_before_anything_runs():
    def needs(completions, depth):
        return [0.0]

    with pytest.raises(UserError, match="needs the column 'depth'"):
        call([level, needs], target=[1, 2])


def test_a_reward_that_raises_gives_nan_and_a_count(caplog):
    with caplog.at_level(logging.WARNING):
        result = call([broken, level])
    assert result.values[:, 0].isnan().all()
    assert result.failed == {"broken": 2, "level": 0}
    assert "no weights today" in result.errors["broken"]
    assert "no weights today" in caplog.text
    torch.testing.assert_close(result.weighted(), torch.tensor([0.0, 0.1]))


def test_an_error_can_be_let_out():
    with pytest.raises(RuntimeError, match="no weights today"):
        call([broken, level], options={"reward_error": "raise"})


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        ([1.0], 2),
        ([1.0, 2.0, 3.0], 2),
        ("12", 2),
        (None, 2),
        ([None, 1.0], 1),
        ([math.nan, 1.0], 1),
        ([math.inf, 1.0], 1),
        (["a", 1.0], 2),
        (torch.tensor([math.nan, 1.0]), 1),
        (torch.ones(2, 2), 2),
    ],
)
def test_wrong_answers_give_nan_and_a_count(answer, rows):
    def odd(completions):
        return answer

    result = call([odd, level])
    assert result.failed["odd"] == rows
    assert int(result.values[:, 0].isnan().sum()) == rows


def test_time_limit():
    finish, finished = threading.Event(), []

    def slow(completions):
        finish.wait(20)
        finished.append("slow")
        return [1.0] * len(completions)

    async def slow_too(completions):
        await asyncio.sleep(20)

    runner = RewardRunner([slow, slow_too, level], timeout=0.5)
    first, second = (runner(["a"], [clip()]) for _ in range(2))
    assert not finished
    assert first.failed == {"slow": 1, "slow_too": 1, "level": 0}
    assert "no result within 0.5 s" in first.errors["slow"]
    assert "no result within 0.5 s" in first.errors["slow_too"]
    assert "still busy" in second.errors["slow"]
    finish.set()
    time.sleep(0.6)
    runner.timeout = 5.0
    assert runner(["a"], [clip()]).failed["slow"] == 0


def test_an_async_reward_that_blocks_its_loop_is_left_behind(monkeypatch):
    monkeypatch.setattr("postgen.rewards.runner._GRACE", 0.1)
    finish, finished = threading.Event(), []

    async def blocks(completions):
        finish.wait(20)
        finished.append("blocks")
        return [1.0]

    result = RewardRunner([blocks, level], timeout=0.5)(["a"], [clip()])
    assert not finished
    finish.set()
    assert result.failed == {"blocks": 1, "level": 0}
    assert result.values[:, 0].isnan().all()
    assert "blocks its event loop" in result.errors["blocks"]


def test_all_failed_is_an_error_unless_it_may_be():
    with pytest.raises(AllRewardsFailed, match="no weights today"):
        call([broken])
    assert call([broken], must_score=False).failed == {"broken": 2}
    with pytest.raises(AllRewardsFailed):  # a reward that is only measured trains nothing
        call([broken, level], options={"weights": [1.0, 0.0]})


def test_rewards_that_are_only_measured_weigh_nothing():
    result = call([level, quick], options={"weights": [1.0, 0.0]})
    assert result.weights == (1.0, 0.0)
    torch.testing.assert_close(result.weighted(), torch.tensor([0.0, 0.1]))


def test_views_share_one_call():
    pair = Pair()
    runner = RewardRunner([Reward(pair, name=f"pair_{out}", output=out) for out in pair.outputs])
    result = runner(["a", "b"], [clip(0.0), clip(0.5)])
    assert result.values.tolist() == [[0.0, 1.0], [0.5, 1.5]]
    assert pair.calls == 1
    with pytest.raises(UserError, match="outputs low, high"):
        Reward(pair)


def test_batches_are_cut_by_bytes_and_joined_in_order():
    sizes = []

    def counted(completions, log_extra, log_metric):
        sizes.append(len(completions))
        log_extra("mean", [float(c.mean()) for c in completions])
        log_metric("rows", len(completions))
        return [float(c.mean()) for c in completions]

    one = 4 * clip().numel()
    runner = RewardRunner([counted], batch_bytes=2 * one)
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    result = runner(["p"] * 5, [clip(v) for v in values])
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(result.values[:, 0], torch.tensor(values))
    torch.testing.assert_close(torch.tensor(result.extra["mean"]), torch.tensor(values))
    assert result.metrics == {"rows": pytest.approx(9 / 5)}
    sizes.clear()
    RewardRunner([counted], batch_bytes=1)(["p"] * 2, [clip(), clip()])
    assert sizes == [1, 1]


def test_out_of_memory_is_tried_again_in_halves():
    sizes = []

    def hungry(completions):
        sizes.append(len(completions))
        if len(completions) > 2:
            raise torch.OutOfMemoryError("too much")
        return [float(c.mean()) for c in completions]

    result = call([hungry], count=5)
    assert result.failed == {"hungry": 0}
    assert sizes == [5, 2, 3, 1, 2]
    torch.testing.assert_close(result.values[:, 0], torch.arange(5) / 10)


def test_groupwise_rewards_get_whole_groups():
    groups = []

    def rank(prompts, completions):
        groups.append(prompts)
        return [float(k) for k in range(len(prompts))]

    rank.groupwise = True
    result = RewardRunner([rank], batch_bytes=1)(["a", "b", "a"], [clip()] * 3)
    assert groups == [["a", "a"], ["b"]]
    assert result.values[:, 0].tolist() == [0.0, 0.0, 1.0]


def test_each_call_has_one_frame_rate():
    rates = []

    def timed(completions, fps):
        rates.append((fps, len(completions)))
        return [0.0] * len(completions)

    RewardRunner([timed])(["a"] * 3, [clip()] * 3, fps=[8.0, 16.0, 8.0])
    assert rates == [(8.0, 2), (16.0, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a"]}, "prompts must have one value for each of the 2 clips, got 1"),
        ({"depth": [1]}, "depth must have one value"),
        ({"depth": "ab"}, "depth must have one value"),
        ({"latents": torch.zeros(1, 4)}, "latents must have one value"),
        ({"completions": [clip(), torch.zeros(3, 8, 8)]}, r"clips \(F,3,H,W\)"),
        ({"completions": [clip(), clip().byte()]}, "of floats"),
    ],
)
def test_uneven_batches_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        RewardRunner([level])(**({"prompts": ["a", "b"], "completions": [clip(), clip()]} | change))


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "there is no reward"),
        ([level, level], {}, "two rewards are named 'level'"),
        ([level], {"weights": [1.0, 2.0]}, "weights must be a list of one number per reward, 1 in total"),
        ([level], {"weights": [math.nan]}, "finite number"),
        ([level], {"weights": [0.0]}, "not all 0"),
        ([level], {"timeout": 0.0}, "must be above 0"),
        ([level], {"batch_bytes": 0}, "must be above 0"),
        ([level], {"reward_error": "zero"}, "none or raise"),
        (["wrold"], {}, "Did you mean 'world'"),
    ],
)
def test_wrong_settings_are_refused(rewards, options, message):
    with pytest.raises(UserError, match=message):
        RewardRunner(rewards, **options)


def test_networks_are_built_once_and_offloaded():
    pair = Pair(shift=1.0)
    assert pair._net is None
    runner = RewardRunner([Reward(pair, output="low")], device="cpu", offload=True)
    runner.load()
    net = pair.net
    runner(["a"], [clip()])
    assert pair.net is net
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.training


def test_no_gradients_are_kept():
    weight = torch.ones((), requires_grad=True)

    def graded(completions):
        value = weight * completions[0].mean()
        assert not value.requires_grad
        return [value]

    assert RewardRunner([graded])(["a"], [clip()]).failed == {"graded": 0}


def zeroes(completions, latents=None):
    for clip in completions:
        clip.zero_()
    completions.clear()
    if latents is not None:
        latents.zero_()
    return [0.0, 0.0]


def seen(prompts, completions, latents, **columns):
    return [float(clip.mean() + latents[row].mean()) for row, clip in enumerate(completions)]


@pytest.mark.parametrize("first", [zeroes, guarded(zeroes, ["brightness_band"])])
def test_a_reward_that_writes_into_its_clips_writes_into_its_own(first):
    clips, latents = [torch.full((5, 3, 32, 32), 0.5), torch.full((5, 3, 32, 32), 0.25)], torch.ones(2, 4)
    found = RewardRunner([first, seen])(["a", "b"], clips, latents=latents)
    assert found.values[:, 1].tolist() == [1.5, 1.25]
    assert [float(clip.mean()) for clip in clips] == [0.5, 0.25]
    assert latents.sum() == 8


def test_rewards_of_the_package_take_no_copies():
    clip = torch.rand(5, 3, 32, 32)
    given = get_reward("world").arguments({"prompts": ["a red ball"], "completions": [clip]})
    assert given["completions"][0] is clip
