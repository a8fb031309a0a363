"""The benchmarks of low precision with tiny models: rows, gates and the judge."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import postgen
from benchmarks import lowp_judge, lowp_linears, lowp_steps
from benchmarks.lowp_linears import SHAPES, TINY, gates, layer_row, lora_on_fp8
from benchmarks.lowp_steps import CASES, best, step_row, tiny
from tests.families.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without inductor, whose C++ code takes half a minute to build and is not tested here."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_block(self, **options, backend="eager")
    )
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiled(function, **options) if options else function
    )


def test_layers() -> None:
    row = layer_row(TINY[0], "cpu", repeats=1)
    assert all(row[f"{name}_ms"] > 0 for name in ("bf16", "product", "eager", "compiled", "kernel", "quantise"))
    assert 0.03 < row["error"] < 0.04


def test_steps() -> None:
    """All forms have times and differences; a plug-in without effect replaces FP8 attention."""
    row = step_row(tiny(), "cpu", 1, lambda model: Nothing())
    assert all(row[f"{form}{suffix}_ms"] > 0 for form in lowp_steps.forms_of(Nothing) for suffix in ("", "_compiled"))
    assert row["stock_difference"] == 0
    assert 0 < row["exact_difference"] < row["fp8_linears_difference"] < 0.1
    assert row["fp8_attention_difference"] == row["exact_difference"]
    assert row["fp8_both_difference"] == row["fp8_linears_difference"]


def test_forms_in_eight_bits_of_a_long_step_are_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowp_steps, "LONG", 0.0)
    monkeypatch.setattr(lowp_steps, "VERY_LONG", 0.0)
    kept: list[dict[str, float]] = []
    before = {"exact_ms": 7.0, "exact_difference": 0.001, "fp8_linears_compiled_ms": 9.0}
    attention = lowp_steps.fp8_attention(simulate=True)
    row = step_row(tiny(), "cpu", 3, attention, before=before, keep=lambda row: kept.append(dict(row)))
    assert (row["exact_ms"], row["fp8_linears_compiled_ms"]) == (7.0, 9.0)  # an earlier call timed them
    timed = ["stock_compiled_ms", "exact_compiled_ms", "fp8_attention_compiled_ms", "fp8_both_compiled_ms"]
    assert [[*each][-1] for each in kept] == timed
    assert {"stock_ms", "exact_ms", "fp8_both_compiled_ms"} <= row.keys()
    assert not {"fp8_linears_ms", "fp8_attention_ms", "fp8_both_ms"} & row.keys()
    assert row["exact_difference"] < row["fp8_attention_compiled_difference"] < 0.1


class Nothing:
    """A handle of a plug-in without effect."""

    def remove(self) -> None:
        """Do nothing."""


def test_the_shapes_are_those_of_the_models() -> None:
    assert {shape.model for shape in SHAPES} == {case.name for case in CASES}
    with torch.device("meta"):
        tokens = [case.arguments()["hidden_states"] for case in CASES]
    wans = [int(x.shape[2] * x.shape[3] * x.shape[4] // 4) for x in tokens[:4]]
    assert wans == [32760, 32760, 75600, 118800]
    assert [shape.tokens for shape in SHAPES[::4]] == [32760, 32760, 75600, 118800 + 256, 17550 + 226]


def test_gates() -> None:
    times = {"exact_ms": 12.0, "exact_compiled_ms": 13.0, "stock_compiled_ms": 14.0, "fp8_both_compiled_ms": 10.0}
    assert (best(times, "exact"), best(times, "fp8_both")) == (12, 10)
    told = {
        "fp8_both_vs_stock": 1.6,
        "fp8_both_vs_exact": 1.2,
        "fp8_linears_vs_exact": 1.1,
        "fp8_attention_vs_exact": 1,
    }
    rows: list[dict[str, Any]] = [{"model": f"Wan 14B {size} 81f", **told} for size in ("480p", "720p")]
    found = {each["name"]: (each["value"], each["ok"]) for each in lowp_steps.gates(rows)}
    assert found.pop("slowest_step_vs_exact") == (1, True)
    assert found == {"step_14b_480p_vs_stock": (1.6, True), "step_14b_720p_vs_exact": (1.2, False)}
    assert not any(each["ok"] for each in lowp_steps.gates([]))
    assert [each["ok"] for each in gates([{"error": 0.0375}], 1)] == [True] * 2
    assert [each["ok"] for each in gates([], 0)] == [False] * 2


def test_lora_is_looked_at() -> None:
    assert lora_on_fp8("cpu", tiny_model("Wan").transformer) == 1


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lowp_linears.main([]) == 2
    assert "needs a GPU with FP8: cpu has no FP8 matrix product" in capsys.readouterr().err
    assert lowp_steps.main([]) == 2
    assert lowp_steps.main(["--only", "Nobody"]) == 2
    assert "no model begins with Nobody" in capsys.readouterr().err


def test_the_judge_compares_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode without effect has no drop and equal clips; a mode that adds noise has a lower PSNR."""
    specs = lowp_judge.scenes(2, 5)

    def clips_of(pipe: Any, mode: Any, part: Any, first: int, how: Any, label: str) -> torch.Tensor:
        clips = torch.rand(len(part), 5, 3, 32, 32, generator=torch.Generator().manual_seed(first))
        with mode(pipe) as change:
            return clips if change is None else (clips + change).clamp(0, 1)

    monkeypatch.setattr(lowp_judge, "clips_of", clips_of)
    modes = {"exact": lambda _: nullcontext(), "same": lambda _: nullcontext(), "noisy": lambda _: nullcontext(0.1)}
    how: Any = None
    *_, numbers = lowp_judge.measure(None, specs, how, modes, 0)
    exact, same, noisy = lowp_judge.rows_of(numbers)
    assert (exact["mode"], same["drop"], same["psnr"]) == ("exact", {"value": 0, "low": 0, "high": 0}, 100)
    assert 19 < noisy["psnr"] < 24
    assert noisy["lowest_psnr"] <= noisy["psnr"]
    (gate,) = lowp_judge.gates([exact, {**same, "drop": {"high": 0.02}}])
    assert (gate["name"], gate["value"], gate["ok"]) == ("judge_drop", 0.02, False)
    assert lowp_judge.gates([exact])[0]["value"] is None


def test_modes_are_put_on_and_taken_off() -> None:
    model = tiny_model("Wan").transformer
    with lowp_judge.MODES["fp8_linears"](model):
        assert "fp8_linears" in postgen.summary(model).transformers[0].plug_ins
    assert not postgen.summary(model).transformers[0].plug_ins
