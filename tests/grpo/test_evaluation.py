"""Evaluations: motion compared with the exact clips of the world, and diversity over prompts."""

import math
from dataclasses import replace

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.grpo.exact_motion import ExactMotion
from postgen.grpo.quality import appearance, clip_statistics, diversity_of_prompts
from postgen.metrics.world_truth import exact_motion
from tests.grpo.toy import grpo, lines

PROMPTS = ["a red ball moves left", "a blue cube falls", "a cat sleeps"]
SIZE = {"num_frames": 17, "height": 32, "width": 32}


def ground(colour):
    return torch.tensor(colour)[None, :, None, None].expand(2, 3, 16, 16)


def test_diversity_of_plain_pictures():
    grounds = [ground(colour) for colour in ([0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.3, 0.0, 0.0])]
    found = diversity_of_prompts([appearance(clip) for clip in grounds])
    # One pair of three is equal, the others are 0.3 apart in one of three colours.
    assert found == {name: pytest.approx(2 / 3 * 0.3 / 3**0.5, abs=1e-6) for name in ("background", "picture")}
    same = diversity_of_prompts([appearance(grounds[1])] * 4)
    assert same == {"background": 0.0, "picture": 0.0}


def test_diversity_of_pictures_sees_places_and_that_of_backgrounds_does_not():
    left = torch.zeros(2, 3, 16, 16)
    left[..., :6] = 1
    found = diversity_of_prompts([appearance(left), appearance(left.flip(-1))])
    assert found == {"background": 0.0, "picture": pytest.approx(0.75**0.5)}
    small = appearance(left[:1, :, :5, :3])
    assert {name: value.shape for name, value in small.items()} == {"background": (3,), "picture": (192,)}


def test_diversity_falls_when_eight_of_nine_floors_have_one_colour():
    specs = [world.sample(seed) for seed in range(27)]
    sandy = [replace(spec, background="sand") if seed % 9 else spec for seed, spec in enumerate(specs)]
    found = [
        diversity_of_prompts([appearance(clip) for clip in clips.rgb_BF3HW])
        for clips in (world.render(each, num_frames=5, size=32, geometry=False) for each in (specs, sandy))
    ]
    assert found[1]["background"] < 0.7 * found[0]["background"]
    assert found[1]["picture"] < found[0]["picture"]


def test_exact_motion_is_that_of_the_rendered_clips():
    specs = [world.sample(seed) for seed in range(3)]
    clips = world.render(specs, num_frames=9, size=32, geometry=False).rgb_BF3HW
    expected = [clip_statistics(clip)["motion"] for clip in clips]
    assert exact_motion(specs, 9, 32) == pytest.approx(expected, rel=1e-5)
    assert exact_motion([], 9, 32) == []


def test_exact_clips_have_the_exact_motion_and_faster_ones_more():
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    spec = world.sample(3)
    rows += [{"prompt": "x", "spec": spec.to_dict()}, {"prompt": "a red ball stays"}]
    exact = ExactMotion(SIZE, torch.device("cpu"))
    specs = [world.parse(PROMPTS[0]), world.parse(PROMPTS[1]), spec]
    clips = world.render(specs, num_frames=17, size=32, geometry=False).rgb_BF3HW
    one, two, three = (clip_statistics(clip)["motion"] for clip in clips)
    found = exact.log_ratios([one, 2 * two, 0.3, three, 0.1], rows, [0, 1, 2, 3, 4])
    assert found[:2] == pytest.approx([0.0, math.log(2)], abs=1e-5)
    assert found[3] == pytest.approx(0, abs=1e-5)
    # No scene, and a scene in which nothing moves.
    assert (found[2], found[4]) == (None, None)
    # Several samples of a row share one rendering, which later evaluations use again.
    exact.device = "a device that does not exist"
    assert exact.log_ratios([one, one], [rows[0]] * 2, [0, 0]) == pytest.approx([0, 0], abs=1e-5)
    assert exact.log_ratios([0.0], [rows[0]], [0])[0] < -3


def test_exact_motion_in_a_run(tmp_path):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    changes = {"num_frames": 4, "rows": rows, "eval_dataset": rows, "evaluate_only": True, "num_generations_eval": 2}
    run = grpo(tmp_path, eval_motion_exact=True, **changes)
    run.train()
    row = lines(run)[0]
    found = run.evaluator.run(run.eval_prompts.rows)
    assert found.means["motion_exact"] == row["eval_motion_exact"]
    assert row["eval_motion_exact"] > 1  # noise moves more than the world
    assert min(row["eval_diversity/picture"], row["eval_diversity/background"]) > 0
    plain = grpo(tmp_path / "plain", **changes)
    plain.train()
    assert "eval_motion_exact" not in lines(plain)[0]


def test_exact_motion_is_refused_without_scenes_and_for_pictures(tmp_path):
    cats = [{"prompt": "a cat"}]
    exact = {"num_frames": 4, "eval_motion_exact": True}
    with pytest.raises(UserError, match="must be false for these held-out prompts: the prompt names no scene"):
        grpo(tmp_path, eval_dataset=cats, **exact)
    with pytest.raises(
        UserError, match="eval_motion_exact, merge_metric, eval_on_start and evaluate_only need held-out"
    ):
        grpo(tmp_path, **exact)
    scene = [{"prompt": PROMPTS[0]}]
    with pytest.raises(UserError, match="eval_motion_exact must be false for images"):
        grpo(tmp_path, eval_dataset=scene, eval_motion_exact=True, rows=scene).train()
    with pytest.raises(UserError, match="needs square clips, as the world renders them, not 4 x 2"):
        grpo(tmp_path, eval_dataset=scene, rows=scene, width=4, **exact).train()
