"""Code of diffusers that fused forms take the place of, known by its text: where that changed, it stays."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import io
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """The fused form of one function of diffusers."""

    fused: Callable[..., Any]
    """What runs instead."""
    fingerprints: tuple[str, ...]
    """Of the texts that it was written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedFamily:
    """What is fused in a transformer class."""

    processors: Mapping[str, Replacement]
    """By the name of the class of an attention processor; fused: see `Attend`."""
    blocks: Mapping[str, Replacement]
    """By the name of the class of a block; fused: a forward of the same arguments."""


Attend = Callable[..., Any]
"""`attend(options, inner, attention, *args, **kwargs)` -> what the processor `inner` returns for these arguments.
It must call `inner` wherever it cannot compute the same."""


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash of the text of a function, comments and layout left out."""
    source = inspect.getsource(function)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type not in _LAYOUT]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def replacement_for(
    kind: type, function: Callable[..., Any], known: Mapping[str, Replacement], option: str
) -> Replacement:
    """Return what stands for a function of a class of diffusers.

    Args:
        kind: the class.
        function: of the class.
        known: what can be replaced, by the name of the class.
        option: field of `FusedOpsConfig` that switches this off, for the error.

    Raises:
        UserError: nothing stands for it, or its text is another one than it was written for.
    """
    found = known.get(kind.__name__)
    if found is None:
        names = ", ".join(known)
        raise UserError(f"no fused form of {kind.__name__}. Known: {names}. Leave it as it is with {option}")
    try:
        text = fingerprint(function)
    except (OSError, TypeError):
        text = "without source"
    if text not in found.fingerprints:
        raise UserError(
            f"{kind.__name__} is not the one of diffusers 0.42 that its fused form stands for (fingerprint {text}):"
            f" leave it as it is with {option}"
        )
    return found


def family_of(model: nn.Module) -> FusedFamily:
    """Return what can be fused in a transformer.

    Raises:
        UserError: nothing is known of its class.
    """
    name = type(model).__name__
    check_known(name)
    family: FusedFamily = importlib.import_module(f"postgen.fused.{_FAMILIES[name]}").FAMILY
    return family


def check_known(transformer: str) -> None:
    """Refuse a transformer class, by its name, of which nothing is known.

    Raises:
        UserError: it names those that are.
    """
    if transformer not in _FAMILIES:
        raise UserError(f"no fused operations for {transformer}. Known: {', '.join(_FAMILIES)}")


_FAMILIES = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx",
    "WanTransformer3DModel": "wan",
}
"""Transformer class -> module that knows its blocks."""
