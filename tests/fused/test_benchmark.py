"""The benchmark of fused steps: all compared forms compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.fused_step import CASES, FORMS, Case, fused_psnr, gates, measure, milliseconds


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without inductor, whose C++ code takes half a minute to build and is not tested here."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_block(self, **options, backend="aot_eager")
    )


def tiny(case: Case) -> Case:
    """Return the case with few and narrow layers and a small clip."""
    axis = {"WanTransformer3DModel": 2, "CogVideoXTransformer3DModel": 1}[case.kind]
    config = {**case.config, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "text_dim": 8}
    if "ffn_dim" in config:
        config["ffn_dim"] = 16
    else:
        del config["text_dim"]
        config |= {"text_embed_dim": 8, "sample_width": 4, "sample_height": 4}

    def arguments() -> dict[str, Any]:
        full = case.arguments()
        full["hidden_states"] = full["hidden_states"][..., :4, :4].narrow(axis, 0, 2)
        full["encoder_hidden_states"] = full["encoder_hidden_states"][..., :8]
        if "image_rotary_emb" in full:
            full["image_rotary_emb"] = tuple(table[:8, :16] for table in full["image_rotary_emb"])
        return full

    return replace(case, config=config, arguments=arguments)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.kind)
def test_every_form_computes_the_same(case: Case) -> None:
    rows = measure(tiny(case), device="cpu", repeats=1)
    assert [row["part"] for row in rows] == ["block", "step"]
    for row in rows:
        assert all(row[f"{form}_ms"] > 0 for form in FORMS)
        # Fused operations round to bfloat16 at other places.
        assert 0 < row["fused_difference"] < 0.02
        assert row["fused_compiled_difference"] < 0.02
        assert row["fused_vs_stock"] == row["stock_ms"] / row["fused_ms"]


def test_the_shapes_are_those_of_the_models() -> None:
    with torch.device("meta"):
        wan, _, cogvideox = (case.arguments()["hidden_states"].shape for case in CASES)
    assert (wan[2] * wan[3] // 2 * wan[4] // 2, cogvideox[1] * cogvideox[3] // 2 * cogvideox[4] // 2) == (32760, 17550)


def test_gates() -> None:
    row = {"model": "Wan 1.3B 480p 81f", "part": "step", "stock_ms": 12.0, "compiled_ms": 11.0}
    rows: list[dict[str, Any]] = [{**row, "fused_ms": 11.5, "fused_compiled_ms": 10.0}]
    found = {each["name"]: (each["value"], each["ok"]) for each in gates(rows, {"cpu": 90.0, "cuda": 45.0})}
    assert found == {"step_vs_stock": (1.2, True), "step_vs_compiled": (1.1, True), "fused_psnr": (45.0, False)}
    assert [each["ok"] for each in gates([], {"cpu": 90.0})] == [False, False, True]


def test_the_median_leaves_out_the_first_calls() -> None:
    calls: list[int] = []
    assert milliseconds(lambda: calls.append(1), "cpu", repeats=3) >= 0
    assert len(calls) == 5


def test_fused_psnr() -> None:
    assert fused_psnr("cpu", steps=2, height=48, width=48, num_frames=5) >= 50
