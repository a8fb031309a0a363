"""The benchmark of several GPUs: its runs have equal updates, its bound and gates are right, and tiny runs work."""

import json
from functools import partial

import pytest

from benchmarks.dancegrpo_report import missing
from benchmarks.docs_tables import filled
from benchmarks.faults_two_gpus import SPREADS, TRAINERS
from benchmarks.gates import read_result
from benchmarks.launches import ROOT
from benchmarks.rl_scale import Scale, job_of, main, summary, summary_of_split
from benchmarks.rl_scale_gates import payload
from benchmarks.rl_scale_rows import LAUNCHES, METHODS, rows_of
from benchmarks.rl_scale_tables import MAKERS, PAGE, RESULT_NAME, bound, speedups, tables
from benchmarks.rl_scale_ulysses import CONFIG, Split, splits_of, tokens_of
from benchmarks.rl_scale_worker import main as work
from postgen.grpo.batches import Batches
from postgen.training import load_recipe
from tests.training.pair import run_pair


@pytest.mark.parametrize("part", ["tiny", "split", "wan", "wan14"])
def test_runs_have_the_updates_that_their_rows_say(part, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    rows = rows_of(part, (1, 2, 4, 8), small=False)
    assert {row.gpus for row in rows} == {1, 2, 4, 8}
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        kind, recipe = load_recipe(row.recipe, ["--train_dataset", str(tmp_path / "prompts.jsonl")])
        config = kind.config_class.from_dict({**recipe.to_dict(), **row.settings("cpu"), "output_dir": "runs/x"})
        batches = [Batches.of(config, row.gpus, rank) for rank in range(row.gpus)]
        assert {(each.samples, each.group, each.updates) for each in batches} == {(row.samples, row.group, 1)}
    samples = {row.gpus: row.samples for row in rows}
    assert samples[1] == samples[2]
    assert part == "tiny" or samples[2] / 2 == samples[4] / 4 == samples[8] / 8
    assert len({(row.gpus, row.samples) for row in rows}) == 4
    # A run does not depend on the other numbers of GPUs of a call.
    assert {row for row in rows if row.gpus in (1, 8)} == set(rows_of(part, (8, 1), small=False))


def test_tokens_and_heads_of_wan_14b_can_be_split():
    rows = splits_of((8, 4, 2, 1), small=False)
    assert [row.name for row in rows[:5]] == [f"ulysses-bfloat16-{n}" for n in (1, 2, 4, 8)] + ["ulysses-float32-2"]
    assert {row.spread for row in rows if row.gpus == 1} == {"one"}
    for row in rows:
        assert tokens_of(row) == 75600
        assert tokens_of(row) % row.gpus == CONFIG["num_attention_heads"] % row.gpus == 0


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


def test_speed_up_is_of_samples_per_second_on_one_machine():
    one = timed("wan-dancegrpo-lora-one-1", 1, 20.0, 8.0)
    eight = timed("wan-dancegrpo-lora-ddp-8", 8, 11.0, 4.0, samples=32)
    assert speedups([one, eight])[0]["speedup"] == pytest.approx(80 / 11)
    assert speedups([one, eight])[0]["efficiency"] == pytest.approx(10 / 11)
    # 80 s of one GPU for 32 samples: 48 of rollout on 5 GPUs, 32 of training on 3.
    assert bound(one, eight)["separate_seconds"] == pytest.approx(32 / 3)
    assert bound(one, eight)["rollout_share"] == pytest.approx(0.6)
    assert speedups([one, {**eight, "device": "8x H200"}]) == []
    assert len(speedups([one, {**one, "device": "8x H200"}, {**eight, "device": "8x H200"}])) == 1


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
    speed, equal = {"ddp_2gpu_speedup", "ddp_efficiency_2"}, {"two_gpu_max_abs"}
    lacks = {0: speed, 1: speed, 7: speed, len(rows) - 2: equal, len(rows) - 1: equal | {"fsdp2_equal_2"}}
    for left_out, names in lacks.items():
        fewer = values([row for number, row in enumerate(rows) if number != left_out])
        assert {name for name, value in fewer.items() if value is None} == names | {"ulysses_exact_2"}
    rows[-1] |= {"error": "died", "max_abs": None}
    assert payload(rows)["gates"][0]["value"] is None
    assert payload([])["gates"][1]["value"] is None


def passed(gpus, seconds, **changes):
    row = {"part": "ulysses", "run": f"ulysses-bfloat16-{gpus}", "spread": "ddp", "precision": "bfloat16", "error": ""}
    row |= {"gpus": gpus, "seconds": seconds, "seconds_off": seconds, "effect": 0.1, "relative_error": None}
    return {**row, "peak_gb": 40.0, **changes}


def values(rows):
    return {each["name"]: each["value"] for each in payload(rows)["gates"]}


def test_gates_of_split_passes_and_of_more_than_two_gpus():
    rows = rows_of_a_result()
    assert values(rows)["ddp_efficiency_2"] == pytest.approx(5 / 5.5)
    assert values(rows)["fsdp2_equal_2"] == pytest.approx(6e-7)  # of the last run
    assert values(rows)["ulysses_exact_2"] is None
    # Wan 14B counts if it is there.
    large = [timed("wan14-dancegrpo-lora-one-1", 1, 10.0, 3.0), timed("wan14-dancegrpo-lora-ddp-2", 2, 6.0, 3.0)]
    assert values(rows + large)["ddp_efficiency_2"] == pytest.approx(5 / 6)
    passes = [passed(1, 12.0), passed(2, 6.5, relative_error=1e-4)]
    assert values(passes)["ulysses_exact_2"] == 1e-4
    assert values([passes[0], passed(2, 6.5, relative_error=1e-4, effect=1e-4)])["ulysses_exact_2"] is None
    assert (
        values([passes[0], {"part": "ulysses", "run": "ulysses-bfloat16-2", "gpus": 2, "error": "died"}])[
            "ulysses_exact_2"
        ]
        is None
    )
    # Gates of four and eight GPUs appear with the first run on so many.
    assert not {"ulysses_step_speedup_4", "ddp_efficiency_8"} & values(passes).keys()
    assert values([*passes, passed(4, 3.75)])["ulysses_step_speedup_4"] == pytest.approx(3.2)
    assert "ddp_efficiency_8" not in values([*passes, passed(4, 3.75)])
    assert values([passed(8, 2.0)])["ddp_efficiency_8"] is None
    assert values([passed(8, 2.0)])["ulysses_step_speedup_4"] is None
    for method in METHODS:
        for weights in ("lora", "full"):
            rows.append(timed(f"wan-{method}-{weights}-ddp-8", 8, 6.25, 3.0, samples=32))
    assert values(rows)["ddp_efficiency_8"] == pytest.approx(0.8)


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
    assert made["rl_times"][3] == "| Wan 1.3B shape | dancegrpo | LoRA | ddp | 2 | 8 | 5 | 2 | 0.4 | 20 |"
    assert made["rl_split"] == ["Not measured yet."]
    split = MAKERS["rl_split"](payload([passed(1, 12.0), passed(4, 4.0, relative_error=1e-4)]))
    assert split[2:] == [
        "| bfloat16 | 1 | 12 | 12 | - | - | 0.1 | 40 |",
        "| bfloat16 | 4 | 4 | 4 | 3 | 0.0001 | 0.1 | 40 |",
    ]
    assert "| `ddp_efficiency_2` | 0.9091 | >= 0.85 | met |" in made["rl_gates"]
    assert "| `ulysses_exact_2` | not measured | <= 0.002 | missed |" in made["rl_gates"]
    assert made["rl_equality"][2] == "| dancegrpo-ddp-of-2 | 2 | 1.0e-07 |"
    assert made["rl_separate"][2] == "| wan-dancegrpo-lora-ddp-2 | 0.7 | 5 | 7 | 0.714 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu only tests the benchmark: add --tiny"),
        (["--device", "cpu", "--tiny", "-o", "benchmarks/results/scaling.json"], "scaling.json holds times of GPUs"),
        (["--gpus", "8"], "--gpus has 8, but torch finds"),
    ],
)
def test_wrong_options_are_told(tmp_path, capsys, words, message):
    assert main(["--part", "wan", "-o", str(tmp_path / "x.json"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_the_report_of_the_recipes_says_that_several_gpus_are_not_measured():
    told = "several GPUs: python -m benchmarks.rl_scale"
    assert told in missing({}, {}, {})
    assert told in missing({}, {}, {"ddp_2gpu_speedup": None, "two_gpu_max_abs": 1e-7})
    assert told not in missing({}, {}, {"ddp_2gpu_speedup": 1.5, "two_gpu_max_abs": 1e-7})


def test_files_for_accelerate_name_every_number_of_gpus_of_the_result():
    for row in read_result(RESULT_NAME)["rows"]:
        launch = LAUNCHES[row["spread"]] if "spread" in row else ""
        if launch and not row["error"]:
            text = (ROOT / "recipes" / "accelerate" / f"{launch}.yaml").read_text()
            head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
            run_on = head.partition("Run on: ")[2].partition("Not run on")[0]
            assert f" {row['gpus']}" in f" {run_on.partition('GPUs')[0]}", f"{launch}.yaml does not name {row['run']}"


def test_a_call_measures_only_what_its_machine_lacks(tmp_path, monkeypatch, capsys):
    file = tmp_path / "scaling.json"
    assert main(["--report", "-o", str(file)]) == 0
    assert "ulysses_exact_2: not measured (target <= 0.002) MISSED" in capsys.readouterr().out
    scale = Scale(file, "cpu", 0.0)
    row = splits_of((1,), small=True)[0]
    scale.measure(row)
    assert scale.left_out == [row.name]
    scale.keep({"run": row.name, "part": "ulysses", "gpus": 1, "error": ""})
    assert row.name in Scale(file, "cpu", 0.0).known
    assert not Scale(file, "cpu", 0.0, again=True).known
    monkeypatch.setattr("benchmarks.rl_scale.machine", lambda: "another")
    other = Scale(file, "cpu", 0.0)
    assert not other.known
    other.keep({"run": row.name, "part": "ulysses", "gpus": 1, "error": ""})
    assert len(read_result(file)["rows"]) == 2
    assert main(["--part", "ulysses", "-o", str(file), "--device", "cpu", "--tiny", "--seconds", "1"]) == 3


def tiny_run(name, folder):
    """Do a run in one of two processes."""
    assert work(str(folder / name / "job.json")) == 0


def tiny_rows():
    return [*splits_of((2,), small=True), *(row for row in rows_of("wan", (2,), small=True) if row.gpus == 2)]


JOBS = [partial(tiny_run, row.name) for row in tiny_rows()]


@pytest.mark.slow
def test_tiny_runs_in_two_processes(tmp_path):
    for row in tiny_rows():
        (tmp_path / row.name).mkdir()
        job_of(row, tmp_path / row.name, "cpu", 60.0)
    run_pair("tests.test_rl_scale:JOBS", tmp_path)
    found = {}
    for row in tiny_rows():
        summed = summary_of_split if isinstance(row, Split) else summary
        found[row.name] = summed(row, tmp_path / row.name)
    assert {each["error"] for each in found.values()} == {""}
    exact = found["ulysses-float32-2"]
    assert exact["effect"] > 0.1
    assert max(exact["relative_error"], exact["max_abs"], exact["gain_error"]) < 2e-6
    assert found["ulysses-bfloat16-2"]["relative_error"] < 2e-3
    assert found["wan-dancegrpo-lora-ddp-2"]["seconds"] > 0
    assert values([{**row, "device": "a"} for row in found.values()])["ulysses_exact_2"] is not None
