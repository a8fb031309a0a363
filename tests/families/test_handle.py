"""One handle for all plug-ins: after removal it refuses everything, and what fails changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import postgen
from tests.families.tiny_models import TinyModel, tiny_model

APPLY: dict[str, tuple[Callable[..., Any], Callable[[Any], None], dict[str, Any], dict[str, Any]]] = {
    "enhance": (
        postgen.apply_enhance_a_video,
        postgen.remove_enhance_a_video,
        {"weight": 3.0},
        {"weight": {"x": 1.0}},
    ),
    "fused": (postgen.apply_fused_ops, postgen.remove_fused_ops, {"adaln": False}, {"attention": "nothing"}),
}
"""Plug-in -> how it is put on and off, a change of its settings, and a wrong one."""


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


def test_where_one_transformer_refuses_none_is_changed(plug_in: Any, wan: TinyModel) -> None:
    apply = plug_in[0]

    class Pipe:
        components = {"transformer": wan.transformer, "transformer_2": torch.nn.Linear(1, 1)}  # noqa: RUF012

    with pytest.raises(postgen.UserError, match="Linear"):
        apply(Pipe())
    assert not postgen.summary(wan.transformer).transformers[0].plug_ins
