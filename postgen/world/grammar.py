"""Captions: sentences that describe what a scene shows, in many wordings."""

from __future__ import annotations

import random

from .spec import PAIR_EVENTS, PLACE_BORDER, Body, Spec
from .words import (
    BACKGROUND_PHRASES,
    CAMERA_PHRASES,
    EVENT_PHRASES,
    JOINERS,
    PLACE_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
)

_PLACED = ("stays", "bounces", "falls")
_CLEAR = 0.25
"""Distance in metres from the border between two places, within which a caption names no place."""


def caption(spec: Spec, seed: int = 0) -> str:
    """Describe a scene in one sentence. Different seeds word the sentence differently.

    The sentence always names the colour, shape and event of every body. It names sizes, places, the camera and the
    floor only sometimes; a camera that moves is always named.

    Args:
        spec: the scene.
        seed: any integer.

    >>> from postgen.world import Body, Spec
    >>> ball = Body(colour="red", shape="ball", event="moves left")
    >>> "red" in caption(Spec(bodies=(ball,)), 3)
    True
    """
    rng = random.Random(f"postgen-caption-{seed}")
    partners = {b.partner for b in spec.bodies if b.partner is not None}
    clauses = [_clause(spec, body, rng) for index, body in enumerate(spec.bodies) if index not in partners]
    rng.shuffle(clauses)
    text = clauses[0]
    for clause in clauses[1:]:
        text += rng.choice(JOINERS) + clause
    if rng.random() < 0.1:
        text += " " + rng.choice(BACKGROUND_PHRASES[spec.background])
    if spec.camera != "static" or rng.random() < 0.08:
        text += ", " + rng.choice(CAMERA_PHRASES[spec.camera])
    return text


def simple_caption(spec: Spec) -> str:
    """Describe a scene in its plainest wording: canonical words, no sizes, no places.

    The prompts of the benchmarks have this form.
    """
    partners = {b.partner for b in spec.bodies if b.partner is not None}
    parts = []
    for index, body in enumerate(spec.bodies):
        if index in partners:
            continue
        other = _plain(spec.bodies[body.partner]) if body.partner is not None else ""
        parts.append(f"{_plain(body)} {_fill(EVENT_PHRASES[body.event][0], body, other)}")
    text = " and ".join(parts)
    return text if spec.camera == "static" else f"{text}, {CAMERA_PHRASES[spec.camera][0]}"


def _plain(body: Body) -> str:
    return f"{_article(body.colour)} {body.colour} {body.shape}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _fill(phrase: str, body: Body, other: str) -> str:
    return phrase.format(roll="rolls" if body.shape == "ball" else "slides", other=other)


def _noun(body: Body, rng: random.Random) -> str:
    words = [body.colour, SHAPE_WORDS[body.shape][0]]
    if rng.random() < 0.12:
        words[1] = rng.choice(SHAPE_WORDS[body.shape])
    if body.size != "medium" and rng.random() < 0.3:
        words.insert(0, rng.choice(SIZE_WORDS[body.size]))
    article = _article(words[0]) if rng.random() < 0.85 else ("the" if rng.random() < 0.5 else "")
    return " ".join(filter(None, (article, *words)))


def _clause(spec: Spec, body: Body, rng: random.Random) -> str:
    noun = _noun(body, rng)
    other = _noun(spec.bodies[body.partner], rng) if body.partner is not None else ""
    phrase = EVENT_PHRASES[body.event][0] if rng.random() < 0.3 else rng.choice(EVENT_PHRASES[body.event])
    text = f"{noun} {_fill(phrase, body, other)}"
    if body.event in PAIR_EVENTS and rng.random() < 0.3:
        text += " from the left" if body.velocity[0] > 0 else " from the right"
    if body.event in _PLACED and spec.camera == "static" and rng.random() < 0.25:
        where = rng.choice(PLACE_PHRASES[body.place])
        if abs(abs(body.position[0]) - PLACE_BORDER) >= _CLEAR:
            text += f" {where}"
    return text
