"""Read prompts as scenes: the bodies, events and camera move of a sentence, and the words that are not understood."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

from .plan import Wish, arrange
from .reading import Clause, Reading
from .spec import COLOURS, PAIR_EVENTS, Spec
from .words import (
    BACKGROUND_PHRASES,
    CAMERA_READINGS,
    COLOUR_SYNONYMS,
    EVENT_PHRASES,
    KNOWN_WORDS,
    NEGATIONS,
    NUMBERS,
    PLACE_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
)

_COLOUR = {**{name: name for name in COLOURS}, **COLOUR_SYNONYMS}
_SHAPE = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
_SIZE = {word: size for size, words in SIZE_WORDS.items() for word in words}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_NOUN = re.compile(rf"(?:\b({_any(NUMBERS)})\s+)?(?:\b({_any(_SIZE)})\s+)?\b({_any(_COLOUR)})\s+({_any(_SHAPE)})s?\b")
_REST = re.compile(r"\b(does|do) not move\b(?! (left|right|closer|away|to|toward))")
_GOES = "to the|moves?|rolls?|slides?|goes|heads?|travels?|moving|rolling|sliding"
#: Patterns of the verbs, tried before the phrases. The order matters: a text about two bodies may name a direction
#: too.
_LOOSE: tuple[tuple[str, str], ...] = (
    ("passes behind", r"\bbehind\b"),
    ("collides", r"\b(hit|hits|hitting|collid\w+|bump\w*|crash\w*|knock\w*)\b|\binto (an? |the )?\{other\}"),
    ("bounces", r"\b(bounc\w+|jump\w*)\b"),
    ("falls", r"\b(fall\w*|drop\w*|lands?)\b"),
    ("moves closer", r"\b(closer|nearer|approach\w*|towards? the (camera|viewer)|forward)\b"),
    ("moves away", r"\b(away|distance|reced\w*|back(ward)?s?)\b"),
    (
        "moves left",
        rf"\b(leftwards?|from right to left|({_GOES}) left)\b",
    ),
    (
        "moves right",
        rf"\b(rightwards?|from left to right|({_GOES}) right)\b",
    ),
    ("stays", r"\b(stays?|stands?|still|rests?|resting|remains?|not move|in place|motionless)\b"),
)


def parse(prompt: str) -> Spec | None:
    """Read a prompt as a scene with a fixed layout, or return None when the prompt names no body of the world.

    A body is written as `[number] [size] colour shape`. The words after a body, up to the next body that is not its
    partner, describe its event. A body without a known verb stays. The function also returns None when the bodies
    cannot be laid out together, for example when there are more than three.

    Args:
        prompt: any text.

    >>> parse("A red ball rolls to the left").bodies[0].event
    'moves left'
    >>> parse("a cat on a sofa") is None
    True
    """
    reading = read(prompt)
    return None if reading is None else reading.scene


def read(prompt: str) -> Reading | None:
    """Read a prompt as `parse` does, and report for each clause whether all of it is understood.

    Sizes, floors, negations, camera moves next to body moves, and words that the world does not know are not
    understood.

    Args:
        prompt: any text.

    Returns:
        The reading, or None where `parse` returns None.

    >>> [clause.why for clause in read("a red ball moves left and a cat sleeps").clauses]
    ['', 'unknown: cat, sleeps']
    """
    text = " ".join(prompt.lower().replace("n't", " not").split())
    camera = _phrase_in(text, CAMERA_READINGS) or "static"
    plain = _without(_without(text, CAMERA_READINGS), BACKGROUND_PHRASES)
    nouns = list(_NOUN.finditer(plain))
    wishes = _wishes(plain, nouns) if nouns else []
    if not wishes or len(wishes) > 3:
        return None
    both = camera != "static" and any(w.event != "stays" for w in wishes)
    rng = random.Random(f"postgen-parse-{plain}")
    for frames in (17,) * 12 + (33,) * 4:
        scene = arrange(wishes, rng, num_frames=frames, camera="static" if both else camera)
        if scene is not None:
            headings = tuple(w.heading if w.partner is not None else None for w in wishes)
            return Reading(scene, _clauses(text, both), tuple(w.place for w in wishes), headings)
    return None


def _clauses(text: str, both: bool) -> tuple[Clause, ...]:
    """Split a prompt into clauses, each with the reason why it is not understood; `both`: camera and a body move."""
    said = sorted((p for phrases in CAMERA_READINGS.values() for p in phrases), key=len, reverse=True)
    filmed = [p for p in said if p in text]
    for phrase in filmed:
        text = text.replace(phrase, "{camera}")
    found = []
    for part in re.split(r"[,;.]| and | while ", text):
        if part.strip():
            moves = both and "{camera}" in part
            whole = part.strip().replace("{camera}", filmed[0] if filmed else "")
            found.append(Clause(whole, "the camera and a body move" if moves else _unread(part)))
    return tuple(found)


def _unread(part: str) -> str:
    if _phrase_in(part, BACKGROUND_PHRASES):
        return "the floor is not judged"
    rest = _REST.sub(" ", part.replace("{camera}", " "))
    words = re.findall(r"[a-z0-9'-]+", rest)
    if denied := [w for w in words if w in NEGATIONS]:
        return f"negation: {', '.join(denied)}"
    if sizes := [w for w in words if w in _SIZE]:
        return f"size: {', '.join(sizes)}"
    words = re.findall(r"[a-z0-9'-]+", _NOUN.sub(" ", rest))
    unknown = [w for w in words if w not in KNOWN_WORDS]
    return f"unknown: {', '.join(unknown)}" if unknown else ""


def _wishes(text: str, nouns: list[re.Match[str]]) -> list[Wish]:
    wishes: list[Wish] = []
    taken: dict[int, int] = {}
    for index, noun in enumerate(nouns):
        end = nouns[index + 1].start() if index + 1 < len(nouns) else len(text)
        tail = text[noun.end() : end]
        event, partner = "stays", None
        if index not in taken:  # the partner of another body has no event of its own
            event = _event(tail + ("{other}" if _expects_other(tail) and index + 1 < len(nouns) else ""))
            if event in ("collides", "passes behind"):
                if index + 1 < len(nouns):
                    partner = index + 1
                    taken[partner] = len(wishes)
                    tail += text[nouns[partner].end() :].split(" and ")[0]
                else:
                    event = "moves left" if "left" in tail else "moves right"
        number, size, colour, shape = noun.groups()
        wish = Wish(
            colour=_COLOUR[colour],
            shape=_SHAPE[shape],
            event=event,
            size=_SIZE.get(size or ""),
            place=_phrase_in(tail, PLACE_PHRASES) if event in ("stays", "falls", "bounces") else None,
            heading=_heading(tail) if partner is not None else None,
        )
        if index in taken:
            wishes[taken[index]] = replace(wishes[taken[index]], partner=len(wishes))
        wishes += [wish] * NUMBERS.get(number or "a", 1)
    # Without its partner, a body with an event of two bodies only stays.
    return [w if w.partner is not None or w.event not in PAIR_EVENTS else replace(w, event="stays") for w in wishes]


def _expects_other(tail: str) -> bool:
    """Return whether a text ends in "into", "with", "behind" or "hit(s)" and at most an article: a partner follows."""
    return re.search(r"(into|with|behind|hits?)\s*(an?|the)?\s*$", tail) is not None


def _heading(tail: str) -> str | None:
    if "from the left" in tail or "to the right" in tail:
        return "right"
    return "left" if "from the right" in tail or "to the left" in tail else None


def _event(tail: str) -> str:
    tail = _without(tail, PLACE_PHRASES)
    for event, pattern in _LOOSE:
        if re.search(pattern, tail):
            return event
    for event, phrases in EVENT_PHRASES.items():
        if any(p in tail for p in phrases if "{" not in p):
            return event
    return "stays"


def _phrase_in(text: str, table: dict[str, tuple[str, ...]]) -> str | None:
    hits = [(len(phrase), name) for name, phrases in table.items() for phrase in phrases if phrase in text]
    return max(hits)[1] if hits else None


def _without(text: str, table: dict[str, tuple[str, ...]]) -> str:
    """Remove the phrases of a table from a text: "the camera backs off" must not move a body."""
    for phrase in sorted((p for phrases in table.values() for p in phrases), key=len, reverse=True):
        text = text.replace(phrase, "")
    return text
