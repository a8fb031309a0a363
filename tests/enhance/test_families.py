"""Enhance-A-Video on every family: the checks of the benchmark, and that they notice what they are there to notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.enhance_families import (
    CHECKS,
    frames_are_where_we_think,
    gains_are_at_least_one,
    layers_are_found,
    passing_families,
)
from postgen.families import layout_of, register_layout, registry
from postgen.families.layout import grid_btchw
from tests.families.tiny_models import BUILDERS, TinyModel, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Enhance-A-Video")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than one only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_family(name: str, check: Callable[[TinyModel], None]) -> None:
    check(tiny_model(name, batch=2))


WRONG: list[tuple[str, dict[str, Any], Callable[[TinyModel], None]]] = [
    ("CogVideoX 1.0", {"token_order": "video-text"}, frames_are_where_we_think),
    ("HunyuanVideo", {"token_order": "text-video"}, frames_are_where_we_think),
    ("HunyuanVideo", {"self_attention": r"transformer_blocks\.\d+\.attn"}, layers_are_found),
    ("HunyuanVideo Framepack", {"token_order": "video-text"}, frames_are_where_we_think),
    ("Helios", {"token_order": "video-reference"}, frames_are_where_we_think),
    ("LTX-2", {"self_attention": r"transformer_blocks\.\d+\.audio_attn1"}, layers_are_found),
    ("Latte", {"self_attention": r"transformer_blocks\.\d+\.attn1"}, layers_are_found),
    ("Mochi", {"scale_target": "attention"}, gains_are_at_least_one),
    ("Wan", {"self_attention": r"blocks\.\d+\.attn2"}, layers_are_found),
    ("Wan", {"grid_rule": grid_btchw}, layers_are_found),
]
"""A tiny model, what is changed in its row, the check that must fail."""


@pytest.mark.parametrize(("name", "wrong", "check"), WRONG)
def test_a_wrong_row_is_noticed(
    name: str, wrong: dict[str, Any], check: Callable[[TinyModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    tiny = tiny_model(name, batch=2)
    register_layout(dataclasses.replace(layout_of(tiny.transformer), **wrong))
    with pytest.raises(AssertionError):
        check(tiny)


def test_passing_families_counts_classes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Several models of one class count once, and one that fails fails the class."""
    wan = [name for name in BUILDERS if name.startswith("Wan ") or name == "Wan"]
    few = {name: BUILDERS[name] for name in (*wan, "Mochi")}
    monkeypatch.setattr("benchmarks.enhance_families.BUILDERS", few)
    assert passing_families() == {"WanTransformer3DModel": True, "MochiTransformer3DModel": True}
    row = dataclasses.replace(layout_of(tiny_model("Mochi").transformer), scale_target="attention")
    monkeypatch.setattr(registry, "_layouts", {**registry._layouts, row.transformer: row})
    assert passing_families() == {"WanTransformer3DModel": True, "MochiTransformer3DModel": False}
    assert "Mochi: gains_are_at_least_one: nothing changes" in capsys.readouterr().out
