"""The gates of the benchmark results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gates
from benchmarks.gates import amend_result, gate, main, read_result, recompute, write_result

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("value", "op", "target", "ok"),
    [
        (0.8, ">=", 0.8, True),
        (0.79, ">=", 0.8, False),
        (3, "<=", 3, True),
        (3.1, "<=", 3, False),
        (0, "==", 0, True),
        (1e-9, "==", 0, False),
        (None, "<=", 3, False),
        (float("nan"), ">=", 0, False),
        (float("nan"), "<=", 0, False),
    ],
)
def test_gate_compares(value, op, target, ok):
    assert gate("g", value, op, target)["ok"] is ok


def test_gate_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="known are >=, <=, =="):
        gate("g", 1, ">", 0)
    with pytest.raises(ValueError, match="finite number"):
        gate("g", 1, ">=", float("nan"))


def test_result_is_stamped_and_replaced_whole(tmp_path):
    path = write_result(tmp_path / "r.json", {"seed": 3, "gates": [gate("a", 1, ">=", 0)]})
    written = json.loads(path.read_text())
    assert {"date", "device", "versions", "seed", "gates"} == written.keys()
    assert {"python", "torch", "diffusers"} <= written["versions"].keys()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(path, {"gates": [gate("a", float("nan"), ">=", 0)]})
    with pytest.raises(ValueError, match="sets date itself"):
        write_result(path, {"date": "today", "gates": []})
    assert json.loads(path.read_text()) == written
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_parts_measured_again_have_stamps_of_their_own(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"date": "then", "device": "1x GPU", "versions": {}, "a": 1, "times": 2, "gates": []}))
    rows = [gate("a", 3, ">=", 2)]
    amend_result(path, {"a": 3}, {"scenes": 8}, rows)
    again = read_result(path)
    assert {key: again[key] for key in ("date", "device", "versions", "a", "times", "gates")} == {
        "date": "then",
        "device": "1x GPU",
        "versions": {},
        "a": 3,
        "times": 2,
        "gates": rows,
    }
    stamp = again["remeasured"]["a"]
    assert set(again["remeasured"]) == {"a"}
    assert stamp["device"] == gates.device()
    assert stamp["settings"] == {"scenes": 8}
    # Values that were measured earlier keep their stamp.
    amend_result(path, {"b": 4}, {"scenes": 9}, rows)
    assert read_result(path)["remeasured"]["a"] == stamp
    with pytest.raises(ValueError, match="device cannot be measured"):
        amend_result(path, {"device": "another"}, {}, rows)
    with pytest.raises(FileNotFoundError):
        amend_result(tmp_path / "none.json", {"a": 1}, {}, rows)


def test_bare_name_goes_to_the_results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "RESULTS", tmp_path)
    assert write_result("kernels", {"gates": []}) == tmp_path / "kernels.json"


def test_main_recomputes_and_prints_what_falls_short(tmp_path, capsys):
    rows = [gate("good", 2, ">=", 1), gate("forged", 0.25, ">=", 1) | {"ok": True}, gate("unknown", None, "<=", 5)]
    write_result(tmp_path / "model.json", {"gates": rows})
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "forged" in output
    assert "0.25" in output
    assert "not measured" in output
    assert "good" not in output
    assert "1 of 3 gates are met" in output
    assert main([str(tmp_path), "--strict"]) == 1
    write_result(tmp_path / "model.json", {"gates": rows[:1]})
    assert main([str(tmp_path), "--strict"]) == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', '{"gates": [{"name": "a", "value": 1}]}'])
def test_broken_result_file_is_one_line_and_exit_2(tmp_path, capsys, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        recompute(tmp_path / "bad.json")
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_module_runs_on_the_committed_results():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gates"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gates are met" in done.stdout


def test_committed_results_say_the_truth():
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        assert json.loads(path.read_text())["gates"] == recompute(path), path.name
