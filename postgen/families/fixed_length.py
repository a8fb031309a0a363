"""Denoisers of models with a fixed number of tokens per prompt."""

from __future__ import annotations

from typing import Any, ClassVar

from postgen.errors import UserError


class FixedLength:
    """Mixin for a denoiser whose `max_sequence_length` is always `default_length`.

    It must be the first base class. Setting `max_sequence_length` to another number raises a `UserError`.
    """

    default_length: ClassVar[int]
    pipe: Any

    @property
    def max_sequence_length(self) -> int:
        """Number of tokens of an encoded prompt."""
        return self.default_length

    @max_sequence_length.setter
    def max_sequence_length(self, length: int) -> None:
        if length != self.default_length:
            tokens = "1 token" if self.default_length == 1 else f"{self.default_length} tokens"
            raise UserError(
                f"the prompts of {type(self.pipe).__name__} have {tokens}, not {length}: leave max_sequence_length out"
            )
