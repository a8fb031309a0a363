"""Denoisers whose model fixes how many tokens a prompt has."""

from __future__ import annotations

from typing import Any, ClassVar

from postgen.errors import UserError


class FixedLength:
    """First parent of a denoiser: `max_sequence_length` is `default_length`, and another number is refused."""

    default_length: ClassVar[int]
    pipe: Any

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt."""
        return self.default_length

    @max_sequence_length.setter
    def max_sequence_length(self, length: int) -> None:
        if length != self.default_length:
            tokens = "1 token" if self.default_length == 1 else f"{self.default_length} tokens"
            raise UserError(
                f"the prompts of {type(self.pipe).__name__} have {tokens}, not {length}: leave max_sequence_length out"
            )
