"""Scores are errors of conversions, costs are counted FLOPs, and a plan is the best of all choices."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families.cost import forward_cost
from postgen.families.installed import installed, processor_stack
from postgen.lit import (
    AnchorOptions,
    CostTable,
    LitConfig,
    MhlaOptions,
    Plan,
    Scores,
    WindowOptions,
    convert,
    count,
    measure,
    plan,
    revert,
    score,
)
from tests.families.tiny_models import TinyModel, tiny_model

NARROW = LitConfig(window=WindowOptions(radius=0))
SIZE = {"num_frames": 13, "height": 32, "width": 48}
"""Size in pixels; the clip has 4 latent frames of 2 x 3 tokens."""


@pytest.fixture(scope="module")
def wan() -> TinyModel:
    return tiny_model("Wan", layers=3)


def test_a_score_is_the_error_of_a_conversion(wan: TinyModel) -> None:
    model = wan.transformer
    before, stock = {*installed(model).plug_ins}, wan()
    found = score(model, wan, kinds=("window_delta", "lit"), config=NARROW)
    assert found.calls == 1
    outputs: list[Any] = []
    attention = model.get_submodule("blocks.1.attn1")
    hook = attention.register_forward_hook(lambda *call: outputs.append(call[2]))
    wan()
    for kind in found.errors:
        convert(model, dataclasses.replace(NARROW, layers=f"1:{kind}"))
        wan()
        revert(model)
    hook.remove()
    soft = outputs[0].double()
    for kind, other in zip(found.errors, outputs[1:], strict=True):
        error = (other.double() - soft).abs().sum() / (soft - soft.mean(dim=1, keepdim=True)).abs().sum()
        assert found.errors[kind][1] == pytest.approx(float(error), rel=1e-6)
    assert min(map(min, found.errors.values())) > 0
    assert {*installed(model).plug_ins} == before
    assert not processor_stack(model).names
    assert torch.equal(wan(), stock)
    full = score(model, wan, kinds=("anchor",), config=LitConfig(anchor=AnchorOptions(every=1)))
    assert full.errors["anchor"] == (0.0, 0.0, 0.0)
    assert "window_delta" in str(found)


def test_text_among_the_rows_does_not_count() -> None:
    """A single-stream block of FLUX returns 5 text and 6 picture tokens; the score ignores the text."""
    flux = tiny_model("Flux")
    name = "single_transformer_blocks.1.attn"
    found = score(flux.transformer, flux, kinds=("lit",))
    outputs: list[Any] = []
    hook = flux.transformer.get_submodule(name).register_forward_hook(lambda *call: outputs.append(call[2]))
    flux()
    convert(flux.transformer, LitConfig(layers="3:lit"))
    flux()
    hook.remove()
    soft, made = (each.double()[:, 5:] for each in outputs)
    assert outputs[0].shape[1] == 11
    error = (made - soft).abs().sum() / (soft - soft.mean(dim=1, keepdim=True)).abs().sum()
    assert found.errors["lit"][3] == pytest.approx(float(error), rel=1e-6)


def test_trained_layers_are_scored(wan: TinyModel) -> None:
    student = tiny_model("Wan", layers=3)
    convert(student.transformer, dataclasses.replace(NARROW, layers="all:lit"))
    with torch.no_grad():
        for name, weight in student.transformer.named_parameters():
            if "postgen_lit" in name:
                weight.fill_(0.5)
    new = score(wan.transformer, wan, kinds=("lit",))
    trained = score(wan.transformer, wan, kinds=("lit",), students={"lit": student.transformer})
    assert trained.errors["lit"][0] == new.errors["lit"][0]
    assert all(a != b for a, b in zip(trained.errors["lit"][1:], new.errors["lit"][1:], strict=True))
    with pytest.raises(UserError, match="has layers of the types lit: pass a transformer converted to anchor"):
        score(wan.transformer, wan, kinds=("anchor",), students={"anchor": student.transformer})
    with pytest.raises(UserError, match="is converted"):
        score(student.transformer, student)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX 1.5", "Stable Diffusion 3"])
def test_counted_costs(name: str) -> None:
    """An anchor layer with all tokens exact costs as much as softmax; `lit` saves FLOPs only for many tokens."""
    tiny = tiny_model(name)
    size = SIZE if name != "Stable Diffusion 3" else {"num_frames": 1, "height": 32, "width": 48}
    config = LitConfig(anchor=AnchorOptions(every=1), mhla=MhlaOptions(blocks=(1, 1, 1)), grid=(1, 2, 3))
    costs = count(tiny.transformer, **size, kinds=("anchor", "lit", "mhla"), config=config)
    assert {*costs.changes["anchor"]} == {0}
    if name == "Wan":
        larger = {**size, "height": 256, "width": 256}
        large, whole = count(tiny.transformer, **larger, kinds=("lit",)), forward_cost(tiny.transformer, **larger)
        assert max(large.changes["lit"]) < 0 < min(costs.changes["lit"])  # with few tokens it costs more than softmax
        assert large.base == whole.flops
        assert large.attention == pytest.approx(whole.share("self-attention"))


def test_the_formula_counts_what_runs(wan: TinyModel) -> None:
    """For layers without convolutions and gates the formula equals the FLOPs that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    from postgen.lit.layers import make_layer
    from postgen.lit.options import ChunkOptions, LitOptions
    from tests.lit.calls import SHAPE, Call

    for kind, options, pairs in (
        ("lit", LitOptions(conv_space=0, conv_time=0), 0),
        ("anchor", AnchorOptions(every=2), 384 * 192),
        ("chunk", ChunkOptions(frames=2, overlap=0), 3 * 128**2),
    ):
        call, layer = Call(frames=6, rows=8, columns=8), make_layer(kind, SHAPE, options).double()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(call.tokens())
        softmax = 4 * pairs * SHAPE.heads * SHAPE.channels  # on a CPU torch's counter does not count softmax attention
        assert layer.flops(call.grid, 0) == counter.get_total_flops() + softmax


COSTS = CostTable(
    transformer="WanTransformer3DModel", model=1, device="cpu", unit="us", shape=(13, 32, 48), base=1000,
    attention=0.6, changes={"lit": (-180, -180, -180), "window_delta": (-100, -100, -100)},
)  # fmt: skip
SCORES = Scores(
    transformer="WanTransformer3DModel", errors={"lit": (0.1, 0.9, 0.2), "window_delta": (0.1, 0.3, 0.1)}, calls=1
)


def test_plans(tmp_path: Path) -> None:
    assert plan(SCORES, COSTS, 1).types == ("softmax",) * 3
    assert plan(SCORES, COSTS, 0.9).types == ("softmax", "softmax", "window_delta")
    chosen = plan(SCORES, COSTS, 0.75)
    assert chosen.types == ("softmax", "window_delta", "lit")
    assert chosen.share == 0.72
    assert chosen.ceiling == pytest.approx(1 / (1 - 0.6 * 2 / 3))
    assert plan(SCORES, COSTS, 0.75, first_block=True).types[0] == "lit"
    with pytest.raises(UserError, match=r"the smallest possible budget is 0\.6400"):
        plan(SCORES, COSTS, 0.5)
    assert plan(SCORES, COSTS, 0.64).share == 0.64  # the budget that the message names is accepted
    uneven = dataclasses.replace(COSTS, base=1003)
    with pytest.raises(UserError, match=r"the smallest possible budget is 0\.6411"):
        plan(SCORES, uneven, 0.5)
    assert plan(SCORES, uneven, 0.6411).types == ("softmax", "lit", "lit")  # .64108, rounded up
    even = dataclasses.replace(COSTS, base=100, changes={"lit": (0, -43, 0), "window_delta": (0, 0, 0)})
    assert plan(SCORES, even, 0.57).share == 0.57  # in floating point 100 * 0.57 is less than 57
    table = str(chosen)
    assert "a step costs 0.720 of softmax (budget 0.75), 1.39x; at most 1.67x" in table
    assert "    1  window_delta     0.3000             100" in table
    chosen.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == chosen
    COSTS.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == COSTS
    SCORES.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == SCORES
    for kind, name in ((Plan, "scores"), (CostTable, "plan"), (Scores, "costs")):
        with pytest.raises(UserError, match="holds no"):
            kind.load(tmp_path / f"{name}.json")  # type: ignore[attr-defined]


def test_a_plan_of_something_else_is_refused(wan: TinyModel) -> None:
    costs = count(wan.transformer, **SIZE, kinds=("window_delta", "lit"))
    chosen = plan(SCORES, costs, 1)
    assert chosen.config(wan.transformer, shape=(13, 32, 48), device="H100").layers == ("softmax",) * 3
    with pytest.raises(UserError, match="whose configuration differs"):
        chosen.config(tiny_model("Wan", layers=2).transformer)
    with pytest.raises(UserError, match="this plan is for"):
        chosen.config(wan.transformer, shape=(81, 480, 832))
    with pytest.raises(UserError, match=r"measured on cpu, not on H100"):
        dataclasses.replace(chosen, device="cpu").config(wan.transformer, device="H100")
    costs.check(wan.transformer, (13, 32, 48))
    with pytest.raises(UserError, match="not for 13 x 480 x 832"):
        costs.check(wan.transformer, (13, 480, 832))
    with pytest.raises(UserError, match="do not belong together"):
        plan(dataclasses.replace(SCORES, transformer="Other"), costs, 1)
    with pytest.raises(UserError, match="budget must be at least"):
        plan(SCORES, costs, 0)
    for wrong in (math.nan, math.inf):
        broken = {**SCORES.errors, "lit": (wrong, wrong, 0.2)}
        with pytest.raises(UserError, match=f"the score of lit in block 1 is {wrong}"):
            plan(dataclasses.replace(SCORES, errors=broken), costs, 0.5)
    with pytest.raises(UserError, match="did not call the transformer"):
        score(wan.transformer, lambda: None)
    with pytest.raises(UserError, match="Did you mean 'lit'"):
        score(wan.transformer, wan, kinds=("lid",))


def test_types_where_none_are_named(wan: TinyModel) -> None:
    """Without `kinds`, `lit` is no candidate for video: it is cheaper, so a plan would choose it for every block."""
    assert [*count(wan.transformer, **SIZE).changes] == ["window_delta"]
    assert [*score(wan.transformer, wan, config=NARROW).errors] == ["window_delta"]
    picture = tiny_model("PixArt")
    assert [*score(picture.transformer, picture).errors] == ["lit"]


def test_measured_costs(wan: TinyModel) -> None:
    stock = wan()
    costs = measure(wan.transformer, **SIZE, kinds=("lit",), repeats=1)
    assert costs.unit == "us"
    assert "cpu" in costs.device
    assert costs.base > 0
    assert len({*costs.changes["lit"]}) == 1
    assert torch.equal(wan(), stock)
    costs.check(wan.transformer, device=costs.device)
    with pytest.raises(UserError, match="were measured on"):
        costs.check(wan.transformer, device="H100")
