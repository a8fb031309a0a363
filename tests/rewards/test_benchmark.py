"""Parts of the benchmark of rewards: random networks in published shapes, gates, and measures."""

import json
import sys

import pytest
import torch

from benchmarks import judge_kinds
from benchmarks import rewards as bench
from benchmarks.reward_shapes import QWEN2_VL_2B, VIT_L_14, RandomClip, RandomVideoAlign
from benchmarks.world_constructions import KINDS
from postgen.judges.spoil import LEVELS
from postgen.rewards.clip import clip_config
from postgen.rewards.videoalign import MARKS

PROMPTS = ["a red ball rolls left", "blue cubes"]
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
QWEN = {
    "text_config": {
        **QWEN2_VL_2B["text_config"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
}


@pytest.fixture(scope="module")
def clips():
    return [torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def test_random_clip_has_the_published_shape_and_scores(clips):
    config = clip_config(VIT_L_14)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (768, 12)
    assert config.vision_config.hidden_act == "quick_gelu"
    model = RandomClip(VIT, " ".join(PROMPTS), frames=2)
    with torch.no_grad():
        scores = model(PROMPTS, clips)
        seen, read = model.forward_only(clips, PROMPTS)()
    assert all(abs(score) <= 1 for score in scores)
    assert seen.pooler_output.shape == (4, 32)
    assert read.pooler_output.shape == (2, 32)


def test_random_videoalign_scores(clips, tmp_path):
    model = RandomVideoAlign(tmp_path, " ".join(PROMPTS), QWEN)
    with torch.no_grad():
        scores = model(PROMPTS, clips, fps=8.0)
        raw = model.forward_only(clips, PROMPTS)()
    assert set(scores) == {"vq", "mq", "ta", "overall"}
    assert raw.shape == (2, len(MARKS), 3)
    assert torch.get_default_dtype() == torch.float32


def test_a_batch_is_compared_with_single_calls():
    def clean(completions):
        return [float(c.mean()) for c in completions]

    def mixing(completions):
        return [float(torch.cat(list(completions)).mean())] * len(completions)

    gaps = bench.single_gap([clean, mixing], "cpu", count=3)
    assert gaps["clean"] == 0.0
    assert gaps["mixing"] > 1e-4


def test_gates_say_what_is_missing():
    exact = {name: {"scores": [1.0, 0.5, 0.1]} for name in bench.EXACT}
    bare = {
        "exact": exact,
        "world_clip_retrieval": {},
        "judge_pairs": {},
        "batch_equals_single": {"a": 0.0},
        "times": {},
    }
    ok = {row["name"]: row["ok"] for row in bench.gates(bare)}
    assert ok["batch_equals_single"]
    assert ok["permanence_spoilt_clips"]
    assert not ok["judge_pair_accuracy_min"]
    assert not ok["world_clip_retrieval_at_1"]
    assert not ok["clips_per_s_clip_l"]
    full = bare | {
        "world_clip_retrieval": {"all": 0.9},
        "judge_pairs": {f"level {bench.LEVEL}": {"blur": 0.95, "noise": 0.89}},
        "times": {"clip_l": {"clips_per_s": 6.0, "forward_only_clips_per_s": 10.0, "peak_gib": 1.0}},
    }
    ok = {row["name"]: row["ok"] for row in bench.gates(full)}
    assert ok["world_clip_retrieval_at_1"]
    assert ok["clips_per_s_clip_l"]
    assert not ok["judge_pair_accuracy_min"]


def test_parts_are_measured_again_and_the_rest_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "rewards.json"
    exact = {name: {"strengths": [0, 1], "scores": [0.5, 0.5]} for name in bench.EXACT}
    times = {"clip_l": {"clips_per_s": 6.0, "forward_only_clips_per_s": 10.0, "peak_gib": 1.0}}
    old = {"exact": exact, "world_clip_retrieval": {}, "judge_pairs": {}, "batch_equals_single": {"a": 0.0}}
    path.write_text(json.dumps({"date": "then", "device": "GPU", "versions": {}, **old, "times": times, "gates": []}))
    better = {name: {"strengths": [0, 1], "scores": [1.0, 0.0]} for name in bench.EXACT}
    monkeypatch.setattr(bench, "exact_rows", lambda count, device: better)
    call = ["rewards", "--device", "cpu", "--output", str(path), "--parts"]
    monkeypatch.setattr(sys, "argv", [*call, "exact"])
    bench.main()
    found = json.loads(path.read_text())
    assert (found["exact"], found["times"], found["device"]) == (better, times, "GPU")
    assert set(found["remeasured"]) == {"exact"}
    weights = found["remeasured"]["exact"]["settings"]["weights"]
    assert {name: len(digits) for name, digits in weights.items()} == {"world_clip": 12, "world_judge now": 12}
    ok = {row["name"]: row["ok"] for row in found["gates"]}
    assert ok["world_true_clips"]
    assert ok["clips_per_s_clip_l"]
    monkeypatch.setattr(sys, "argv", [*call, "times"])
    with pytest.raises(SystemExit, match="on a GPU only"):
        bench.main()


def test_separation_is_the_share_of_pairs_in_order():
    right, wrong = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0])
    assert judge_kinds.separation(right, wrong) == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 0) / 6)


def test_constructions_of_the_judge_are_known_kinds():
    names = [*judge_kinds.WRONG, *judge_kinds.PLAIN, *judge_kinds.UNUSUAL]
    assert len(names) == len(set(names))
    assert {KINDS[name].right for name in judge_kinds.WRONG} == {False}
    assert {KINDS[name].right for name in (*judge_kinds.PLAIN, *judge_kinds.UNUSUAL)} == {True}
    assert set(judge_kinds.WRONG.values()) <= {"", *LEVELS}


def test_table_of_constructions_has_a_column_for_each_judge(monkeypatch):
    monkeypatch.setattr(judge_kinds, "WRONG", {"strobes": "strobe"})
    monkeypatch.setattr(judge_kinds, "PLAIN", ("true fall",))
    monkeypatch.setattr(judge_kinds, "UNUSUAL", ())

    def steady(prompts, completions):
        """Score by the change after frame 8: strobing changes every frame, a fall has ended by then."""
        return [-float(clip[8:].diff(dim=0).abs().mean()) for clip in completions]

    def blind(prompts, completions):
        return [0.0] * len(completions)

    found = judge_kinds.table({"now": steady, "before": blind})
    apart = found["kinds"]["strobes"]["now_plain"]
    assert apart > 0.8
    assert found["kinds"]["strobes"]["before_right"] == 0.5
    assert found["means"]["now"] == {
        **dict.fromkeys(("all_plain", "all_right", "trained_plain", "trained_right"), apart),
        **dict.fromkeys(("untrained_plain", "untrained_right")),
    }
