"""Names, import paths and options of rewards, and the base of those that score single frames."""

import math
import subprocess
import sys

import pytest
import torch

import postgen.rewards
from postgen.errors import UserError
from postgen.rewards import FrameReward, get_reward, known_rewards, split_rewards


def clip(value=0.5, frames=3, size=8):
    return torch.full((frames, 3, size, size), value)


class Bright(FrameReward):
    name = "bright"

    def build(self):
        return torch.nn.Identity()

    def frame_scores(self, frames_BK3HW, prompts):
        assert len(prompts) == len(frames_BK3HW)
        return frames_BK3HW.mean((2, 3, 4))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="Known: ") as caught:
        get_reward("nonsense")
    assert all(name in str(caught.value) for name in known_rewards())
    assert "file.py:fn" in str(caught.value)


def test_import_paths_and_options():
    motion = get_reward("postgen.rewards.guards.MotionFloor", floor=0.5)
    assert motion.name == "motion_floor"
    assert motion.function.floor == 0.5
    with pytest.raises(UserError, match=r"the reward 'postgen\.nothing' cannot be imported"):
        get_reward("postgen.nothing")
    with pytest.raises(UserError, match="cannot be imported"):
        get_reward("no_such_package.reward")
    with pytest.raises(UserError, match="has no option 'size'"):
        get_reward("motion_floor", size=1)
    with pytest.raises(UserError, match="takes neither prompts nor completions"):
        get_reward("os.path.join")


def test_options_of_a_function_are_bound():
    def scaled(completions, *, scale=1.0):
        return [scale * float(c.mean()) for c in completions]

    assert get_reward(scaled, scale=4.0)(["a"], [clip(0.5)]) == [2.0]
    assert get_reward(scaled, scale=4.0).name == "scaled"


def test_options_of_base_classes_are_known():
    reward = get_reward(Bright, frames=2, device="cpu")
    assert reward.function.frames == 2
    with pytest.raises(UserError, match="has no option 'frame'"):
        get_reward(Bright, frame=2)
    with pytest.raises(UserError, match="unknown reduce"):
        get_reward(Bright, reduce="median")
    # The name under which `FrameReward` hands keywords on is none of them.
    with pytest.raises(UserError, match=r"has no option 'place': it has frames, reduce, device, dtype$"):
        get_reward(Bright, place=1)


@pytest.mark.parametrize("text", ["clip_score(frames='x')", "motion_floor(floor='x')", "clip_score(device='abacus')"])
def test_options_of_a_wrong_kind(text):
    with pytest.raises(UserError, match=r"cannot be made with \w+='\w+'"):
        get_reward(text)


def test_frame_rewards_take_clips_of_any_size_and_do_not_mix_rows():
    clips = [clip(0.1, 9), clip(0.2, 1, 16), clip(0.3, 9), clip(0.4, 2)]
    reward = get_reward(Bright, frames=3)
    together = reward(["p"] * 4, clips)
    alone = [reward(["p"], [c])[0] for c in clips]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-6)


def test_frame_rewards_join_their_frames():
    ramp = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 4, 4)
    assert get_reward(Bright, frames=3)(["p"], [ramp]) == pytest.approx([0.5])
    assert get_reward(Bright, frames=3, reduce="min")(["p"], [ramp]) == pytest.approx([0.0])
    expected = 0.5 - math.sqrt((0.25 + 0.25) / 3)
    assert get_reward(Bright, frames=3, reduce="mean-std")(["p"], [ramp]) == pytest.approx([expected])


def test_lists_are_cut_outside_brackets():
    text = "world, clip_score(frames=8, reduce='min'),http://127.0.0.1:1,a.b.c(x='(,)')"
    assert split_rewards(text) == [
        "world",
        "clip_score(frames=8, reduce='min')",
        "http://127.0.0.1:1",
        "a.b.c(x='(,)')",
    ]
    assert split_rewards("world, ") == ["world"]
    for wrong, problem in {
        "world)": "a bracket is not opened",
        "clip_score(frames=8": "a bracket is not closed",
        "clip_score(model='a)": "brackets or quotes do not match",
    }.items():
        with pytest.raises(UserError, match=problem):
            split_rewards(wrong)


WRONG = """
import math

NUMBER, NOTHING, WORDS, builtin = 3, None, "a", max


class Plain:
    pass


class Scaled:
    def __init__(self, scale):
        self.scale = scale.real

    def __call__(self, completions):
        return [self.scale] * len(completions)


plain = Plain()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NUMBER", r"is a number \(3\), not a function: name a function of .*own_wrong\.py"),
        ("NUMBER(frames=2)", r"is a number \(3\), not a function"),
        ("NOTHING", "is None, not a function"),
        ("WORDS", r"is a text \('a'\), not a function"),
        ("math", "is the module math, not a function"),
        ("plain", "is an object of class Plain, not a function"),
        ("Plain", "an object of class Plain cannot be called.*add a method __call__"),
        ("Scaled", r"needs the option 'scale': write .*:Scaled\(scale=VALUE\)"),
        ("Scaled(scale='a')", r"cannot be made with scale='a': AttributeError"),
        ("builtin", "without a known signature"),
    ],
)
def test_own_objects_that_are_no_reward_functions(tmp_path, name, message):
    (tmp_path / "own_wrong.py").write_text(WRONG)
    with pytest.raises(UserError, match=f"(?i){message}"):
        get_reward(f"{tmp_path}/own_wrong.py:{name}")
    assert get_reward(f"{tmp_path}/own_wrong.py:Scaled(scale=2)")(["a"], [clip()]) == [2.0]


def test_the_package_is_light():
    script = "import sys, postgen.rewards; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
    assert postgen.rewards.RewardRunner.__name__ == "RewardRunner"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        postgen.rewards.nothing  # noqa: B018
