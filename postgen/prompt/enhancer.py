"""Prompt enhancement: rewrite short prompts for a video model, guarded and cached."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from postgen.errors import UserError, check_number, check_text, shown
from postgen.prompt.cache import PromptCache, key_of
from postgen.prompt.guard import GuardConfig, check
from postgen.prompt.target import Target, target_of
from postgen.prompt.templates import TemplateRewriter


@runtime_checkable
class Rewriter(Protocol):
    """Rewrites prompts for a video model; the enhancer guards and caches the answers."""

    name: str
    """Name in messages and caches."""

    def settings(self) -> Mapping[str, Any]:
        """Return JSON values that determine the answers, such as the model; never a key or password."""

    def __call__(self, prompts: Sequence[str], target: Target, seed: int) -> list[str]:
        """Return one answer for each prompt: the prompt, or a text that contains it.

        Args:
            prompts: prompts of the user.
            target: the video model.
            seed: the same prompt, target and seed have the same answer, as far as the model allows.

        Raises:
            UserError: the model cannot be asked.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhancerConfig:
    """Settings of `PromptEnhancer`."""

    seed: int = 0
    """Seed of the rewriter, from 0. The same prompt and seed have the same enhanced prompt."""
    attempts: int = 2
    """Number of answers that are tried for each prompt, with seeds `seed`, `seed` + 1, ..., from 1 to 100. A model
    with temperature 0 is asked once."""
    fallback: Literal["original", "template"] = "original"
    """What is used with a warning if the guard refuses all answers: the prompt as it is, or the template enhancer."""
    most_words: int = 60
    """A prompt with more words is detailed already, and is not changed."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Settings of the guard."""

    def __post_init__(self) -> None:
        check_number("seed", self.seed, 0, 2**31 - 1, whole=True)
        check_number("attempts", self.attempts, 1, 100, whole=True)
        check_number("most_words", self.most_words, 1, 10_000, whole=True)
        if self.fallback not in ("original", "template"):
            raise UserError(f"fallback must be original or template, got {shown(self.fallback)}")
        if not isinstance(self.guard, GuardConfig):
            raise UserError(f"guard must be a GuardConfig, got {shown(self.guard)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Enhanced:
    """One enhanced prompt."""

    original: str
    """Prompt of the user."""
    text: str
    """Prompt for the video model."""
    by: str
    """Name of the rewriter, or `original` if the prompt was not changed."""
    cached: bool = False
    """Whether the text was in the cache."""
    problems: tuple[str, ...] = ()
    """Why the guard refused the last answer of the rewriter; empty if it accepted an answer."""


class PromptEnhancer:
    """Callable that rewrites prompts: a list of prompts in, a list of the same length out.

    Each answer of the rewriter must pass `postgen.prompt.guard.check`; otherwise the fallback is used with a warning.
    A prompt that is long enough is returned unchanged.

    Args:
        rewriter: a `Rewriter`, or a name as in `postgen.prompt.get_rewriter`.
        config: settings.
        target: the video model; None: the pipeline that the enhancer is given to, otherwise a model of unknown length.
        cache: a cache, or the path of its file; None: in memory.

    Raises:
        UserError: the rewriter is unknown, or the cache cannot be read.

    >>> PromptEnhancer()(["a dog runs over a meadow at sunset, aerial shot, watercolour"])
    ['A dog runs over a meadow at sunset, aerial shot, watercolour. The movement is steady and physically plausible.']
    """

    def __init__(
        self,
        rewriter: Rewriter | str = "template",
        config: EnhancerConfig | None = None,
        *,
        target: Target | None = None,
        cache: PromptCache | str | Path | None = None,
    ) -> None:
        if isinstance(rewriter, str):
            from postgen.prompt.naming import get_rewriter

            rewriter = get_rewriter(rewriter)
        if not isinstance(rewriter, Rewriter):
            raise UserError(
                "rewriter must be a name, or have name, settings() and a call; name a function as module:name or"
                f" file.py:name; got {shown(rewriter)}"
            )
        self.rewriter, self.config, self.target = rewriter, config or EnhancerConfig(), target
        self.cache = cache if isinstance(cache, PromptCache) else PromptCache(cache)

    def for_pipeline(self, pipe: Any) -> PromptEnhancer:
        """Return this enhancer for a pipeline; an enhancer with a target of its own is returned as it is."""
        if self.target is not None:
            return self
        return PromptEnhancer(self.rewriter, self.config, target=target_of(pipe), cache=self.cache)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Return the enhanced prompts.

        Raises:
            UserError: a prompt is not a text or is empty, or the rewriter cannot be asked.
        """
        return [each.text for each in self.enhance(prompts)]

    def enhance(self, prompts: Sequence[str]) -> list[Enhanced]:
        """Return the enhanced prompts with their origin; errors as in the call."""
        _check_prompts(prompts)
        target = self.target or Target()
        found: dict[str, Enhanced] = {}
        for prompt in dict.fromkeys(prompts):
            if len(prompt.split()) > self.config.most_words or target.count(prompt) >= target.most_tokens:
                found[prompt] = Enhanced(original=prompt, text=prompt, by="original")
            elif (text := self._kept(prompt, target)) is not None:
                found[prompt] = Enhanced(original=prompt, text=text, by=self.rewriter.name, cached=True)
        left = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        problems: dict[str, tuple[str, ...]] = {}
        # A rewriter that does not draw its answers gives the same answer again.
        for attempt in range(self.config.attempts if getattr(self.rewriter, "seeded", True) else 1):
            left = self._ask(left, target, attempt, found, problems)
        for prompt in left:
            found[prompt] = self._instead(prompt, target, problems[prompt])
        return [found[prompt] for prompt in prompts]

    def _ask(
        self,
        prompts: list[str],
        target: Target,
        attempt: int,
        found: dict[str, Enhanced],
        problems: dict[str, tuple[str, ...]],
    ) -> list[str]:
        """Ask the rewriter once for each prompt, store what the guard accepts, and return the other prompts."""
        if not prompts:
            return []
        answers = self.rewriter(prompts, target, self.config.seed + attempt)
        if len(answers) != len(prompts) or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"{self.rewriter.name} must return one text per prompt, {len(prompts)}: {shown(answers)}")
        plain = bool(getattr(self.rewriter, "plain", False))
        for prompt, answer in zip(prompts, answers, strict=True):
            verdict = check(prompt, answer, target, self.config.guard, plain=plain)
            if verdict.ok:
                found[prompt] = Enhanced(original=prompt, text=verdict.text, by=self.rewriter.name)
                self.cache.put(self._key(prompt, target), verdict.text, prompt=prompt, by=self.rewriter.name)
            else:
                problems[prompt] = verdict.problems
        return [prompt for prompt in prompts if prompt not in found]

    def _instead(self, prompt: str, target: Target, problems: tuple[str, ...]) -> Enhanced:
        """Return what is used for a prompt whose answers the guard refused, and warn."""
        text, by = prompt, "original"
        if self.config.fallback == "template":
            plain = TemplateRewriter()([prompt], target, self.config.seed)[0]
            if check(prompt, plain, target, self.config.guard, plain=True).ok:
                text, by = plain, TemplateRewriter.name
        used = "the prompt is used as it is" if by == "original" else "the template enhancer is used"
        warnings.warn(
            f"{self.rewriter.name} gave no usable prompt for {shown(prompt)} ({'; '.join(problems)}): {used}",
            stacklevel=4,
        )
        return Enhanced(original=prompt, text=text, by=by, problems=problems)

    def _kept(self, prompt: str, target: Target) -> str | None:
        """Return the text in the cache; None if there is none, or if the guard refuses it, as after an edit."""
        text = self.cache.get(self._key(prompt, target))
        refused = text is not None and not check(prompt, text, target, self.config.guard, plain=True).ok
        return None if refused else text

    def _key(self, prompt: str, target: Target) -> str:
        config = {"seed": self.config.seed, "attempts": self.config.attempts, "guard": asdict(self.config.guard)}
        rewriter = {"name": self.rewriter.name, **self.rewriter.settings()}
        return key_of({"prompt": prompt, "rewriter": rewriter, "target": target.settings(), "config": config})


def _check_prompts(prompts: Any) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(f"an enhancer takes a list of prompts, got {shown(prompts)}")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompt {number} must be a text that is not empty, got {shown(prompt)}")
        check_text(f"prompt {number}", prompt)
