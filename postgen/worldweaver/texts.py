"""Encoded texts of a whole run, without the zeros that pad them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from postgen.families import Condition, Denoiser

_AT_ONCE = 32


class Texts:
    """Conditions of texts by number. Number 0 is the empty text.

    Args:
        denoiser: encodes them.
        device: where they are kept.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser, self.device = denoiser, device
        self.numbers: dict[str, int] = {}
        self._encoded: list[dict[str, Tensor]] = []
        self._lengths: dict[str, int] = {}
        self.add([""])

    def __len__(self) -> int:
        return len(self.numbers)

    @torch.no_grad()
    def add(self, texts: Iterable[str]) -> None:
        """Encode texts that are not known yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self.numbers]
        for low in range(0, len(new), _AT_ONCE):
            part = new[low : low + _AT_ONCE]
            found = self.denoiser.encode_prompt(part, guidance=False)
            for row, text in enumerate(part):
                self.numbers[text] = len(self._encoded)
                self._encoded.append({name: self._short(name, value[row]) for name, value in found.items()})

    def of(self, numbers: Iterable[int]) -> Condition:
        """Return the condition of texts by their numbers, as the denoiser encoded them."""
        rows = [self._encoded[number] for number in numbers]
        return {name: torch.stack([self._whole(name, row[name]) for row in rows]) for name in rows[0]}

    def _short(self, name: str, value: Tensor) -> Tensor:
        self._lengths[name] = len(value)
        if value.dim() > 1:  # (tokens, width); a mask is small
            used = value.flatten(1).abs().amax(1).nonzero()
            value = value[: int(used[-1]) + 1 if len(used) else 0]
        return value.detach().clone().to(self.device)

    def _whole(self, name: str, value: Tensor) -> Tensor:
        return pad(value, (0, 0, 0, self._lengths[name] - len(value))) if value.dim() > 1 else value
