"""Reward for the form of an enhanced prompt: a prompt and nothing else, of the right length, with all facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from postgen.errors import UserError, check_number
from postgen.prompt.cleaning import clean, is_meta, is_refusal
from postgen.prompt.facts import facts_of
from postgen.prompt.guard import contradictions, missing
from postgen.prompt.target import Target
from postgen.prompt.training.answers import answer_of, originals_of


class StructureReward:
    """Reward function for `trl.GRPOTrainer`: the mean of three parts, from 0 to 1.

    - form: 1 if the answer is only a prompt; 0.5 if a prompt can be found in it; 0 for a refusal, a text about the
      prompt, or nothing;
    - length: 1 between `least_words` and the length of the target, falling to 0 at no word and at twice the length;
    - facts: share of the facts of `original_prompt` that survive (`postgen.prompt.guard.missing`), halved if the
      answer contradicts the prompt.

    Args:
        target: the video model; None: a model of unknown length.
        least_words: smallest number of words, 1 to 1000.
        reasoning: whether the answer may begin with reasoning in `<think>`, which counts for nothing.

    Raises:
        UserError: a number is out of range.

    >>> reward = StructureReward(least_words=4)
    >>> answers = ["A red ball rolls over grass.", "A ball rolls over green grass."]
    >>> [round(score, 2) for score in reward(None, answers, original_prompt=["a red ball"] * 2)]
    [1.0, 0.83]
    """

    def __init__(self, target: Target | None = None, *, least_words: int = 8, reasoning: bool = False) -> None:
        check_number("least_words", least_words, 1, 1000, whole=True)
        self.target, self.least_words, self.reasoning = target or Target(), least_words, reasoning
        if least_words > self.target.most_tokens:
            raise UserError(
                f"least_words {least_words} is above the {self.target.most_tokens} tokens of the video model: lower it"
            )
        self.__name__ = "structure"

    def __call__(
        self,
        prompts: Any,
        completions: Sequence[Any],
        *,
        original_prompt: Sequence[str] | None = None,
        log_metric: Any = None,
        **columns: Any,
    ) -> list[float]:
        """Return one score per completion.

        Raises:
            UserError: the column `original_prompt` is missing or wrong.
        """
        originals = originals_of(original_prompt, len(completions), self.__name__)
        parts = [self.parts(text, answer_of(answer)) for text, answer in zip(originals, completions, strict=True)]
        if log_metric is not None and parts:
            for name in parts[0]:
                log_metric(f"{self.__name__}/{name}", sum(part[name] for part in parts) / len(parts))
        return [sum(part.values()) / len(part) for part in parts]

    def parts(self, original: str, answer: str) -> dict[str, float]:
        """Return the parts `form`, `length` and `facts` for one answer, each from 0 to 1."""
        text = clean(answer)
        refused = (is_refusal(text) and not is_refusal(original)) or (is_meta(text) and not is_meta(original))
        if not text or refused:
            return {"form": 0.0, "length": 0.0, "facts": 0.0}
        facts = facts_of(original)
        kept = 1 - min(1.0, len(missing(facts, text)) / max(1, len(facts)))
        return {
            "form": 1.0 if self._bare(answer) == text else 0.5,
            "length": self._length(text),
            "facts": kept / 2 if contradictions(facts, text) else kept,
        }

    def _bare(self, answer: str) -> str:
        if self.reasoning and answer.lstrip().startswith("<think>"):
            answer = answer.partition("</think>")[2]
        return " ".join(answer.split())

    def _length(self, text: str) -> float:
        words, tokens, most = len(text.split()), self.target.count(text), self.target.most_tokens
        if words < self.least_words:
            return words / self.least_words
        return 1.0 if tokens <= most else max(0.0, 2 - tokens / most)
