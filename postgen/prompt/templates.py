"""The template enhancer: adds what a prompt leaves open by fixed phrases. Needs no model, and keeps every word."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgen.prompt.facts import tokens_of
from postgen.prompt.styles import Style
from postgen.prompt.target import Target
from postgen.prompt.words import CAMERA, COLOURS, LIGHT, MOTION, STYLE

_SAID: Mapping[str, frozenset[str]] = {
    "motion": MOTION,
    "camera": CAMERA,
    "light": LIGHT,
    "style": STYLE,
}
"""Words by slot: a prompt with one of them says something about this slot."""
_SIZES = frozenset(("small", "large", "big", "tiny", "little", "medium"))
_WORLD_JOINERS = re.compile(r"( and | while |[,;] (?:and )?)")


class TemplateRewriter:
    """Rewriter that appends phrases of the model's style to a prompt, chosen by the prompt and the seed.

    A slot (motion, camera, light, style) about which the prompt says something is left out. The words of the prompt
    stay as they are. The result is the same on every machine.
    """

    name = "template"
    plain = True

    def settings(self) -> Mapping[str, Any]:
        """Return the settings for the key of a cache."""
        return {"version": 1}

    def __call__(self, prompts: Sequence[str], target: Target, seed: int) -> list[str]:
        """Return the enhanced prompts, each within the length of the target."""
        return [_enhanced(prompt, target, seed) for prompt in prompts]


def _enhanced(prompt: str, target: Target, seed: int) -> str:
    text = " ".join(prompt.split())
    rng = random.Random(f"postgen-enhance-{seed}-{text}")
    closed = target.style.name == "world"
    if closed:
        text = _as_caption(text)
    said = {token.word for token in tokens_of(text)}
    for slot, phrases in target.style.phrases.items():
        phrase = rng.choice(phrases)  # drawn for every slot, so that a slot does not change the phrases of the others
        if said & _SAID[slot]:
            continue
        longer = f"{text}, {phrase}" if closed else f"{_sentence(text)} {phrase}."
        if target.count(longer) > target.most_tokens or (closed and target.unknown(phrase)):
            break
        text = longer
    return text


def _sentence(text: str) -> str:
    """Return a text that begins with a capital letter and ends like a sentence."""
    first = text.split()[0]
    if first.isascii() and first.isalpha() and first.islower():  # other words, such as iPhone, stay as they are
        text = text[0].upper() + text[1:]
    ended = text.rstrip("\"'\u201d\u2019)")[-1:] in (".", "!", "?", "\u2026", "\u3002")
    return text if ended else f"{text}."


def _as_caption(text: str) -> str:
    """Complete the clauses of a short prompt about the synthetic world to captions: an article and a verb.

    >>> _as_caption("red ball and blue cube falls")
    'a red ball stays still and a blue cube falls'
    """
    from postgen.world import read

    parts = _WORLD_JOINERS.split(text)
    for place in range(0, len(parts), 2):
        clause = parts[place]
        if clause and (found := read(clause)) is not None and found.scene is not None:
            parts[place] = _clause(clause, found.scene.bodies[0].event)
    return "".join(parts)


def _clause(clause: str, event: str) -> str:
    words = clause.lower().split()
    if words[0] in COLOURS or words[0] in _SIZES:
        clause = f"{'an' if words[0][0] in 'aeiou' else 'a'} {clause}"
    # The captions name one thing at a time, so a prompt about several things of a kind has no such verb.
    if event == "stays" and _is_noun(words[-1]):
        return f"{clause} stays still"
    return clause


def _is_noun(word: str) -> bool:
    from postgen.world.words import SHAPE_WORDS

    return any(word in nouns for nouns in SHAPE_WORDS.values())


def phrases_of(style: Style) -> list[str]:
    """Return all phrases of a style."""
    return [phrase for phrases in style.phrases.values() for phrase in phrases]
