"""Mixed precision: errors of single layers, costs, and the choice within a budget."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant import LayerSpec, format_of
from postgen.quant.layers import layers_of, parts_of
from postgen.quant.model import quantize_weights
from postgen.quant.sensitivity import Choice, OutputError, allocate, nanoseconds, sensitivity, stored_bytes
from postgen.quant.spec import QuantSpec
from tests.tiny_wan import wan_components

EXACT = LayerSpec(weight=None)
BITS = {bits: LayerSpec(weight=format_of(f"int{bits}:g16")) for bits in (2, 4, 8)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: nn.Module = wan_components(head_dim=16)["transformer"].requires_grad_(False)
    return found


def calls(model: nn.Module) -> list[partial[Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def output(x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        found: Tensor = model(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
        return found

    return [
        partial(
            output,
            size * torch.randn(1, 4, 3, 4, 4, generator=draw),
            torch.tensor([at]),
            torch.randn(1, 8, 16, generator=draw),
        )
        for at, size in ((900.0, 1.0), (200.0, 1.0))
    ]


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: model.get_submodule(name) for name in parts_of(model) if name.startswith("blocks.0.")}  # type: ignore[misc]


def test_errors_fall_with_bits_and_the_model_stays(model: nn.Module) -> None:
    before = {name: each.clone() for name, each in model.state_dict().items()}
    error = OutputError(calls(model))
    found = sensitivity(layers(model), [EXACT, *BITS.values()], error)
    assert error() == 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any("forward" in vars(each) for each in model.modules())
    by = {(each.layer, each.spec): each for each in found}
    for name, linear in layers(model).items():
        assert by[name, EXACT].error == 0
        assert by[name, BITS[2]].error > by[name, BITS[4]].error > by[name, BITS[8]].error > 0
        assert by[name, EXACT].cost == linear.weight.nbytes
        assert by[name, BITS[4]].cost == linear.weight.numel() * 6 // 8  # 32 bits of scale for 16 numbers


def test_the_error_is_that_of_the_quantised_model(model: nn.Module) -> None:
    name, linear = next(iter(layers(model).items()))
    error = OutputError(calls(model))
    spec = LayerSpec(weight=format_of("int3:g16"), act=format_of("int4:token"), rotate=16, rank=2)
    alone = sensitivity({name: linear}, [spec], error)[0].error
    settings = {"weight": "int3:g16", "act": "int4:token", "rotate": 16, "rank": 2}
    others = {"weight": None, "act": None}
    copy = wan_components(head_dim=16)["transformer"].requires_grad_(False)
    quantize_weights(copy, QuantSpec(overrides={name.replace(".", r"\."): settings, ".*": others}))
    both = [(call(), exact()) for call, exact in zip(calls(copy), calls(model), strict=True)]
    expected = sum(float((y - x).square().sum() / x.square().sum()) for y, x in both) / len(both)
    assert alone == pytest.approx(expected, rel=1e-4)


def test_a_budget_gives_a_spec_that_the_model_accepts(model: nn.Module) -> None:
    found = sensitivity(layers(model), [EXACT, *BITS.values()], OutputError(calls(model)))
    budget = sum(stored_bytes(name, linear, BITS[4]) for name, linear in layers(model).items())
    best, near = (allocate(found, budget, method=method) for method in ("exact", "greedy"))  # type: ignore[arg-type]
    for each in (best, near):
        assert each.cost <= budget
        assert set(each.chosen) == set(layers(model))
    even = sum(each.error for each in found if each.spec == BITS[4])
    assert best.error <= near.error
    assert best.error <= even
    assert allocate(found, 1.2 * budget).error < even
    assert len({each.spec for each in allocate(found, 1.2 * budget).chosen.values()}) > 1
    best = allocate(found, 1.2 * budget)
    said = layers_of(model, best.spec())
    assert said == {name: each.spec for name, each in best.chosen.items() if each.spec != EXACT}, "others stay exact"
    assert " layers as int4:g16" in str(best)
    assert f"sum of the errors {best.error:.3g}, cost {best.cost:,}" in str(best)
    assert str(found[1]).startswith("blocks.0.attn1.to_q: int2:g16, error ")
    assert allocate(found, 10**9).error == 0
    with pytest.raises(UserError, match="nothing is quantised"):
        allocate(found, 10**9).spec()
    with pytest.raises(UserError, match="the cheapest choices cost"):
        allocate(found, 10)


def test_candidates_that_do_not_fit_are_left_out() -> None:
    linear = nn.Linear(48, 8)
    found = sensitivity({"a": linear}, [BITS[4], LayerSpec(weight=format_of("int4:g64"))], lambda: 1.0)
    assert [each.spec for each in found] == [BITS[4]]
    with pytest.raises(UserError, match=r"no candidate fits the layer a: int4:g64 groups 64"):
        sensitivity({"a": linear}, [LayerSpec(weight=format_of("int4:g64"))], lambda: 1.0)
    with pytest.raises(UserError, match="must be finite"):
        sensitivity({"a": linear}, [BITS[4]], lambda: float("nan"))
    assert "forward" not in vars(linear)


def test_measured_times_are_kept() -> None:
    cost = nanoseconds(64, min_seconds=0.001)
    first, second = nn.Linear(32, 8), nn.Linear(32, 8)
    assert cost("a", first, BITS[4]) == cost("b", second, BITS[4]) > 0
    assert cost("a", first, EXACT) > 0


def test_wrong_choices_are_refused() -> None:
    choice = Choice(layer="a", spec=BITS[4], error=0.1, cost=5)
    for arguments, said in (
        (([], 5), "no choices"),
        (([choice], "5"), "budget is '5'"),
        (([choice], 4), "cost 5, more"),
    ):
        with pytest.raises(UserError, match=said):
            allocate(*arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Allowed: exact, greedy"):
        allocate([choice], 5, method="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        OutputError([])
    with pytest.raises(UserError, match="call 0 of the exact model is 0"):
        OutputError([lambda: torch.zeros(3)])
