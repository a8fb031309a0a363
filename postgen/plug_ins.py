"""The plug-ins of `postgen generate` and `postgen compare`, as options and sidecars write them. Light to import."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from postgen.errors import UserError
from postgen.families import video_tokens_named
from postgen.families.loading import ModelFacts
from postgen.fused import FusedOpsConfig, check_known, fused_for_call

FUSED = ("norm_rope", "adaln", "attention")
"""What `--fused` can name; `FusedOpsConfig` says what they are."""


def enhance_setting(text: str | None) -> float | str:
    """Return `auto` or the weight that a text names; 0 is off, and so is None.

    Raises:
        UserError: neither.
    """
    try:
        weight = 0.0 if text in (None, "auto") else float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"enhance must be auto or a number, got {text!r}")
    return "auto" if text == "auto" else weight


def fused_setting(text: str | None) -> FusedOpsConfig | bool:
    """Return which operations a text names: auto is all of them, off none, and so is None.

    Raises:
        UserError: an unknown name.

    >>> fused_setting("norm_rope,adaln").attention is None
    True
    """
    if text in (None, "off"):
        return False
    if text == "auto":
        return FusedOpsConfig()
    names = {name.strip() for name in (text or "").split(",")}
    if not names <= set(FUSED):
        raise UserError(f"fused must be auto, off or some of {', '.join(FUSED)} with commas between, got {text!r}")
    attention = "auto" if "attention" in names else None
    return FusedOpsConfig(norm_rope="norm_rope" in names, adaln="adaln" in names, attention=attention)


def check_plug_ins(facts: ModelFacts, *, enhance: str | None, fused: str | None) -> None:
    """Check before its weights are read that plug-ins know a model.

    Raises:
        UserError: a plug-in is asked for that knows nothing of its transformer.
    """
    asked = {"--enhance": enhance_setting(enhance) != 0, "--fused": bool(fused_setting(fused))}
    for option, on in asked.items():
        if on and facts.transformer is None:
            raise UserError(f"{facts.pipeline} has no transformer, which {option} works on: leave it out")
    if facts.transformer is not None and asked["--enhance"]:
        video_tokens_named(facts.transformer)
    if facts.transformer is not None and asked["--fused"]:
        check_known(facts.transformer)


@contextmanager
def plug_ins_for_call(pipe: Any, *, enhance: str | None, fused: str | None) -> Iterator[None]:
    """Set plug-ins for the calls in a block, as texts name them; what is not named is off."""
    from postgen.enhance import enhance_for_call

    if getattr(pipe, "transformer", None) is None:
        yield
        return
    with fused_for_call(pipe, fused_setting(fused)), enhance_for_call(pipe, enhance_setting(enhance)):
        yield
