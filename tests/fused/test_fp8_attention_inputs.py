"""FP8 attention: checks of its inputs, and correct summaries and statistics."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen
from postgen.families.installed import installed
from postgen.fused.fp8_attention import (
    FP8AttentionConfig,
    FP8AttentionReport,
    apply_fp8_attention,
    calibrate_fp8_attention,
    fp8_attention_for_call,
)
from postgen.fused.fp8_attention.config import USUAL
from postgen.fused.fp8_attention.report import ReportRow
from postgen.fused.fp8_attention.state import _MOST_PLANS, FP8Attention
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import TinyModel, tiny_model
from tests.pipelines import more  # noqa: F401  it enters its builders
from tests.pipelines.parts import TINY
from tests.pipelines.wan_like import wan_image

ALWAYS = FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def pipe(tiny_wan: Path) -> Any:
    from diffusers import WanPipeline

    made = WanPipeline.from_pretrained(tiny_wan)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preparation": Preparation()}, "preparation must be a text, or a mapping .* to texts, got Prep"),
        ({"preparation": None}, "preparation must be a text"),
        ({"preparation": {".*": Preparation()}}, "a preparation must be a text such as .*, got Prep"),
        ({"preparation": {3: "plain"}}, "3 is not a regular expression for layer names: a text is needed"),
        ({"preparation": {b"x": "plain"}}, "b'x' is not a regular expression for layer names"),
        ({"preparation": "x" * 10**5}, r"unknown preparation 'x{30,40}\.\.\.x+'\. \(100003 characters\) Known: plain"),
        ({"exact_layers": ("a{" + "9" * 30 + "}",)}, "the repetition number is too large"),
        ({"exact_layers": ("(" * 5000 + ")" * 5000,)}, "is not a regular expression .*: maximum recursion depth"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(postgen.UserError, match=message):
        FP8AttentionConfig(**settings)


def test_settings_are_their_own() -> None:
    layers, named = ["a"], {"b": "plain"}
    config = FP8AttentionConfig(exact_layers=layers, preparation=named)  # type: ignore[arg-type]
    layers.append("(")
    named["("] = "no"
    assert (config.exact_layers, config.preparation) == (("a",), {"b": "plain"})
    assert FP8AttentionConfig(preparation={}).of_layer("any") == USUAL


ROW = ReportRow(layer="blocks.0.attn1", step=0, error=0.01, worst_head=0.02, preparation=USUAL)
GOOD = asdict(FP8AttentionReport(rows=(ROW,), max_error=0.1, steps=1))
WRONG_ROWS = [
    {"step": float("inf")},
    {"step": 1.5},
    {"step": -1},
    {"error": -0.1},
    {"error": True},
    {"error": "0.1"},
    {"error": 10**400},
    {"worst_head": None},
    {"layer": None},
    {"layer": ""},
    {"preparation": 3},
    {"preparation": "x" * 10**5},
    {"fp8_ms": -1},
    {"more": 1},
]
WRONG_REPORTS = [
    *({"rows": rows} for rows in ([], {}, None, "abc", [[]], [3])),
    *({"max_error": limit} for limit in (0, -1, float("nan"), float("inf"), "0.1", None)),
    *({"steps": steps} for steps in (0, float("inf"), 1.5, True, None)),
]


def damaged(folder: Path, text: str) -> str:
    (folder / "r.json").write_text(text)
    with pytest.raises(postgen.UserError, match="is not a report of FP8 attention") as told:
        FP8AttentionReport.load(folder / "r.json")
    return str(told.value)


def test_damaged_reports(tmp_path: Path) -> None:
    texts = ["", "3", "null", "[" * 10**5, json.dumps(GOOD)[:-9], '{"rows": ' + "9" * 5000 + "}"]
    texts += [json.dumps({**GOOD, **change}) for change in WRONG_REPORTS]
    texts += [json.dumps({**GOOD, "rows": [{**GOOD["rows"][0], **change}]}) for change in WRONG_ROWS]
    for text in texts:
        message = damaged(tmp_path, text)
        assert "\n" not in message
        assert len(message) < 500 + len(str(tmp_path))
    for text in ("{}", "[]", json.dumps({**GOOD, "rows": None})):
        assert "it must be a JSON object with a list of rows, and with max_error and steps)" in damaged(tmp_path, text)
    (tmp_path / "r.json").write_text("\ufeff" + json.dumps(GOOD))
    assert FP8AttentionReport.load(tmp_path / "r.json").rows == (ROW,)


def test_reports_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for place in (tmp_path, tmp_path / "pipe.json", "a\0.json", tmp_path / "none.json"):
        with pytest.raises(postgen.UserError, match="cannot be read"):
            FP8AttentionReport.load(place)
    with pytest.raises(postgen.UserError, match="3 is not a report of FP8 attention: pass the path of a file"):
        FP8AttentionReport.load(3)  # type: ignore[arg-type]


def test_reports_that_cannot_be_written(tmp_path: Path) -> None:
    report = FP8AttentionReport(rows=(ROW,), max_error=0.1, steps=1)
    for place in ("", tmp_path, str(tmp_path / "a\0"), tmp_path / ("x" * 300), 3, None):
        with pytest.raises(postgen.UserError, match=r"cannot write|must be the path of the report file"):
            report.save(place)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(postgen.UserError, match=r"unknown settings simulated\. Known: first_exact_steps"):
        report.config(simulated=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompts": None}, r"prompts must be one or more texts, got \[None\]"),
        ({"prompts": [3]}, "prompts must be"),
        ({"steps": 2**40}, "steps must be a whole number from 1 to 1,000"),
        ({"seed": "x"}, "seed must be a whole number from 0"),
        ({"seed": 2**70}, "seed must be a whole number from 0"),
        ({"call": "x"}, "call must be a dict of arguments of the pipeline by name, got 'x'"),
        ({"call": {3: 3}}, "call must be a dict"),
        ({"call": {"prompt": "x"}}, "call must not contain prompt: use the argument prompts of calib"),
        ({"call": {"num_inference_steps": 9}}, "call must not contain num_inference_steps: use the argument steps"),
        ({"call": {"generator": None}}, "call must not contain generator: use the argument seed"),
        ({"call": {"fp8_attention": True}}, "call must not contain fp8_attention: calibration runs .* exact"),
        ({"call": {"hight": 32}}, "WanPipeline has no argument 'hight': remove it from call. Did you mean 'height'"),
    ],
)
def test_calibration_looks_at_its_arguments(pipe: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(postgen.UserError, match=message):
        calibrate_fp8_attention(pipe, **{"prompts": ["a ball"], **words})  # type: ignore[arg-type]
    assert not installed(pipe.transformer).plug_ins


def test_calibration_takes_what_can_be_read_once(pipe: Any) -> None:
    prompts, candidates = (text for text in ("a ball",)), (each for each in CANDIDATES[:2])
    report = calibrate_fp8_attention(pipe, prompts, steps=1, call=SIZE, candidates=candidates)  # type: ignore[arg-type]
    assert {row.preparation for row in report.rows} <= {str(each) for each in CANDIDATES[:2]}


def test_calibration_of_a_pipeline_whose_first_argument_is_an_image() -> None:
    from diffusers import WanImageToVideoPipeline

    components, call = wan_image()
    made = WanImageToVideoPipeline(**components)
    made.set_progress_bar_config(disable=True)
    given = {name: value for name, value in call.items() if name not in ("prompt", "num_inference_steps")}
    report = calibrate_fp8_attention(made, ["a ball"], steps=1, call=given)
    assert [row.layer for row in report.rows] == ["blocks.0.attn1", "blocks.1.attn1"]


def test_calibration_of_a_pipeline_that_counts_its_steps_otherwise() -> None:
    from diffusers import HeliosPyramidPipeline

    components, call = TINY["HeliosPyramidPipeline"]()
    made = HeliosPyramidPipeline(**components)
    made.set_progress_bar_config(disable=True)
    report = calibrate_fp8_attention(made, [call.pop("prompt")], call=call)
    assert report.steps == 1 + max(row.step for row in report.rows) == 1


def test_calibration_of_compiled_blocks(pipe: Any) -> None:
    expected = calibrate_fp8_attention(pipe, "a ball", steps=2, call=SIZE)
    other = copy.deepcopy(pipe)
    other.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert calibrate_fp8_attention(other, "a ball", steps=2, call=SIZE) == expected


def test_calibration_of_a_pipeline_that_passes_the_timestep_by_place() -> None:
    from diffusers import EasyAnimatePipeline

    components, call = TINY["EasyAnimatePipeline"]()
    made = EasyAnimatePipeline(**components)
    made.set_progress_bar_config(disable=True)
    prompt, steps = call.pop("prompt", "a ball"), call.pop("num_inference_steps")
    with pytest.raises(postgen.UserError, match="call must not contain prompt_embeds: use the argument prompts"):
        calibrate_fp8_attention(made, prompt or "a ball", steps=steps, call=call)
    names = "prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask"
    encoded = tuple(call.pop(name) for name in names)
    made.encode_prompt = lambda *_, **__: encoded  # the tiny pipeline has no text encoder
    report = calibrate_fp8_attention(made, "a ball", steps=steps, call=call)
    assert sorted({row.step for row in report.rows}) == list(range(steps))


def test_calibration_where_all_calls_have_a_mask() -> None:
    from diffusers import HunyuanVideoPipeline

    components, call = TINY["HunyuanVideoPipeline"]()
    made = HunyuanVideoPipeline(**components)
    made.set_progress_bar_config(disable=True)
    prompt, steps = call.pop("prompt"), call.pop("num_inference_steps")
    with pytest.raises(
        postgen.UserError, match=r"every self-attention call had a mask.*apply_fused_ops before, which turns"
    ):
        calibrate_fp8_attention(made, prompt, steps=steps, call=call)
    postgen.apply_fused_ops(made)
    assert len(calibrate_fp8_attention(made, prompt, steps=steps, call=call).rows) == 4 * steps


def stopped(pipe: Any, how: type[BaseException]) -> None:
    def stop(*_: Any) -> Any:
        raise how

    with pytest.raises(how):
        calibrate_fp8_attention(pipe, ["a ball"], steps=2, call={**SIZE, "callback_on_step_end": stop})


@pytest.mark.parametrize("how", [KeyboardInterrupt, ZeroDivisionError])
def test_calibration_that_is_stopped_leaves_nothing(pipe: Any, how: type[BaseException]) -> None:
    model = pipe.transformer
    processors = dict(model.attn_processors)
    stopped(pipe, how)
    assert not installed(model).plug_ins
    assert model.attn_processors == processors
    assert not [each for each in model.modules() if each._forward_pre_hooks or each._forward_hooks]


def test_the_summary_forgets_what_is_no_longer_so(pipe: Any) -> None:
    handle = apply_fp8_attention(pipe, FP8AttentionConfig(simulate=True))

    def make(steps: int) -> str:
        pipe("a ball", **SIZE, num_inference_steps=steps, output_type="latent")
        return str(postgen.summary(pipe))

    try:
        TOLD.clear()
        with pytest.warns(UserWarning, match="all of the 2 steps stay exact"):
            assert "note: all of the 2 steps stay exact" in make(2)
        handle.update(first_exact_steps=0, last_exact_steps=0)
        assert "note" not in str(postgen.summary(pipe))
        assert "note" not in make(2)
    finally:
        handle.remove()


def test_the_summary_says_which_calls_stay_exact() -> None:
    tiny = tiny_model("HunyuanVideo")
    handle = apply_fp8_attention(tiny.transformer, ALWAYS)
    TOLD.clear()
    with pytest.warns(UserWarning, match="stays exact, not FP8: the call has a mask"):
        tiny()
    text = "simulated in 4 of 4 layers, note: 4 layers stayed exact in the last call: the call has a mask"
    assert text in str(postgen.summary(tiny.transformer))
    postgen.apply_fused_ops(tiny.transformer)  # fused operations convert the mask to key lengths
    tiny()
    assert "note" not in str(postgen.summary(tiny.transformer)).split("fp8_attention", 1)[1].splitlines()[0]
    handle.remove()


def test_layers_that_are_converted_afterwards_count_as_exact() -> None:
    from postgen.lit import convert, revert

    tiny = tiny_model("Wan")
    handle = apply_fp8_attention(tiny.transformer, ALWAYS)
    convert(tiny.transformer)
    assert {name: handle.stats()[""][name] for name in ("fp8", "exact")} == {"fp8": 1, "exact": 1}
    assert "simulated in 1 of 2 layers" in str(postgen.summary(tiny.transformer))
    other = TinyModel(**{**vars(tiny), "transformer": copy.deepcopy(tiny.transformer)})
    other()
    assert "simulated in 1 of 2 layers" in str(postgen.summary(other.transformer))
    revert(tiny.transformer)
    assert "simulated in 2 of 2 layers" in str(postgen.summary(tiny.transformer))
    handle.remove()


def test_plans_of_settings_that_are_gone_are_forgotten() -> None:
    """Plans of unused settings are dropped, and a repeated setting computes the same as before."""
    tiny = tiny_model("Wan")
    handle = apply_fp8_attention(tiny.transformer, ALWAYS)
    usual = tiny()
    plug_in: FP8Attention = installed(tiny.transformer).plug_ins["fp8_attention"]
    texts = [str(each) for each in CANDIDATES]
    first: dict[tuple[str, str], torch.Tensor] = {}
    for _ in range(2):
        for one in texts:
            for other in texts:
                names = {"blocks.0.attn1": one, "blocks.1.attn1": other}
                config = FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True, preparation=names)
                with fp8_attention_for_call(tiny.transformer, config):
                    found = tiny()
                assert torch.equal(first.setdefault((one, other), found), found)
                assert len(plug_in._plans) <= _MOST_PLANS
    assert {len(layer.choices) for layer in plug_in.layers.values()} == {_MOST_PLANS}
    assert len({tuple(each.flatten()[:8].tolist()) for each in first.values()}) > _MOST_PLANS
    assert torch.equal(tiny(), usual)
    handle.remove()


def test_settings_that_leave_no_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from postgen.lit import convert

    tiny = tiny_model("Wan")
    rows = tuple(
        ReportRow(layer=f"blocks.{index}.attn1", step=0, error=0.2, worst_head=0.3, preparation=USUAL)
        for index in range(2)
    )
    report = FP8AttentionReport(rows=rows, max_error=0.1, steps=1)
    message = (
        "no layer of this WanTransformer3DModel is left for FP8 attention: all 2 stay exact because of exact_layers{}"
    )
    with pytest.raises(postgen.UserError, match=message.format(r"\. Leave")):
        apply_fp8_attention(tiny.transformer, report.config(simulate=True))
    convert(tiny.transformer)
    with pytest.raises(postgen.UserError, match=message.format(" and lit")):
        apply_fp8_attention(tiny.transformer, report.config(simulate=True))
    assert "fp8_attention" not in installed(tiny.transformer).plug_ins
    # The GPU must support only the heads of layers in FP8.
    asked: list[object] = []
    monkeypatch.setattr("postgen.fused.fp8_attention.state.head_channels", asked.append)
    monkeypatch.setattr("postgen.fused.fp8_attention.state.check_available", lambda *_: None)
    apply_fp8_attention(tiny_model("Wan").transformer, FP8AttentionConfig(exact_layers=(r"blocks\.0\.attn1",)))
    assert len(asked) == 1
