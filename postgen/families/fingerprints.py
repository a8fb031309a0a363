"""Fingerprints of diffusers functions on whose source code postgen depends.

Some code of postgen repeats what a diffusers function does. A fingerprint is a hash of the function's source code. If
the fingerprint of the installed function is unknown, the source code has changed, and postgen raises a `UserError`
instead of computing something else.
"""

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
    """An object that is written for certain versions of a diffusers function."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of these versions."""


Known = TypeVar("Known", bound=WrittenFor)


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash (16 hex digits) of the source code of a function, without comments and layout."""
    source = inspect.getsource(function)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type not in _LAYOUT]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def known_for(
    kind: type, function: Callable[..., Any], known: Mapping[str, Known], *, what: str, advice: str
) -> Known:
    """Return the object of postgen for a diffusers class, after a check of the source code of one function.

    Args:
        kind: the diffusers class.
        function: function of the class whose source code is checked.
        known: the objects of postgen, by class name.
        what: name of such an object in the error message: "no {what} of ...".
        advice: what the user can do, for the error message.

    Raises:
        UserError: `known` has no entry for the class, or the source code of the function has changed.
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
            f"{kind.__name__} is not the one of diffusers 0.42 for which its {what} was written (fingerprint {text},"
            f" diffusers {version_of('diffusers')}): {advice}"
        )
    return found
