"""Reward for an enhanced prompt that still means what the user said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.prompt.cleaning import clean
from postgen.prompt.training.answers import answer_of, originals_of

Embed = Callable[[list[str]], Tensor]
"""Function from N texts to embeddings (N, D)."""
_LENGTHS = (3, 4, 5)
"""Lengths of the character n-grams."""


class SimilarityReward:
    """Reward function for `trl.GRPOTrainer`: similarity of the answer and `original_prompt`, from 0 to 1.

    Args:
        embed: sentence encoder; the reward is the cosine, or 0 if it is negative. None: the share of the character
            n-grams of the original prompt that the answer contains, which needs no model and does not fall with the
            length of the answer.

    >>> reward = SimilarityReward()
    >>> reward(None, ["a shiny red ball", "a cat"], original_prompt=["a red ball"] * 2)[0] > 0.6
    True
    """

    def __init__(self, embed: Embed | None = None) -> None:
        self.embed = embed
        self.__name__ = "similarity"

    def __call__(
        self,
        prompts: Any,
        completions: Sequence[Any],
        *,
        original_prompt: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return one score per completion.

        Raises:
            UserError: the column `original_prompt` is missing or wrong, or the encoder returns something else than N
                finite embeddings.
        """
        originals = originals_of(original_prompt, len(completions), self.__name__)
        texts = [clean(answer_of(answer)) for answer in completions]
        if self.embed is None:
            return [contained(text, answer) for text, answer in zip(originals, texts, strict=True)]
        found = self._embedded([*originals, *texts])
        cosines = torch.cosine_similarity(found[: len(texts)], found[len(texts) :], dim=-1).clamp(0, 1)
        return [float(score) if text else 0.0 for score, text in zip(cosines, texts, strict=True)]

    def _embedded(self, texts: list[str]) -> Tensor:
        assert self.embed is not None
        with torch.no_grad():
            found = self.embed(texts)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(texts):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"embed must return a tensor ({len(texts)}, D), got {shape}")
        if not found.isfinite().all():
            raise UserError("embed returned embeddings that are not finite")
        return found.float().cpu()


def contained(original: str, answer: str) -> float:
    """Return the share of the character n-grams of a text that another text contains, from 0 to 1.

    >>> contained("a red ball", "a red ball"), contained("a red ball", "")
    (1.0, 0.0)
    """
    ours, theirs = _grams(original), _grams(answer)
    return sum((ours & theirs).values()) / max(1, sum(ours.values()))


def _grams(text: str) -> Counter[str]:
    plain = f" {' '.join(text.lower().split())} "
    return Counter(plain[place : place + n] for n in _LENGTHS for place in range(len(plain) - n + 1))
