"""The benchmark of quantised layers and steps, with tiny models: rows, floors, gates, time limit, GGUF's packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quant_speed, quant_speed_layers
from benchmarks.lowp_steps import tiny
from benchmarks.quant_speed import FIRST, MEASURED, TINY, Run, floors, gates, main
from benchmarks.quant_speed_methods import BF16, METHODS, OURS, Method, q4_0, q8_0
from benchmarks.quant_speed_steps import CASES, step_rows

ERRORS = {"fp8": 0.037, "fp8 blocks": 0.037, "int8": 0.01, "int8, rotated": 0.01, "int4": 0.105, "int4 in fp8": 0.108}


def never() -> bool:
    return False


def test_layers() -> None:
    rows = [*quant_speed_layers.layer_rows(TINY[0], (BF16, *OURS), "cpu", False, never)]
    quant_speed_layers.compare(rows)
    assert all(row["ms"] > 0 and row["vs_bf16"] > 0 for row in rows)
    found = {row["method"]: row["error"] for row in rows}
    assert found["bf16"] < 0.003
    for name, error in ERRORS.items():
        assert found[name] == pytest.approx(error, rel=0.15)


def test_a_method_that_is_missing_or_fails_ends_nothing() -> None:
    def broken(linear: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    methods = [BF16, Method(name="a", make=broken, package="no_such"), Method(name="b", make=broken)]
    methods.append(Method(name="c", make=broken, package="no_such.child"))
    rows = quant_speed_layers.layer_rows(TINY[0], methods, "cpu", False, never)
    assert [row.get("why") for row in rows] == [
        *(None, "not installed", "failed: RuntimeError: first line", "not installed")
    ]


def test_steps() -> None:
    methods = [each for each in METHODS if each.name in ("bf16", "int8", "int4 in fp8")]
    rows = [*step_rows(tiny(), methods, "cpu", never, repeats=1)]
    assert [row["method"] for row in rows] == ["bf16", "int8", "int4 in fp8"]
    assert rows[0]["difference"] == 0
    assert 0 < rows[1]["difference"] < rows[2]["difference"] < 0.05
    assert rows[0]["weight_bytes"] > rows[1]["weight_bytes"] > rows[2]["weight_bytes"]


def test_nothing_begins_after_the_limit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("cpu", -1.0, str(tmp_path / "found.json"))
    run.measure(TINY[:1], [tiny()], {"layers": [], "steps": []})
    assert {row["why"] for row in (*run.layers, *run.steps)} == {"the time was over", "not installed"}
    assert (tmp_path / "found.json").is_file()


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut in the middle of a shape or of a model keeps the rows before, with their comparison."""
    ways = [each for each in METHODS if each.name in ("bf16", "int8", "int4 in fp8")]

    def cut(linear: Any) -> Any:
        raise KeyboardInterrupt

    broken = Method(name="int4", make=cut)
    monkeypatch.setattr(quant_speed, "METHODS", [*ways, broken])
    run = Run("cpu", 300.0, str(tmp_path / "found.json"))
    with pytest.raises(KeyboardInterrupt):
        run.measure(TINY[:1], [], {"layers": [], "steps": []})
    with pytest.raises(KeyboardInterrupt):
        run.measure([], [tiny()], {"layers": run.layers, "steps": []})
    found = json.loads((tmp_path / "found.json").read_text())
    for part in ("layers", "steps"):
        assert [row["method"] for row in found[part]] == ["bf16", "int8", "int4 in fp8"]
        assert found[part][0]["vs_bf16"] == 1
        assert all(row["vs_bf16"] > 0 for row in found[part])


def test_shapes_and_floors() -> None:
    assert {shape.model for shape in MEASURED} == {FIRST, "Wan 1.3B 480p 81f", "HunyuanVideo 720p 129f"}
    assert len(MEASURED) == 12
    of_first = [floors(shape) for shape in MEASURED if shape.model == FIRST]
    total = {name: sum(each[name] for each in of_first) for name in of_first[0]}
    # The numbers of the module's docstring.
    assert total["bf16"] == pytest.approx(20.4, abs=0.05)
    assert total["bf16"] / total["eight_bits"] == pytest.approx(1.84, abs=0.005)
    assert total["four_in_eight_bits"] - total["eight_bits"] == pytest.approx(0.09, abs=0.002)
    with torch.device("meta"):
        tokens = [case.arguments()["hidden_states"].shape for case in CASES]
    assert [shape[2] * shape[3] * shape[4] // 4 for shape in tokens] == [32760, 32760, 32400]


def test_gates() -> None:
    times = {"bf16": 4.0, "fp8": 2.0, "int4 in fp8": 2.1}
    names = [shape.layers for shape in MEASURED if shape.model == FIRST]
    layers = [
        {"model": FIRST, "layers": name, "method": method, "ms": ms} for method, ms in times.items() for name in names
    ]
    found = {each["name"]: (round(each["value"], 3), each["ok"]) for each in gates(layers)}
    assert found == {
        "fp8_linear_speedup": (2.0, True),
        "w4_fp8_linear_vs_fp8": (0.952, True),
        "wan14b_memory_ratio_w4": (0.295, True),
    }
    layers[5] = {"model": FIRST, "layers": names[1], "method": "fp8", "why": "the time was over"}
    assert gates(layers)[0]["value"] is None
    assert gates(layers[:5] + layers[6:])[0]["value"] is None  # a run that was cut
    assert [each["ok"] for each in gates([])] == [False, False, True]


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs a GPU with FP8 and a model: cpu has no FP8 matrix product" in capsys.readouterr().err
    assert main(["--only", "Nobody"]) == 2
    called: list[Any] = []
    monkeypatch.setattr(quant_speed.Run, "measure", lambda self, *given: called.append((self.output, given)))
    assert main(["--tiny"]) == 0
    assert called[0][0] is None


def test_gguf_packing() -> None:
    """Numbers by hand; the package gguf gives the same bytes."""
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[0, 17] = -8, 4, 1
    weight[1, 32:] = 127
    packed = q4_0(weight).view(2, 2, 18)
    assert packed[0, 0, :2].view(torch.float16).item() == 1
    assert packed[0, 0, 2:5].tolist() == [0 | 8 << 4, 12 | 9 << 4, 8 | 8 << 4]
    packed = q8_0(weight).view(2, 2, 34)
    assert packed[0, 0, 2:4].view(torch.int8).tolist() == [-127, 64]
    assert packed[1, 1, :2].view(torch.float16).item() == 1
    assert packed[1, 1, 2:].view(torch.int8).tolist() == [127] * 32
    assert (packed[1, 0] == 0).all()
