"""Code of diffusers that ours was written against, known by its text: where that has changed, it is refused."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from postgen.errors import UserError
from postgen.versions import version_of

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class WrittenFor(Protocol):
    """What was written against the text of one function of diffusers."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the texts that it fits."""


Known = TypeVar("Known", bound=WrittenFor)


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash of the text of a function, comments and layout left out."""
    source = inspect.getsource(function)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type not in _LAYOUT]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def known_for(
    kind: type, function: Callable[..., Any], known: Mapping[str, Known], *, what: str, advice: str
) -> Known:
    """Return what was written for a function of a class of diffusers.

    Args:
        kind: the class.
        function: of the class; its text is compared.
        known: what there is, by the name of the class.
        what: what it is, for the error: "no {what} of ...".
        advice: what to do where there is none, for the error.

    Raises:
        UserError: there is none, or the text is another one than it was written for.
    """
    found = known.get(kind.__name__)
    if found is None:
        raise UserError(f"no {what} of {kind.__name__}. Known: {', '.join(known)}. To go on, {advice}")
    try:
        text = fingerprint(function)
    except (OSError, TypeError):
        text = "without source"
    if text not in found.fingerprints:
        raise UserError(
            f"{kind.__name__} is not the one of diffusers 0.42 that its {what} stands for (fingerprint {text},"
            f" diffusers {version_of('diffusers')}): {advice}"
        )
    return found
