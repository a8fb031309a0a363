"""The benchmark of FP8 attention: a tiny run, its gates, and the arguments that it refuses."""

from __future__ import annotations

import ast
import sys
from typing import Any

import pytest
import torch

from benchmarks import lowp_attention as benchmark
from benchmarks.lowp_attention import error_of, gates, main
from benchmarks.lowp_inputs import KINDS, drawn


def test_the_tiny_run_measures_everything_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "write_result", lambda *_: pytest.fail("a result was written"))
    assert main(["--tiny", "--only", "tiny 128"]) == 0
    row = ast.literal_eval(capsys.readouterr().out)
    assert row["shape"] == "tiny 128"
    assert {"default", "cudnn_fp8"} <= row["ms"].keys()
    assert row["rounding_ms"] > 0
    for kind in KINDS:
        assert 0.01 < row["errors"][kind]["cudnn_fp8"]["error"] < 0.1
        assert row["errors"][kind]["default"]["error"] < 0.005
        assert len(row["fp8_errors_by_preparation"][kind]) == len(benchmark.CANDIDATES)


def row_of(shape: str, **changes: Any) -> dict[str, Any]:
    errors = {"normal": 0.058, "hard": 0.08, "clustered": 0.03}
    row: dict[str, Any] = {"shape": shape, "fp8_vs": {"fa4": 1.2, "cudnn": 1.5}}
    row["errors"] = {kind: {"cudnn_fp8": {"error": error, "worst_head": 2 * error}} for kind, error in errors.items()}
    return {**row, **changes}


def test_gates() -> None:
    rows = [row_of("Wan 14B 720p 81f"), row_of("LTX", fp8_vs={"fa4": 0.9, "cudnn": 1.0})]
    assert all(each["ok"] for each in gates(rows))
    assert {each["name"] for each in gates(rows)} == {
        "fp8_vs_fa4",
        "fp8_vs_cudnn_bf16",
        "fp8_error",
        "fp8_error_hard",
    }
    rows[1]["errors"]["hard"]["cudnn_fp8"]["error"] = 0.09
    rows[0]["fp8_vs"] = {"cudnn": 1.39}
    missed = [each["name"] for each in gates(rows) if not each["ok"]]
    assert missed == ["fp8_vs_fa4", "fp8_vs_cudnn_bf16", "fp8_error_hard"]


def test_errors() -> None:
    expected = torch.ones(1, 3, 2, 4, dtype=torch.float64)
    out = expected.clone()
    out[:, :, 1] += 0.1
    found = error_of(out, expected)
    assert found["worst_head"] == pytest.approx(0.1)
    assert found["error"] == pytest.approx(0.1 / 2**0.5)


def test_inputs() -> None:
    key = drawn("hard", 500, 1, 64, dtype=torch.float32)[1][0, :, 0]
    assert (key.std(0) > 6).sum() == 4
    assert key.mean(0).square().mean() > 8
    assert torch.equal(drawn("clustered", 9, 1, 8)[0], drawn("clustered", 9, 1, 8)[0])
    with pytest.raises(ValueError, match="unknown kind 'easy'"):
        drawn("easy", 1, 1, 16)


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--only", "nothing"]) == 2
    if not torch.cuda.is_available():
        assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1 + (not torch.cuda.is_available())


def test_flash_attention_4_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", sys.modules[__name__])
    assert main(["--tiny", "--without-fa4", "--only", "nothing"]) == 2
    with pytest.raises(ModuleNotFoundError):
        import flash_attn  # noqa: F401
