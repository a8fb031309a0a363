"""A function of the user as a rewriter. Light to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postgen.errors import UserError, named_error, shown


class OwnRewriter:
    """Rewriter that calls a function from a list of prompts to a list of prompts.

    Args:
        function: the function.
        name: name in messages and caches.
    """

    def __init__(self, function: Callable[[list[str]], Sequence[str]], name: str) -> None:
        self.function, self.name = function, name

    def settings(self) -> Mapping[str, Any]:
        """Return the settings for the key of a cache: none, only the name is known."""
        return {}

    def __call__(self, prompts: Sequence[str], target: Any, seed: int) -> list[str]:
        """Return the answers.

        Raises:
            UserError: the function fails.
        """
        try:
            answers = self.function(list(prompts))
        except UserError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise UserError(f"the prompt enhancer {self.name} failed: {named_error(error)}") from error
        return list(answers) if isinstance(answers, list | tuple) else [answers]  # type: ignore[list-item]


def as_rewriter(found: Any, name: str) -> Any:
    """Return a rewriter for an object that a name leads to: a rewriter, its class, or a function.

    Raises:
        UserError: the object is none of these.
    """
    from postgen.prompt.enhancer import PromptEnhancer, Rewriter

    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:  # the user's class may raise anything
            raise UserError(f"the prompt enhancer {name} cannot be made: {named_error(error)}") from error
    if isinstance(found, PromptEnhancer):
        return found.rewriter
    if isinstance(found, Rewriter):
        return found
    if not callable(found):
        raise UserError(f"the prompt enhancer {name} is {shown(found)}, not a rewriter or a function of prompts")
    return OwnRewriter(found, name)
