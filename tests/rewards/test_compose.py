"""Rewards made of rewards, and guards."""

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.rewards import RewardRunner, get_reward, known_rewards
from postgen.rewards.compose import guarded, per_frame, thresholded
from postgen.rewards.guards import brightness, motion, sharpness

RAMP = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 6, 6)


def picture(prompts, completions, gain=None):
    """A reward of images: it refuses anything with more than one frame."""
    assert all(len(c) == 1 for c in completions)
    return [float(c.mean()) * (gain[k] if gain else 1.0) for k, c in enumerate(completions)]


def level(completions):
    return [float(c.mean()) for c in completions]


async def afar(completions):
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def clip():
    """A ball that bounces."""
    spec = world.sample(3, event="bounces", num_bodies=1, camera="static")
    return world.render([spec], size=64, geometry=False).rgb_BF3HW[0]


def test_per_frame_scores_frames_and_joins_them():
    clips = [RAMP, RAMP[:1], RAMP.flip(0)]
    assert per_frame(picture, frames=3)(["a"] * 3, clips) == pytest.approx([0.5, 0.0, 0.5])
    assert per_frame(picture, frames=3, reduce="min")(["a"], [RAMP]) == pytest.approx([0.0])
    spread = per_frame(picture, frames=2, reduce="mean-std")(["a"], [RAMP])
    assert spread == pytest.approx([0.0])
    columns = per_frame(picture, frames=2)(["a", "b"], [RAMP, RAMP], gain=[1.0, 10.0])
    assert columns == pytest.approx([0.5, 5.0])


def test_a_frame_without_a_score_leaves_the_clip_without_one():
    def odd(completions):
        return [None if float(c.mean()) > 0.9 else 1.0 for c in completions]

    assert per_frame(odd, frames=3)(["a", "b"], [RAMP, RAMP[:5]]) == [None, 1.0]


def test_thresholded_is_binary():
    assert thresholded(level, 0.4)(["a"] * 2, [RAMP, RAMP[:3]]) == [1.0, 0.0]
    assert thresholded(level, 0.4, name="bright enough").name == "bright enough"


def test_a_recipe_names_a_composed_reward_in_a_file(tmp_path):
    """The object is used as it is, so its name, its columns and its prompts are those of its parts."""
    (tmp_path / "own.py").write_text(
        "from postgen.rewards.compose import guarded\n"
        "from postgen.rewards.base import Reward\n"
        "def level(completions, wanted):\n    return wanted\n"
        "held = guarded(level, 'motion_floor', name='held')\n"
        "other = Reward(level, name='other')\n"
    )
    place = f"{tmp_path / 'own.py'}:held"
    held = get_reward(place)
    assert (held.name, held.needs_prompts) == ("held", False)
    still, moving = RAMP[:1].expand(4, 3, 6, 6), torch.rand(4, 3, 6, 6)
    runner = RewardRunner([place, f"{tmp_path / 'own.py'}:other"])
    assert runner.names == ("held", "other")
    assert runner(["a", "b"], [still, moving], wanted=[2.0, 2.0]).values.tolist() == [[0.0, 2.0], [2.0, 2.0]]
    with pytest.raises(UserError, match="needs the column 'wanted'"):
        held.check_columns(["place"])
    with pytest.raises(UserError, match="is a finished object and takes no more options, got worst"):
        get_reward(f"{place}(worst=1)")


def test_guarded_holds_the_value_back():
    def half(completions):
        return [0.5] * len(completions)

    def none(completions):
        return [None] * len(completions)

    assert guarded(level, half)(["a"], [RAMP]) == pytest.approx([0.25])
    assert guarded(level, [half, half], worst=-1.0)(["a"], [RAMP]) == pytest.approx([-0.25])
    assert guarded(level, [half, none])(["a"], [RAMP]) == [None]
    assert guarded(none, half)(["a"], [RAMP]) == [None]
    for beyond, value in ((3.0, 0.5), (-1.0, 0.0)):  # guards count between 0 and 1
        assert guarded(level, lambda completions, b=beyond: [b])(["a"], [RAMP]) == pytest.approx([value])


def test_what_a_part_needs_the_whole_needs():
    def needs(completions, depth):
        return [0.0]

    with pytest.raises(UserError, match="needs the column 'depth'"):
        RewardRunner([thresholded(needs, 0.5)])(["a"], [RAMP])
    assert per_frame(picture).needs_prompts
    assert not thresholded(level, 0.5).needs_prompts


def test_mistakes_are_told():
    with pytest.raises(UserError, match="async"):
        per_frame(afar)
    with pytest.raises(UserError, match="no guard"):
        guarded(level, [])
    with pytest.raises(UserError, match="at least 1"):
        per_frame(picture, frames=0)
    with pytest.raises(UserError, match="unknown reward"):
        guarded(level, "nonsense")


def test_options_in_a_text():
    reward = get_reward("motion_floor(floor=0.5)")
    assert reward.name == "motion_floor"
    assert reward.function.floor == 0.5
    for text in ("motion_floor(floor)", "motion_floor(floor=os)", "motion_floor(floor=1", "motion_floor(**{})"):
        with pytest.raises(UserError, match="cannot read the options"):
            get_reward(text)
    with pytest.raises(UserError, match="no option 'speed'"):
        get_reward("motion_floor(speed=1)")


def test_motion_floor_is_graded_and_blind_to_brightness(clip):
    floor = get_reward("motion_floor")
    frozen = clip[:1].expand_as(clip)
    fading = (frozen * torch.linspace(0.8, 1.0, len(clip))[:, None, None, None]).clamp(0, 1)
    slow = clip[:1] + 0.1 * (clip - clip[:1])
    values = floor(["a"] * 4, [frozen, fading, slow, clip])
    assert values[0] == 0.0
    assert values[1] < 0.35
    assert 0 < values[2] < 1
    assert values[3] == 1.0
    assert motion(clip[:1]) == 0.0


def test_bands_are_one_inside_and_fall_outside(clip):
    bright, sharp = get_reward("brightness_band"), get_reward("sharpness_band")
    assert bright(["a"] * 3, [clip, clip * 0.1, (clip + 0.5).clamp(0, 1)])[0] == 1.0
    dark = bright(["a"] * 3, [clip * k for k in (0.3, 0.2, 0.1)])
    assert dark == sorted(dark, reverse=True)
    assert dark[2] < 0.2
    noise = torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))
    flat = torch.full_like(clip, 0.5)
    values = sharp(["a"] * 3, [clip, noise, flat])
    assert values[0] == 1.0
    assert values[1] < 0.2
    assert values[2] == 0.0
    assert sharpness(noise) > sharpness(clip)
    assert brightness(flat) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text",
    [
        *("motion_floor(floor=0)", "brightness_band(low=0.5, high=0.4)", "sharpness_band(margin=0)"),
        *("world_motion(dead_zone=-0.1)", "world_motion(margin=0)", "world_motion(margin='a')"),
    ],
)
def test_bounds_are_checked(text):
    with pytest.raises(UserError):
        get_reward(text)


def test_every_registered_name_leads_somewhere():
    for name in known_rewards():
        if name in ("motion_floor", "parabola", "permanence", "world", "world_motion") or name.endswith("_band"):
            assert get_reward(name).name == name
