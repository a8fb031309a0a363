"""The texts in the columns that TRL passes to rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from postgen.errors import UserError, shown


def answer_of(completion: Any) -> str:
    """Return the raw text of a completion: a text, or a list of messages of a chat.

    Raises:
        UserError: it is neither.

    >>> answer_of([{"role": "assistant", "content": "a red ball"}])
    'a red ball'
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if content is None or isinstance(content, str):
            return content or ""
    raise UserError(f"a completion must be a text or a list of messages, got {shown(completion)}")


def originals_of(original_prompt: Any, count: int, name: str) -> list[str]:
    """Check the column `original_prompt`, and return it.

    Raises:
        UserError: it is missing, has a wrong length, or contains something else than texts.
    """
    if original_prompt is None:
        raise UserError(f"{name} needs the column original_prompt: make the rows with to_rl_rows")
    texts = list(original_prompt)
    if len(texts) != count or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"original_prompt must be {count} texts that are not empty, got {shown(texts)}")
    return texts
