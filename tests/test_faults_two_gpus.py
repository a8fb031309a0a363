"""What `benchmarks.faults_two_gpus` counts as a successful resume, and how its file is merged into `faults.json`."""

import json

import pytest

from benchmarks import faults
from benchmarks.faults_two_gpus import TOLERANCE, goes_on
from benchmarks.gates import gate, read_result

ROW = {"run": "a-to-1", "processes": 1, "seconds": 1.0, "refused": "", "max_abs": 1e-7, "log": []}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"max_abs": 2 * TOLERANCE}, False),
        ({"max_abs": None, "log": ["[process 0] RuntimeError"]}, False),
        ({"max_abs": None}, False),
        ({"max_abs": None, "refused": "it is not possible", "log": ["UserError"]}, False),
        ({"max_abs": None, "refused": "Set gradient_accumulation_steps 2", "log": ["UserError"]}, True),
    ],
)
def test_only_a_run_that_goes_on_or_is_told_how_counts(changes, expected):
    assert goes_on({**ROW, **changes}) is expected


def test_gates_of_two_gpus_are_taken_with_their_stamp(tmp_path):
    stamp = {"date": "then", "device": "2x GPU", "versions": {"torch": "2"}}
    before = {"date": "now", "device": "CPU", "versions": {}, "seed": 18, "not_measured": ["two_gpu_max_abs"]}
    old = gate("short_reads", 3, "==", 0)
    before |= {"gates": [old], "rows": {"short_reads": [{"short": 3}]}}
    two = [{**ROW, "run": name, "processes": 2} for name in ("a-ddp", "b-ddp")]
    two[1] |= {"max_abs": None, "log": ["died"]}
    source = {
        **stamp,
        "settings": {"steps": 4},
        # The targets of `faults.py` apply.
        "gates": [gate(name, value, "==", 1) for name, value in zip(faults.TWO_GPUS, (1e-7, 1, 1), strict=True)],
        "rows": {"two_gpus": [{**ROW, "run": "a-one"}, *two], "resume": [ROW]},
    }
    paths = tmp_path / "faults.json", tmp_path / "two.json"
    for path, content in zip(paths, (before, source), strict=True):
        path.write_text(json.dumps(content))
    faults.main(["--output", str(paths[0]), "--take", str(paths[1])])
    found = read_result(paths[0])
    assert {key: found[key] for key in stamp} == {key: before[key] for key in stamp}
    assert found["remeasured"] == {name: {**stamp, "settings": {"steps": 4}} for name in faults.TWO_GPUS}
    gates = {row["name"]: row for row in found["gates"]}
    assert gates["short_reads"] == old
    assert (gates["two_gpu_max_abs"]["target"], gates["two_gpu_max_abs"]["ok"]) == (1e-4, True)
    assert not gates["two_gpu_combinations"]["ok"]
    assert found["rows"]["two_gpu_combinations"] == [
        {"run": "a-ddp", "trained": True},
        {"run": "b-ddp", "trained": False},
    ]
    assert found["rows"]["resume_other_count"] == [ROW]
    assert found["rows"]["short_reads"] == [{"short": 3}]
    assert found["not_measured"] == []
    # Later measurements do not change these values and their stamp.
    again = faults.measured(["none of them"], found)
    assert again["remeasured"] == found["remeasured"]
    assert [row for row in again["gates"] if row["name"] in faults.TWO_GPUS] == [
        gates[name] for name in faults.TWO_GPUS
    ]
