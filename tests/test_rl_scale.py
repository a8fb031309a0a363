"""The benchmark of training on several GPUs: its runs have equal updates, and its bound and gates are right."""

import json

import pytest

from benchmarks.docs_tables import filled
from benchmarks.faults_two_gpus import SPREADS, TRAINERS
from benchmarks.rl_scale import main, payload, summary
from benchmarks.rl_scale_rows import METHODS, rows_of
from benchmarks.rl_scale_tables import MAKERS, PAGE, bound, tables
from postgen.grpo.batches import Batches
from postgen.training import load_recipe


@pytest.mark.parametrize("gpus", [(1, 2), (1, 2, 4, 8)])
@pytest.mark.parametrize("part", ["tiny", "split", "wan", "wan14"])
def test_all_runs_of_a_part_have_the_same_updates(part, gpus, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    rows = rows_of(part, gpus, small=False)
    assert {row.gpus for row in rows} == set(gpus)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        kind, recipe = load_recipe(row.recipe, ["--train_dataset", str(tmp_path / "prompts.jsonl")])
        config = kind.config_class.from_dict({**recipe.to_dict(), **row.settings("cpu"), "output_dir": "runs/x"})
        batches = [Batches.of(config, row.gpus, rank) for rank in range(row.gpus)]
        assert {(each.samples, each.group, each.updates) for each in batches} == {(row.samples, row.group, 1)}


def timed(run, gpus, seconds, train, **changes):
    part, method, weights, spread, _ = run.split("-")
    row = {"run": run, "part": part, "method": method, "lora": weights == "lora", "spread": spread, "gpus": gpus}
    row |= {"samples": 8, "group": 4, "seconds": seconds, "train_seconds": train, "error": "", "peak_gb": 20.0}
    return {**row, "rollout_share": 1 - train / seconds, "trained_parameters": 0, **changes}


@pytest.mark.parametrize(
    ("train", "gpus", "measured", "separate", "drawing"),
    [
        # R = 6, T = 4: one of two GPUs needs 6 s for rollouts, data parallel training without losses 5 s.
        (4.0, 2, 5.0, 6.0, 1),
        (5.0, 2, 6.0, 5.0, 1),
        # R = 7, T = 3: 5 of 8 draw, max(7 / 5, 3 / 3); with 6, max(7 / 6, 3 / 2).
        (3.0, 8, 1.25, 1.4, 5),
    ],
)
def test_bound_of_separate_gpus(train, gpus, measured, separate, drawing):
    one = timed("wan-dancegrpo-lora-one-1", 1, 10.0, train)
    found = bound(one, timed(f"wan-dancegrpo-lora-ddp-{gpus}", gpus, measured, 0.0))
    assert found["separate_seconds"] == pytest.approx(separate)
    assert found["rollout_gpus"] == drawing
    assert found["gain"] == pytest.approx(measured / separate)
    assert found["gain"] <= measured / (10.0 / gpus) + 1e-9  # 1 / efficiency


def rows_of_a_result():
    rows = [
        timed(f"wan-{method}-{weights}-{spread}", gpus, seconds, 3.0)
        for method in METHODS
        for weights in ("lora", "full")
        for spread, gpus, seconds in (("one-1", 1, 10.0), ("ddp-2", 2, 5.0 if weights == "lora" else 5.5))
    ]
    same = {"part": "equal", "gpus": 2, "of": 2, "error": "", "wall_seconds": 1.0}
    names = [f"equal-{trainer}-{spread}-of-2" for trainer in TRAINERS for spread in SPREADS]
    return rows + [{**same, "run": name, "max_abs": 1e-7 * number} for number, name in enumerate(names, 1)]


def test_gates_need_all_their_runs():
    rows = rows_of_a_result()
    gates = {each["name"]: each for each in payload(rows)["gates"]}
    assert gates["ddp_2gpu_speedup"]["value"] == pytest.approx(10 / 5.5)
    assert gates["two_gpu_max_abs"]["value"] == pytest.approx(6e-7)
    for missing in (0, 1, 7, len(rows) - 1):
        fewer = payload([row for number, row in enumerate(rows) if number != missing])
        assert sum(each["value"] is None for each in fewer["gates"]) == 1
    rows[-1] |= {"error": "died", "max_abs": None}
    assert payload(rows)["gates"][0]["value"] is None
    assert payload([])["gates"][1]["value"] is None


def test_a_run_that_was_ended_keeps_its_measured_updates(tmp_path):
    row = rows_of("wan", [1], small=False)[0]
    (tmp_path / "log").write_text("Timeout (0:02:00)!")
    assert "Timeout" in summary(row, tmp_path)["error"]
    assert "seconds" not in summary(row, tmp_path)
    (tmp_path / "run").mkdir()
    lines = [
        {"step": step, "step_time": step, "timing/rollout": 0.5, "timing/decode": 0.25, "timing/reward": 0.25}
        for step in (1, 2)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summary(row, tmp_path)
    assert (found["seconds"], found["rollout_share"], found["train_seconds"]) == (2.0, 0.5, 1.0)
    assert found["error"]


def test_page_has_the_tables_of_the_committed_result():
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, tables()) == text
    made = {name: list(make(payload(rows_of_a_result()))) for name, make in MAKERS.items()}
    assert made["rl_times"][3] == "| Wan 1.3B shape | dancegrpo | LoRA | ddp | 2 | 5 | 2 | 0.4 | 20 |"
    assert made["rl_equality"][2] == "| dancegrpo-ddp-of-2 | 2 | 1.0e-07 |"
    assert made["rl_separate"][2] == "| wan-dancegrpo-lora-ddp-2 | 0.7 | 5 | 7 | 0.714 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu only tests the benchmark: add --tiny"),
        (["--device", "cpu", "--tiny", "-o", "benchmarks/results/rl_scale.json"], "rl_scale.json holds times of GPUs"),
        (["--gpus", "8"], "--gpus has 8, but torch finds"),
    ],
)
def test_wrong_options_are_told(tmp_path, capsys, words, message):
    assert main(["--part", "wan", "-o", str(tmp_path / "x.json"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "x.json").exists()
