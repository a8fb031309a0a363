"""Encoded texts of a training run, stored without padding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from postgen.families import Condition, Denoiser
from postgen.training.transfer import to_device

_AT_ONCE = 32


class Texts:
    """Encoded conditions of texts, addressed by number. Number 0 is the empty text.

    Args:
        denoiser: encodes the texts.
        device: on which the encodings are stored.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser, self.device = denoiser, device
        self.numbers: dict[str, int] = {}
        self._encoded: list[dict[str, Tensor]] = []
        self._lengths: dict[str, int] = {}
        self._joined: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.add([""])

    def __len__(self) -> int:
        return len(self.numbers)

    @torch.no_grad()
    def add(self, texts: Iterable[str]) -> None:
        """Encode texts that are not stored yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self.numbers]
        for low in range(0, len(new), _AT_ONCE):
            part = new[low : low + _AT_ONCE]
            found = self.denoiser.encode_prompt(part, guidance=False)
            self._joined.clear()
            for row, text in enumerate(part):
                self.numbers[text] = len(self._encoded)
                self._encoded.append({name: self._short(name, value[row]) for name, value in found.items()})

    def of(self, numbers: Iterable[int]) -> Condition:
        """Return the condition for texts by their numbers, padded as the denoiser encoded them."""
        rows = torch.tensor(list(numbers), dtype=torch.long)
        return {name: self._rows(name, rows) for name in self._encoded[0]}

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        if name not in self._lengths:
            return torch.stack([self._encoded[row][name] for row in rows.tolist()])
        # One gather. Padding each text on its own would need a kernel launch per text.
        tokens, first, count = self._joined.get(name) or self._join(name)
        place = torch.arange(self._lengths[name])
        places = torch.where(place < count[rows, None], first[rows, None] + place, 0)
        return tokens[to_device(places, tokens.device)]

    def _join(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tokens of all texts behind one zero token.

        Returns:
            The tokens, the position of each text's first token, and the number of tokens of each text.
        """
        parts = [row[name] for row in self._encoded]
        count = torch.tensor([len(part) for part in parts])
        tokens = torch.cat([parts[0].new_zeros(1, *parts[0].shape[1:]), *parts])
        for row, own in zip(self._encoded, tokens[1:].split(count.tolist()), strict=True):
            row[name] = own  # a view, so that the tokens are stored only once
        self._joined[name] = tokens, 1 + count.cumsum(0) - count, count
        return self._joined[name]

    def _short(self, name: str, value: Tensor) -> Tensor:
        if value.dim() > 1:  # (tokens, width); a mask is small and is stored as it is
            self._lengths[name] = len(value)
            used = value.flatten(1).abs().amax(1).nonzero()
            value = value[: int(used[-1]) + 1 if len(used) else 0]
        return value.detach().clone().to(self.device)
