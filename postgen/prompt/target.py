"""The video model that a prompt is written for: style, length in tokens of its tokenizer, known words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postgen.errors import UserError
from postgen.prompt.styles import STYLES, Style, style_for

_TOKENS_PER_WORD = 1.4
"""Tokens of a word of English, for models whose tokenizer is not known."""
_LONGEST = 100_000
"""A larger `model_max_length` means that the tokenizer has no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What an enhancer must know about the video model."""

    style: Style = STYLES["prose"]
    """How prompts of the model are written, and their length."""
    limit: int | None = None
    """Largest number of tokens that the pipeline reads; None: unknown."""
    tokenizer: Any = field(default=None, compare=False)
    """Tokenizer of the pipeline; None: lengths are estimated by 1.4 tokens per word."""
    closed: bool = False
    """Whether the tokenizer knows a fixed list of words, as that of the embedded model."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of an enhanced prompt."""
        return self.style.tokens if self.limit is None else min(self.style.tokens, self.limit)

    @property
    def most_words(self) -> int:
        """About the same length in words of English, for instructions."""
        return max(1, int(self.most_tokens / _TOKENS_PER_WORD))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, with the special tokens of the tokenizer."""
        if self.tokenizer is None:
            return int(len(text.split()) * _TOKENS_PER_WORD + 0.999)
        return len(self.tokenizer(text)["input_ids"])

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that a model with a fixed list of words does not know; else none."""
        if not self.closed:
            return []
        from postgen.training.tokenizers import unknown_words

        return unknown_words(self.tokenizer, text)

    def settings(self) -> dict[str, Any]:
        """Return the values that identify the target, as JSON values, for the key of a cache."""
        name = None if self.tokenizer is None else [type(self.tokenizer).__name__, len(self.tokenizer)]
        return {"style": self.style.name, "tokens": self.most_tokens, "tokenizer": name}


def target_of(pipe: Any) -> Target:
    """Return the target for a pipeline of diffusers.

    The length is that of the style of its family, and at most the default `max_sequence_length` of its call.

    Args:
        pipe: a pipeline.
    """
    names = [name for name in getattr(pipe, "components", {}) if name.startswith("tokenizer")]
    tokenizer = next((pipe.components[name] for name in sorted(names) if pipe.components[name] is not None), None)
    return target_for(_diffusers_name(type(pipe)), tokenizer, _limit(type(pipe)))


def target_of_model(source: str, pipeline: str, call_limit: int | None = None) -> Target:
    """Return the target for a model whose weights are not loaded; only its tokenizer is read.

    Args:
        source: folder or Hub id of the model.
        pipeline: class name of its pipeline.
        call_limit: largest number of tokens; None: that of the signature of the pipeline.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    import diffusers

    from postgen.families.model_folder import read_index, small_files

    folder, _ = small_files(source)
    index: Mapping[str, Any] = read_index(folder)[0]
    names = [name for name in sorted(index) if name.startswith("tokenizer") and _present(index[name])]
    kind = getattr(diffusers, pipeline, None)
    limit = call_limit if call_limit is not None or kind is None else _limit(kind)
    return target_for(pipeline, _tokenizer(source, names[0]) if names else None, limit)


def target_for(pipeline: str, tokenizer: Any, limit: int | None) -> Target:
    """Return the target for the class name of a pipeline, its tokenizer, and the tokens that its call reads."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # Kandinsky has a processor of pictures and text
    closed = _is_closed(tokenizer)
    own = getattr(tokenizer, "model_max_length", None)
    limits = [most for most in (limit, own) if isinstance(most, int) and 0 < most < _LONGEST]
    return Target(
        style=STYLES["world"] if closed else style_for(pipeline),
        limit=min(limits) if limits else None,
        tokenizer=tokenizer,
        closed=closed,
    )


def _present(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] is not None


def _tokenizer(source: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, subfolder=name)
    except Exception as error:  # transformers and the Hub raise many kinds of exceptions
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tokenizer {name} of {source} cannot be loaded to measure prompts: {reason}") from error


def _is_closed(tokenizer: Any) -> bool:
    """Return whether a tokenizer replaces words that are not in its list by an unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not getattr(tokenizer, "is_fast", False):
        return False
    # Subword tokenizers encode any made-up word by its pieces.
    return unknown in tokenizer("zqxvbk", add_special_tokens=False)["input_ids"]


def _diffusers_name(kind: type) -> str:
    """Return the name of the diffusers class of a pipeline, also for a subclass with another name."""
    return next((each.__name__ for each in kind.__mro__ if each.__module__.startswith("diffusers.")), kind.__name__)


def _limit(kind: type) -> int | None:
    found = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    default = None if found is None else found.default
    return default if isinstance(default, int) and not isinstance(default, bool) else None
