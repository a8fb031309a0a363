"""Alternative wordings of a caption: synonyms, sizes, verb forms.

With them, training covers every word that the world can read in a prompt.
"""

from __future__ import annotations

import random
import re

from .grammar import caption, simple_caption
from .spec import COLOURS, PAIR_EVENTS, Body, Spec
from .words import (
    BACKGROUND_PHRASES,
    CAMERA_FORMS,
    CAMERA_READINGS,
    COLOUR_SYNONYMS,
    EVENT_PHRASES,
    JOINERS,
    PLACE_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
)

UNKNOWN = "<unk>"
"""Token that replaces a word that the model does not know."""

EVENT_FORMS: dict[str, tuple[str, ...]] = {
    "moves left": ("is moving left", "is {rolling} left", "goes left", "{roll} leftward", "moves leftwards"),
    "moves right": ("is moving right", "is {rolling} right", "goes right", "{roll} rightward", "moves rightwards"),
    "moves closer": ("comes nearer", "moves forward", "is approaching", "{roll} towards the viewer"),
    "moves away": ("moves back", "{roll} backward", "is receding", "goes backwards"),
    "stays": ("is resting", "is motionless", "remains in place", "stands on the floor"),
    "bounces": ("jumps", "is jumping", "bounces high"),
    "falls": ("is falling", "drops", "is dropping", "lands on the floor"),
    "collides": ("knocks into {other}", "is hitting {other}", "crashes with {other}", "bumps against {other}"),
    "passes behind": ("goes behind {other}", "is moving behind {other}", "is {rolling} behind {other}"),
}
"""Verb forms that `world.parse` reads and `world.caption` never writes; {rolling} is the participle of {roll}."""

_SYNONYMS = {
    name: tuple(word for word, colour in COLOUR_SYNONYMS.items() if colour == name)
    for name in set(COLOUR_SYNONYMS.values())
}
_WORD = re.compile(r"[a-z]+")


def captions(spec: Spec, seeds: list[int], synonym_share: float, unknown_share: float = 0.0) -> tuple[str, ...]:
    """Return the plainest caption of a scene, and one caption for each seed, in part with other words.

    Args:
        spec: the scene.
        seeds: any integers.
        synonym_share: probability, in [0, 1], that a colour, shape or verb is replaced by a word that `world.caption`
            rarely or never uses.
        unknown_share: probability, in [0, 1], that a caption contains a stray word (`UNKNOWN`).
    """
    texts = (caption(spec, seed) for seed in seeds)
    if synonym_share or unknown_share:
        texts = (
            reworded(text, spec, synonym_share, unknown_share, seed) for text, seed in zip(texts, seeds, strict=True)
        )
    return (simple_caption(spec), *texts)


def reworded(text: str, spec: Spec, synonym_share: float, unknown_share: float, seed: int) -> str:
    """Reword a caption of `world.caption`. `world.parse` still reads the same scene from the result.

    Args:
        text: the caption.
        spec, synonym_share, unknown_share: as in `captions`.
        seed: any integer.
    """
    rng = random.Random(f"postgen-reworded-{seed}")
    for body in spec.bodies:
        if rng.random() < synonym_share:
            text = _other_verb(text, spec, body, rng)
    for body in spec.bodies:
        text = _other_noun(text, body, synonym_share, rng)
    text = _other_camera(text, spec.camera, synonym_share, rng)
    text = re.sub(r"\b(an?) (?=(\w))", lambda m: "an " if m[2] in "aeiou" else "a ", text)
    if rng.random() < 0.5 * synonym_share:
        text += "."
    if rng.random() < unknown_share:
        words = text.split(" ")
        words.insert(rng.randrange(len(words) + 1), UNKNOWN)
        text = " ".join(words)
    return text


def _noun(body: Body) -> str:
    return rf"{body.colour} (?:{'|'.join(map(re.escape, SHAPE_WORDS[body.shape]))})"


def _other_verb(text: str, spec: Spec, body: Body, rng: random.Random) -> str:
    """Replace the phrase after a body's noun by one of `EVENT_FORMS`."""
    form = _filled(rng.choice(EVENT_FORMS[body.event]), body)
    for phrase in sorted(EVENT_PHRASES[body.event], key=len, reverse=True):
        before, _, after = _filled(phrase, body).partition("{other}")
        other = ""
        if body.event in PAIR_EVENTS and body.partner is not None:
            other = rf"((?:an? |the )?(?:[\w-]+ )?{_noun(spec.bodies[body.partner])})"
        pattern = rf"({_noun(body)}) {re.escape(before)}{other}{re.escape(after)}(?![\w-])"
        found = re.search(pattern, text)
        if found is not None:
            said = form.replace("{other}", found[2]) if other else form
            return f"{text[: found.start()]}{found[1]} {said}{text[found.end() :]}"
    return text


def _filled(phrase: str, body: Body) -> str:
    ball = body.shape == "ball"
    return phrase.replace("{rolling}", "rolling" if ball else "sliding").replace(
        "{roll}", "rolls" if ball else "slides"
    )


def _other_noun(text: str, body: Body, share: float, rng: random.Random) -> str:
    """Replace the colour and shape of a body by synonyms, and sometimes add the size of a medium body."""
    found = re.search(_noun(body), text)
    if found is None:
        return text
    colour, shape = found[0].split(" ")
    if body.colour in _SYNONYMS and rng.random() < share:
        colour = rng.choice(_SYNONYMS[body.colour])
    if rng.random() < share:
        shape = rng.choice(SHAPE_WORDS[body.shape][1:])
    if body.size == "medium" and rng.random() < 0.3 * share:
        colour = f"{rng.choice(SIZE_WORDS['medium'])} {colour}"
    return f"{text[: found.start()]}{colour} {shape}{text[found.end() :]}"


def _other_camera(text: str, move: str, share: float, rng: random.Random) -> str:
    """Replace the camera phrase at the end of a caption by one of `CAMERA_FORMS`, or join it with "while"."""
    before, comma, said = text.rpartition(", ")
    if said not in CAMERA_READINGS[move]:
        return text
    if rng.random() < share:
        said = rng.choice(CAMERA_FORMS[move])
    if said.startswith("the camera ") and rng.random() < 2 * share:
        comma = " while "
    return f"{before}{comma}{said}"


def world_words() -> list[str]:
    """Return all words of captions and of readable prompts, sorted; "medium-sized" counts as two words."""
    tables = (SHAPE_WORDS, SIZE_WORDS, EVENT_PHRASES, PLACE_PHRASES, CAMERA_READINGS, BACKGROUND_PHRASES, EVENT_FORMS)
    phrases = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    phrases += [*COLOUR_SYNONYMS, *COLOUR_SYNONYMS.values(), *JOINERS]
    phrases += ["a an the", "rolls slides rolling sliding", "from the left", "from the right"]
    phrases += COLOURS
    text = " ".join(re.sub(r"\{\w+\}", "", phrase) for phrase in phrases)
    return sorted(set(_WORD.findall(text.lower())))
