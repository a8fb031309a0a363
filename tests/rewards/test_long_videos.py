"""Rewards of videos that are read in windows: the scores are those of the whole clip."""

import pytest
import torch

from postgen import UserError, world, write_video
from postgen.rewards import RewardRunner, get_reward
from postgen.rewards.base import streaming
from postgen.video import Footage, footage, read_video
from postgen.world.check import check, check_long
from postgen.world.check.ground import balance, balance_along
from postgen.world.check.look import look, look_along


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A spec and its clip of 26 frames as a file, in which a body falls."""
    spec = world.sample(3, num_frames=26, num_bodies=1, camera="static")
    clip = world.render([spec], num_frames=26, size=64, geometry=False).rgb_BF3HW[0]
    path = tmp_path_factory.mktemp("long") / "a.mp4"
    write_video(path, clip, fps=16)
    return spec, path


@pytest.fixture
def both(scene, monkeypatch):
    """The clip in memory, and read in windows of 7 frames."""
    monkeypatch.setattr(footage, "WINDOW", 7 * 64 * 64)
    return read_video(scene[1]), Footage(scene[1])


@pytest.mark.parametrize(
    "name",
    [
        *("world", "permanence", "parabola", "vbench_flicker", "world_clip", "world_judge_motion"),
        *("motion_floor(floor=1.0)", "brightness_band(low=0.9,high=1.0,margin=1.0)"),
        "sharpness_band(low=0.9,high=1.0,margin=1.0)",
        *("brisque(least=32, frames=9)", "brisque(least=32, frames=20, reduce='mean-std')"),
    ],
)
def test_scores_are_those_of_the_whole_clip(scene, both, name):
    reward = get_reward(name)
    assert reward.streams
    values = RewardRunner([reward])(
        prompts=[""] * 2, completions=list(both), fps=16.0, spec=[scene[0]] * 2, must_score=False
    ).values[:, 0]
    assert values[1].item() == pytest.approx(values[0].item(), abs=1e-4 if "brisque" in name else 1e-5, nan_ok=True)
    if name != "parabola":
        assert 0.0 != values[0] == values[0]


@pytest.mark.parametrize("name", ["flow_smoothness", "dynamic_degree(graded=True)"])
def test_flow_is_that_of_the_whole_clip(both, name):
    pytest.importorskip("cv2", reason="needs OpenCV")
    values = get_reward(name)(["", ""], list(both), fps=16.0)
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    assert values[0] > 0


@pytest.mark.parametrize(("camera", "tint"), [("static", (1.0, 0.5, 0.4)), ("pan left", (1.0, 1.0, 1.0))])
def test_reports_are_those_of_the_whole_clip(camera, tint):
    spec = world.sample(7, num_frames=12, camera=camera)
    clip = world.render([spec], num_frames=12, size=64, geometry=False).rgb_BF3HW[0]
    clip = clip * torch.tensor(tint)[:, None, None]
    report = check_long(lambda: iter(clip.split(5)), spec)
    assert report.score == pytest.approx(check(clip, spec).score, abs=1e-5)
    assert report.to_dict().keys() == check(clip, spec).to_dict().keys()


def test_the_colour_of_the_ground_is_exact():
    generator = torch.Generator().manual_seed(0)
    gains = []
    for power in torch.rand(6, 3, generator=generator):
        pictures = torch.rand(11, 3, 48, 48, generator=generator) ** (4 * power)[:, None, None]
        whole, windows = balance(pictures, 11), balance_along(lambda p=pictures: iter(p.split(3)))
        assert (whole is None) == (windows is None)
        if whole is not None:
            assert torch.equal(whole[0], windows)
        gains.append(whole)
    assert any(gain is not None for gain in gains)


def mean(completions):
    assert all(isinstance(clip, torch.Tensor) for clip in completions)
    return [float(clip.mean()) for clip in completions]


@streaming
def windows_of(completions):
    return [float(len(list(clip.windows()))) for clip in completions]


def test_other_rewards_get_all_frames_up_to_a_bound(scene, both):
    clip, long = both
    assert get_reward(mean)([""], [long]) == [pytest.approx(float(clip.mean()))]
    result = RewardRunner([mean, windows_of])([""], [Footage(scene[1], most=1000)])
    assert "26 frames of 64x64 take 1 MiB, more than the 0" in result.errors["mean"]
    assert result.column("windows_of").tolist() == [4.0]


def test_large_pictures_are_looked_at_smaller():
    large = torch.rand(5, 3, 34, 1088, generator=torch.Generator().manual_seed(0))
    assert look(large[None]).height == 34  # never below what can be judged
    large = large.repeat(1, 1, 2, 1)
    for sight in (look(large[None]), look_along(lambda: iter(large.split(2)))):
        assert (sight.height, sight.width) == (34, 544)
    assert look(large[None, ..., :1024]).width == 1024


def test_windows_are_of_any_length_and_of_one_form():
    spec = world.sample(3, num_frames=9, camera="dolly in")
    clip = world.render([spec], num_frames=9, size=64, geometry=False).rgb_BF3HW[0]
    whole = check(clip, spec).score
    assert check_long(lambda: iter(clip.split([0, 1, 5, 1, 0, 2, 0])), spec).score == pytest.approx(whole, abs=1e-5)
    for parts in ([clip[:4], clip[4:, :, :40]], [clip[:, :1]], [clip[0]], [clip[..., :16]]):
        with pytest.raises(UserError, match="needs windows"):
            check_long(lambda parts=parts: iter(parts), spec)
    once = iter([clip])
    with pytest.raises(UserError, match="got 9 frames at first, then 0"):
        check_long(lambda: once, spec)
    with pytest.raises(UserError, match="workers=-1"):
        check_long(lambda: iter([clip]), spec, workers=-1)
