"""The handle of every plug-in: after `remove` every method raises, and a call that fails changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import postgen
from postgen.fused.apply import fused_for_call
from postgen.fused.fp8_attention import remove_fp8_attention
from postgen.plug_ins import PlugIn, known_plug_ins, resolve
from tests.families.tiny_models import TinyModel, tiny_model

CHANGES: dict[str, tuple[Callable[[Any], None], dict[str, Any], dict[str, Any]]] = {
    "enhance_a_video": (postgen.remove_enhance_a_video, {"weight": 3.0}, {"weight": {"x": 1.0}}),
    "fp8_linears": (postgen.remove_fp8_linears, {"attention": False}, {"first_exact_blocks": -1}),
    "fp8_attention": (remove_fp8_attention, {"preparation": "plain"}, {"exact_layers": ("nothing",)}),
    "fused_ops": (postgen.remove_fused_ops, {"adaln": False}, {"attention": "nothing"}),
}
"""Plug-in -> function that removes it, a valid change of its settings, an invalid change. One row per plug-in."""

USUAL = {"fp8_attention": postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)}
"""Settings for plug-ins whose default settings need a GPU."""


def applying(row: PlugIn) -> Callable[..., Any]:
    """Return the apply function of a plug-in; its default settings run on every machine."""
    apply, usual = resolve(row.apply), USUAL.get(row.name)
    return lambda target, config=usual: apply(target, config)


APPLY: dict[str, tuple[Callable[..., Any], Callable[[Any], None], dict[str, Any], dict[str, Any]]] = {
    row.name: (applying(row), *CHANGES[row.name]) for row in known_plug_ins()
}


@pytest.fixture(params=sorted(APPLY))
def plug_in(request: pytest.FixtureRequest) -> Any:
    return APPLY[request.param]


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan")


@pytest.mark.parametrize("by_handle", [True, False])
def test_a_removed_plug_in_refuses_everything(plug_in: Any, wan: TinyModel, by_handle: bool) -> None:
    apply, remove, change, _ = plug_in
    handle = apply(wan.transformer)
    handle.remove() if by_handle else remove(wan.transformer)
    for call in (
        handle.enable,
        handle.disable,
        handle.remove,
        lambda: handle.update(**change),
        lambda: handle.enabled,
        lambda: handle.config,
    ):
        with pytest.raises(postgen.UserError, match="removed: apply"):
            call()
    assert handle.stats() == {}
    assert not postgen.summary(wan.transformer).transformers[0].plug_ins


def test_switching_gives_the_stock_model_back(plug_in: Any, wan: TinyModel) -> None:
    apply, _, change, wrong = plug_in
    with torch.no_grad():
        stock = wan()
        handle = apply(wan.transformer)
        handle.update(**change)
        on = wan()
        for words in ({"nonsense": 1}, wrong):
            before = handle.config
            with pytest.raises(postgen.UserError):
                handle.update(**words)
            assert (handle.config, handle.enabled) == (before, True)
        handle.disable()
        handle.disable()
        assert not handle.enabled
        assert torch.equal(wan(), stock)
        handle.enable()
        assert torch.equal(wan(), on)
        with pytest.raises(postgen.UserError, match="on this transformer already"):
            apply(wan.transformer)
        handle.remove()
        assert torch.equal(wan(), stock)


def test_settings_of_another_plug_in_are_refused(plug_in: Any, wan: TinyModel) -> None:
    apply, wrong = plug_in[0], next(other[0] for other in APPLY.values() if other is not plug_in)
    handle = apply(wan.transformer)
    config, other = handle.config, wrong(wan.transformer).config
    for settings in (other, 3.0):
        for call in (handle.update, lambda settings: apply(tiny_model("Wan").transformer, settings)):
            with pytest.raises(postgen.UserError, match=f"they must be a {type(config).__name__}"):
                call(settings)
    assert handle.config == config
    with (
        pytest.raises(postgen.UserError, match="they must be a FusedOpsConfig"),
        fused_for_call(wan.transformer, "all"),
    ):  # type: ignore[arg-type]
        pass


def test_one_transformer_in_two_places(plug_in: Any, wan: TinyModel) -> None:
    apply, _, change, _ = plug_in

    class Pipe:
        components = {"transformer": wan.transformer, "transformer_2": wan.transformer}  # noqa: RUF012

    with torch.no_grad():
        stock = wan()
        handle = apply(Pipe())
        assert list(handle.still_on) == ["transformer"]
        handle.update(**change)
        handle.remove()
        assert torch.equal(wan(), stock)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_what_is_removed_within_a_call_stays_removed(plug_in: Any, wan: TinyModel, on: bool, again: bool) -> None:
    apply, remove, change, _ = plug_in
    row = next(row for row in known_plug_ins() if APPLY[row.name] is plug_in)
    within: Any = resolve(row.for_call)
    with torch.no_grad():
        stock = wan()
        if on:
            apply(wan.transformer)
        with within(wan.transformer, USUAL.get(row.name, True)):
            remove(wan.transformer)
            handle = apply(wan.transformer) if again else None
            if handle is not None:
                handle.update(**change)
        if handle is not None:
            assert handle.enabled
            assert all(getattr(handle.config, name) == value for name, value in change.items())
            handle.remove()
        assert not postgen.summary(wan.transformer).transformers[0].plug_ins
        assert torch.equal(wan(), stock)


def test_where_one_transformer_refuses_none_is_changed(plug_in: Any, wan: TinyModel) -> None:
    apply = plug_in[0]

    class Pipe:
        components = {"transformer": wan.transformer, "transformer_2": torch.nn.Linear(1, 1)}  # noqa: RUF012

    with pytest.raises(postgen.UserError, match="Linear"):
        apply(Pipe())
    assert not postgen.summary(wan.transformer).transformers[0].plug_ins
