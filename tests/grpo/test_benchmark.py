"""The report of the benchmark, from logs that the test writes."""

import json

import pytest
import yaml

from benchmarks import dancegrpo as benchmark
from benchmarks.gates import recompute


def write_run(folder, name, rewards, *, forwards, seconds, error=1e-7):
    run = folder / name
    run.mkdir(parents=True)
    rows = []
    for number, reward in enumerate(rewards):
        cost = {"eval_cost/forward_equivalents": number * forwards, "eval_cost/transformer_seconds": number * seconds}
        rows.append({"step": number, "eval_reward": reward, "eval_motion": 0.01, benchmark.RIGHT: reward / 2, **cost})
        rows.append({"step": number + 1, "timing/rollout": 1.0, "seconds": 2.0 * number, "logp_diff/max": error})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 99, "half a l')  # the run is still writing this line
    (run / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(run), "learning_rate": 1e-5}))


def reported(folder, capsys):
    benchmark.report(folder, str(folder / "out.json"))
    result = json.loads((folder / "out.json").read_text())
    gates = {row["name"]: row["value"] for row in recompute(folder / "out.json")}
    return result, gates, capsys.readouterr().out


def test_grpo_benchmark_compares_costs_at_the_best_score_of_both(tmp_path, capsys):
    write_run(tmp_path, "dancegrpo-tiny", [0.4, 0.6, 0.8], forwards=100, seconds=10)
    write_run(tmp_path, "fast-tiny", [0.4, 0.7, 0.9], forwards=20, seconds=5)
    write_run(tmp_path, "nft-tiny", [0.4, 0.3], forwards=1, seconds=1)
    (tmp_path / "exact.json").write_text('{"resume_identical": 1, "ranks_max_abs": 0.0}')
    result, gates, told = reported(tmp_path, capsys)
    # The reward 0.8 is half-way between the second and the third evaluation of fast-tiny.
    assert result["costs"]["fast-tiny"]["forward_equivalents"] == pytest.approx(30)
    assert gates["forward_equivalents_ratio"] == pytest.approx(30 / 200)
    assert gates["transformer_seconds_ratio"] == pytest.approx(7.5 / 20)
    assert (gates["world_gain"], gates["world_final"]) == (pytest.approx(2), pytest.approx(0.4))
    assert (gates["resume_identical"], gates["ranks_max_abs"], gates["motion_ratio_low"]) == (1, 0.0, 1.0)
    assert gates["onpolicy_ratio_error"] == 1e-7
    assert result["missing"] == [
        "the costs of nft-tiny: it or dancegrpo-tiny rose above both starts by chance at most"
    ]
    assert "missing: the costs of nft-tiny" in told
    assert "output_dir" not in result["runs"]["fast-tiny"]["settings"]
    assert (tmp_path / "out.png").is_file()


def test_grpo_benchmark_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="run 'train dancegrpo-tiny' first"):
        benchmark.report(tmp_path, str(tmp_path / "out.json"))
    write_run(tmp_path, "dancegrpo-tiny", [0.4], forwards=100, seconds=10, error=None)
    result, gates, _ = reported(tmp_path, capsys)
    assert [line.partition(":")[0] for line in result["missing"]] == [
        "the run fast-tiny",
        "the run nft-tiny",
        "a second evaluation of dancegrpo-tiny",
        "resume and two processes",
    ]
    # A NaN error must not count as 0.
    assert gates["onpolicy_ratio_error"] is None
    assert gates["forward_equivalents_ratio"] is None


def test_a_short_run_says_whether_it_learns(tmp_path):
    write_run(tmp_path, "dancegrpo-tiny", [0.4, 0.42], forwards=100, seconds=10)
    write_run(tmp_path, "nft-tiny", [0.4, 0.5], forwards=100, seconds=10)
    write_run(tmp_path, "fast-tiny", [0.4], forwards=100, seconds=10)
    benchmark.learns(tmp_path, str(tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["gates"]
    assert [(row["name"], row["ok"]) for row in rows] == [("rise_dancegrpo_tiny", False), ("rise_nft_tiny", True)]
