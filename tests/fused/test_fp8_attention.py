"""Simulated FP8 attention on tiny models: steps, layers, other plug-ins, calibration, refusals."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen
from benchmarks.lowp_inputs import drawn
from postgen.families.installed import installed
from postgen.fused.fp8_attention import (
    FP8AttentionConfig,
    FP8AttentionReport,
    apply_fp8_attention,
    calibrate_fp8_attention,
    fp8_attention_for_call,
    register_fp8_attention_backend,
    remove_fp8_attention,
)
from postgen.fused.fp8_attention.apply import backend_attention
from postgen.fused.fp8_attention.calibrate import Measurements
from postgen.fused.fp8_attention.config import USUAL, fp8_attention_setting
from postgen.fused.fp8_attention.report import ReportRow
from postgen.kernels.attention import naive as exact
from postgen.kernels.attention_fp8 import graphs
from postgen.kernels.attention_fp8.ops import attention_fp8
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import TinyModel, tiny_model
from tests.fused.counted import count_operations
from tests.kernels.launches import relative_error

ALWAYS = FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)


@pytest.fixture(scope="module")
def shared() -> TinyModel:
    return tiny_model("Wan", layers=3)


@pytest.fixture
def wan(shared: TinyModel) -> Iterator[TinyModel]:
    yield shared
    if "fp8_attention" in installed(shared.transformer).plug_ins:
        remove_fp8_attention(shared.transformer)


def calls(tiny: Any) -> int:
    with count_operations() as run:
        tiny()
    return run.counts["attention_fp8"]


@pytest.fixture(scope="module")
def pipe(tiny_wan: Path) -> Any:
    from diffusers import WanPipeline

    made = WanPipeline.from_pretrained(tiny_wan)
    made.set_progress_bar_config(disable=True)
    return made


SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9}


def make(pipe: Any, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found: torch.Tensor = pipe(
        "a ball", **SIZE, num_inference_steps=steps, generator=generator, output_type="latent"
    ).frames
    return found


def test_the_usual_preparation_is_that_of_the_kernel() -> None:
    assert str(Preparation()) == USUAL


def test_switched_changed_and_removed(wan: TinyModel) -> None:
    stock = wan()
    handle = apply_fp8_attention(wan.transformer, ALWAYS)
    assert calls(wan) == 3
    error = relative_error(wan(), stock)
    assert 0 < error < 0.05
    handle.update(exact_layers=(r"blocks\.[01]\.attn1",))
    assert calls(wan) == 1
    assert relative_error(wan(), stock) < error
    assert "fp8_attention: on, simulated in 1 of 3 layers" in str(postgen.summary(wan.transformer))
    handle.disable()
    assert torch.equal(wan(), stock)
    handle.enable()
    with fp8_attention_for_call(wan.transformer, False):
        assert torch.equal(wan(), stock)
    copied = TinyModel(**{**vars(wan), "transformer": pickle.loads(pickle.dumps(copy.deepcopy(wan.transformer)))})
    assert calls(copied) == 1
    handle.remove()
    assert torch.equal(wan(), stock)
    assert calls(copied) == 1


def test_preparations_by_layer(wan: TinyModel) -> None:
    handle = apply_fp8_attention(wan.transformer, ALWAYS)
    usual = wan()
    handle.update(preparation={r"blocks\.1\.attn1": "plain"})
    other = wan()
    assert not torch.equal(usual, other)
    handle.update(preparation={r"blocks\.\d\.attn1": USUAL})
    assert torch.equal(wan(), usual)
    assert handle.stats() == {"": {"fp8": 3, "exact": 0, "not_finite": handle.stats()[""]["not_finite"]}}


@pytest.mark.parametrize("name", ["CogVideoX 1.5", "HunyuanVideo", "LTX"])
def test_other_families(name: str) -> None:
    tiny = tiny_model(name)
    stock = tiny()
    apply_fp8_attention(tiny.transformer, ALWAYS)
    TOLD.clear()
    masked = name == "HunyuanVideo"
    if masked:
        # diffusers passes the mask of the text to attention.
        with pytest.warns(UserWarning, match="stays exact, not FP8: the call has a mask"):
            found = tiny()
        assert torch.equal(found, stock)
    else:
        assert calls(tiny) == tiny.attention_layers
        assert relative_error(tiny(), stock) < 0.1


@pytest.mark.parametrize("name", ["AnyFlow", "Cosmos", "Wan"])
def test_mixed_precision(name: str) -> None:
    """Under autocast, norms return queries and keys in float32, and values are in bfloat16."""
    tiny = tiny_model(name)
    with torch.autocast("cpu", torch.bfloat16):
        stock = tiny()
        apply_fp8_attention(tiny.transformer, ALWAYS)
        assert calls(tiny) == tiny.attention_layers
        found = tiny()
    assert found.dtype == stock.dtype
    assert 0 < relative_error(found.float(), stock.float()) < 0.02


def test_under_fused_operations_and_enhance_a_video(wan: TinyModel) -> None:
    stock = wan()
    apply_fp8_attention(wan.transformer, ALWAYS)
    alone = wan()
    fused = postgen.apply_fused_ops(wan.transformer)
    assert calls(wan) == 3
    assert relative_error(wan(), alone) < 0.02
    enhance = postgen.apply_enhance_a_video(wan.transformer, postgen.EnhanceAVideoConfig(relative_weight=0.4))
    assert calls(wan) == 3
    assert min(gain for gains in enhance.stats().values() for gain in gains) > 1
    for handle in (enhance, fused):
        handle.remove()
    assert torch.equal(wan(), alone)
    assert not torch.equal(alone, stock)


def test_text_masks_are_key_lengths_under_fused_operations() -> None:
    tiny = tiny_model("HunyuanVideo", batch=2)
    stock = tiny()
    postgen.apply_fused_ops(tiny.transformer)
    apply_fp8_attention(tiny.transformer, ALWAYS)
    assert calls(tiny) > 0
    assert relative_error(tiny(), stock) < 0.1


def test_compiled_blocks(wan: TinyModel) -> None:
    stock = wan()
    apply_fp8_attention(wan.transformer, ALWAYS)
    eager = wan()
    torch.compiler.reset()
    twin = TinyModel(**{**vars(wan), "transformer": copy.deepcopy(wan.transformer)})
    for block in twin.transformer.blocks:  # type: ignore[union-attr]
        block.compile(fullgraph=True, backend="aot_eager")
    # Differences in the last bits of float32 can move values to the next 8-bit code.
    assert relative_error(twin(), eager) < 0.01
    assert relative_error(twin(), stock) > 2 * relative_error(twin(), eager)


def test_gradients_are_those_of_the_stock_model(wan: TinyModel) -> None:
    apply_fp8_attention(wan.transformer, ALWAYS)
    TOLD.clear()
    with pytest.warns(UserWarning, match="no gradient: exact attention runs"):
        wan.transformer(**wan.arguments).sample.sum().backward()
    wan.transformer.zero_grad()


def test_steps_of_a_pipeline(pipe: Any) -> None:
    stock = make(pipe, 5)
    handle = apply_fp8_attention(pipe, FP8AttentionConfig(simulate=True))
    try:
        with count_operations() as run:
            found = make(pipe, 5)
        layers = handle.stats()["transformer"]["fp8"]
        # Two of five steps are FP8, each with two calls because of guidance.
        assert run.counts["attention_fp8"] == 2 * 2 * layers
        assert not torch.equal(found, stock)
        TOLD.clear()
        with pytest.warns(UserWarning, match="all of the 3 steps stay exact: use at least 4 steps"):
            make(pipe, 3)
        assert "note: all of the 3 steps stay exact" in str(postgen.summary(pipe))
    finally:
        handle.remove()
    assert torch.equal(make(pipe, 5), stock)


def test_without_a_pipeline_no_step_is_known(wan: TinyModel) -> None:
    apply_fp8_attention(wan.transformer, FP8AttentionConfig(simulate=True))
    TOLD.clear()
    with pytest.warns(UserWarning, match="the denoising step is unknown outside a pipeline call"):
        assert calls(wan) == 3


def test_debug_computes_again_what_is_not_finite(wan: TinyModel) -> None:
    stock = wan()
    handle = apply_fp8_attention(wan.transformer, ALWAYS)
    handle.update(debug=True)
    before = handle.stats()[""]["not_finite"]
    found = wan()
    assert handle.stats()[""]["not_finite"] == before
    assert not torch.equal(found, stock)
    weights = wan.transformer.blocks[0].attn1.norm_k.weight.data  # type: ignore[union-attr,index]
    kept = weights.clone()
    weights.fill_(1e30)  # squares overflow in float32, but logits are finite
    try:
        TOLD.clear()
        with pytest.warns(UserWarning, match="NaN or infinity"):
            again = wan()
        assert handle.stats()[""]["not_finite"] > before
        assert again.isfinite().all()
    finally:
        weights.copy_(kept)


def test_calibration(pipe: Any, tmp_path: Path) -> None:
    stock = make(pipe, 2)
    report = calibrate_fp8_attention(pipe, ["a ball", "a cube"], steps=2, call=SIZE)
    names = [f"blocks.{i}.attn1" for i in range(len(pipe.transformer.blocks))]
    assert [(row.layer, row.step) for row in report.rows] == [(name, step) for name in names for step in (0, 1)]
    assert all(0.001 < row.error < 0.1 and row.worst_head >= row.error * 0.7 for row in report.rows)
    assert all(Preparation.parsed(row.preparation) for row in report.rows)
    assert all(row.exact_ms is None for row in report.rows) != torch.cuda.is_available()
    assert torch.equal(make(pipe, 2), stock)  # calibration leaves the pipeline unchanged
    assert calibrate_fp8_attention(pipe, ["a ball", "a cube"], steps=2, call=SIZE) == report

    report.save(tmp_path / "report.json")
    assert FP8AttentionReport.load(tmp_path / "report.json") == report
    assert report.exact_layers == ()
    text = report.table()
    assert "blocks.1.attn1" in text
    assert text.count("\n") == len(report.rows)

    # With a threshold between the errors of the layers, one layer stays exact.
    worst = {name: max(row.error for row in report.rows if row.layer == name) for name in names}
    limit = sum(sorted(worst.values())[-2:]) / 2
    strict = calibrate_fp8_attention(pipe, ["a ball", "a cube"], steps=2, call=SIZE, max_error=limit)
    assert strict.exact_layers == (max(worst, key=worst.__getitem__),)
    with fp8_attention_for_call(pipe, strict.config(first_exact_steps=0, last_exact_steps=0, simulate=True)):
        assert f"simulated in {len(names) - 1} of {len(names)} layers" in str(postgen.summary(pipe))
        found = make(pipe, 2)
    assert 0 < relative_error(found, stock) < 0.1


def test_the_error_that_calibration_tells_is_that_of_the_layer() -> None:
    found = Measurements(CANDIDATES)
    calls = [(layer, drawn(kind, 200, 2, 64)) for layer, kind in (("a", "hard"), ("a", "normal"), ("b", "normal"))]
    for layer, tensors in calls:
        found.take(layer, 3, *tensors, 0.1, None)
    report = found.report(max_error=0.1, slack=1.1, steps=4)
    assert [(row.layer, row.step) for row in report.rows] == [("a", 3), ("b", 3)]
    for row in report.rows:
        preparation = Preparation.parsed(row.preparation)
        errors = []
        for _, tensors in (call for call in calls if call[0] == row.layer):
            out = attention_fp8(*tensors, scale=0.1, preparation=preparation, simulate=True)
            errors.append(relative_error(out, exact.attention(*(x.double() for x in tensors), scale=0.1)[0]))
        assert row.error == pytest.approx(max(errors), rel=0.05)
        assert row.worst_head >= row.error
    # With outlier channels in the keys, calibration chooses more transformations.
    assert "balance+rotation" in report.rows[0].preparation
    assert CANDIDATES.index(Preparation.parsed(report.rows[1].preparation)) < 4
    assert report.config().of_layer("a") == report.rows[0].preparation


ROW = ReportRow(layer="blocks.0.attn1", step=0, error=0.01, worst_head=0.02, preparation=USUAL)


def test_a_layer_that_gains_no_time_stays_exact() -> None:
    rows = (replace(ROW, exact_ms=1.0, fp8_ms=1.0), replace(ROW, layer="b", exact_ms=1.0, fp8_ms=0.9))
    report = FP8AttentionReport(rows=(*rows, replace(ROW, layer="c", fp8_ms=9.0)), max_error=0.1, steps=1)
    assert report.exact_layers == (ROW.layer,)
    assert report.config().of_layer(ROW.layer) is None
    assert report.config().of_layer("b") == USUAL


def test_reports_keep_what_is_not_a_number(tmp_path: Path) -> None:
    rows = (ROW, ReportRow(layer="b", step=0, error=math.nan, worst_head=math.inf, preparation="plain", fp8_ms=1.5))
    report = FP8AttentionReport(rows=rows, max_error=0.1, steps=1)
    assert report.exact_layers == ("b",)
    report.save(tmp_path / "a.json")
    assert str(FP8AttentionReport.load(tmp_path / "a.json")) == str(report)
    assert "nan" in report.table()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a report"),
        ("[]", "is not a report"),
        ('{"rows": [{}], "max_error": 1, "steps": 1}', "is not a report"),
        (None, "cannot be read"),
        ('{"rows": [{"preparation": "x"}], "max_error": 1, "steps": 1}', "is not a report"),
    ],
)
def test_reports_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(postgen.UserError, match=message):
        fp8_attention_setting(str(tmp_path / "r.json"))


def test_a_report_with_an_unknown_preparation(tmp_path: Path) -> None:
    FP8AttentionReport(rows=(ROW,), max_error=0.1, steps=1).save(tmp_path / "r.json")
    note = json.loads((tmp_path / "r.json").read_text())
    note["rows"][0]["preparation"] = "turned"
    (tmp_path / "r.json").write_text(json.dumps(note))
    with pytest.raises(postgen.UserError, match="unknown preparation 'turned'"):
        FP8AttentionReport.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_exact_steps": -1}, "first_exact_steps must be a whole number"),
        ({"last_exact_steps": True}, "last_exact_steps must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be a whole number"),
        ({"simulate": 1}, "simulate must be True or False"),
        ({"exact_layers": "blocks"}, "exact_layers must be a tuple or list"),
        ({"exact_layers": ("(",)}, "is not a regular expression"),
        ({"preparation": "turn"}, "unknown preparation 'turn'"),
        ({"preparation": {"a": "turn"}}, "unknown preparation 'turn'"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(postgen.UserError, match=message):
        FP8AttentionConfig(**settings)


def test_what_is_refused(wan: TinyModel, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(postgen.UserError, match="no layer matches the pattern 'nothing'"):
        apply_fp8_attention(wan.transformer, FP8AttentionConfig(exact_layers=("nothing",), simulate=True))
    if not torch.cuda.is_available():
        for refused in (
            lambda: apply_fp8_attention(wan.transformer),
            lambda: fp8_attention_setting("auto"),
            register_fp8_attention_backend,
        ):
            with pytest.raises(postgen.UserError, match="FP8 attention needs an NVIDIA GPU"):
                refused()
    monkeypatch.setattr(graphs, "refusal", lambda device, channels: f"takes heads of 16, not of {channels}")
    with pytest.raises(postgen.UserError, match=r"takes heads of 16, not of \d+\. Leave it off"):
        apply_fp8_attention(wan.transformer)
    with pytest.raises(postgen.UserError, match="pass the pipeline, not its transformer"):
        calibrate_fp8_attention(wan.transformer, ["a ball"])
    for wrong, message in (
        ({"prompts": []}, "prompts must be"),
        ({"steps": 0}, "steps must be"),
        ({"max_error": 0}, "max_error must be"),
        ({"slack": 0.5}, "slack must be"),
        ({"candidates": ["plain"]}, "candidates must be"),
    ):
        with pytest.raises(postgen.UserError, match=message):
            calibrate_fp8_attention(pipe, **{"prompts": ["a ball"], **wrong})  # type: ignore[arg-type]
    assert not installed(wan.transformer).plug_ins


def test_the_backend_of_diffusers_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 9, 2, 16)
    assert backend_attention(query, query[:, :5], query[:, :5], None, None) is None
    assert backend_attention(query, query, query, torch.ones(1, 9, dtype=torch.bool), None) is None
    assert backend_attention(query, query[:, :, :1], query[:, :, :1], None, None) is None
    monkeypatch.setattr(graphs, "refusal", lambda device, channels: None)
    assert register_fp8_attention_backend() == "cudnn_fp8"
