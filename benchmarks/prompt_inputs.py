"""Prompts of `python -m benchmarks.prompt`: short and vague ones, long ones, and hard ones for the guard."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from postgen import world
from postgen.world.spec import COLOURS, SHAPES, Spec

FIRST_SCENE = 910_000
"""Seed of the first scene; the trainings and the other benchmarks use no seed from here on."""
_SYNONYMS = {"ball": "sphere", "cube": "box", "cylinder": "pillar"}
Body = tuple[str, str]
"""Colour and shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, the scene that it asks for, and the words that every rewrite must keep."""

    text: str
    kind: str
    """Name of its form."""
    spec: Spec | None
    """The bodies that are asked for; of their events nothing is asked. None for prompts that are not drawn."""
    kept: tuple[str, ...]
    """Words that must appear in every rewrite as whole words, or quoted texts that must appear as they are."""


def _one(make: Callable[[str, str], str]) -> Callable[[Sequence[Body]], str]:
    return lambda bodies: make(*bodies[0])


_ONE: dict[str, Callable[[Sequence[Body]], str]] = {
    "colour and shape": _one(lambda colour, shape: f"{colour} {shape}"),
    "one word each": _one(lambda colour, shape: f"{shape}, {colour}"),
    "video of": _one(lambda colour, shape: f"video of a {colour} {shape}"),
    "synonym": _one(lambda colour, shape: f"{colour} {_SYNONYMS[shape]}"),
}
_TWO: dict[str, Callable[[Sequence[Body]], str]] = {
    "and": lambda bodies: " and ".join(f"{colour} {shape}" for colour, shape in bodies),
    "comma": lambda bodies: ", ".join(f"{colour} {shape}" for colour, shape in bodies),
    "lists": lambda bodies: (
        f"a {bodies[0][1]} and a {bodies[1][1]}, {bodies[0][0]} and {bodies[1][0]}"  # colours after the shapes
    ),
    "articles": lambda bodies: f"a {bodies[0][0]} {bodies[0][1]} and a {bodies[1][0]} {bodies[1][1]}",
}
FORMS = (*_ONE, *_TWO)


def short_prompts(each: int) -> list[Prompt]:
    """Return `each` prompts of every form: no event, no motion, no place, no camera."""
    return [_short(form, number) for number in range(each) for form in FORMS]


def _short(form: str, number: int) -> Prompt:
    rng = random.Random(f"postgen-prompt-benchmark-{form}-{number}")
    count = 1 if form in _ONE else 2
    bodies = list(zip(rng.sample(list(COLOURS), count), rng.sample(list(SHAPES), count), strict=True))
    text = (_ONE | _TWO)[form](bodies)
    return Prompt(text=text, kind=form, spec=_scene(bodies, rng), kept=_words(form, bodies))


def _words(form: str, bodies: Sequence[Body]) -> tuple[str, ...]:
    named = [(colour, _SYNONYMS[shape] if form == "synonym" else shape) for colour, shape in bodies]
    return tuple(word for body in named for word in body)


def _scene(bodies: Sequence[Body], rng: random.Random) -> Spec:
    drawn = world.sample(rng.getrandbits(32), num_bodies=len(bodies), num_frames=17, camera="static")
    wanted = zip(drawn.bodies, bodies, strict=True)
    stay = {"event": "stays", "partner": None}
    return replace(
        drawn,
        bodies=tuple(replace(old, colour=colour, shape=shape, **stay) for old, (colour, shape) in wanted),  # type: ignore[arg-type]
    )


def long_prompts(count: int) -> list[Prompt]:
    """Return full captions of scenes of two bodies, which the exact judge reads completely."""
    found: list[Prompt] = []
    seed = FIRST_SCENE
    while len(found) < count:
        spec = world.sample(seed, num_frames=17, num_bodies=2, camera="static")
        text, seed = world.caption(spec, seed), seed + 1
        reading = world.read(text)
        if reading is not None and all(clause.readable for clause in reading.clauses):
            words = tuple(body.colour for body in spec.bodies)  # a caption may name a shape by a synonym
            found.append(Prompt(text=text, kind="long", spec=spec, kept=words))
    return found


HARD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("three red apples on a table", ("three", "red", "apples", "table")),
    ("3 dogs", ("3", "dogs")),
    ("two cats and five birds", ("two", "cats", "five", "birds")),
    ("a clock at 10:45", ("clock", "10:45")),
    ("route 66 in 1957", ("66", "1957")),
    ("a 1920x1080 screen", ("1920x1080", "screen")),
    ("1,000 paper lanterns", ("1,000", "paper", "lanterns")),
    ('a neon sign that says "OPEN 24/7"', ("neon", "sign", '"OPEN 24/7"')),
    ("a cake with the words 'Happy Birthday, Ana'", ("cake", "'Happy Birthday, Ana'")),
    ("a poster: \u201cNo Exit\u201d", ("poster", "\u201cNo Exit\u201d")),
    ("Marie Curie in a laboratory", ("Marie", "Curie", "laboratory")),
    ("the Eiffel Tower in snow", ("Eiffel", "Tower", "snow")),
    ("Anna gives Ben a book", ("Anna", "Ben", "book")),
    ("iPhone on a desk", ("iPhone", "desk")),
    ("NASA rocket", ("NASA", "rocket")),
    ("O'Brien's pub", ("O'Brien's", "pub")),
    ("a street without cars", ("street", "without", "cars")),
    ("no people, an empty beach", ("no", "people", "empty", "beach")),
    ("a dog that does not bark", ("dog", "not", "bark")),
    ("never-ending stairs", ("never-ending", "stairs")),
    ("a man who isn't smiling", ("man", "isn't", "smiling")),
    ("a blue car left of a red truck", ("blue", "car", "left", "red", "truck")),
    ("black cat, white dog", ("black", "cat", "white", "dog")),
    ("a dark green coat and light green shoes", ("dark", "green", "coat", "light", "shoes")),
    ("an orange", ("orange",)),
    ("an orange orange", ("orange",)),
    ("a girl in pink under a purple umbrella", ("girl", "pink", "purple", "umbrella")),
    ("rose gold ring", ("rose", "gold", "ring")),
    ("the moon", ("moon",)),
    ("x", ("x",)),
    ("e = mc2 on a blackboard", ("mc2", "blackboard")),
    ("$5 bill", ("5", "bill")),
    ("50% off", ("50", "off")),
    ("caf\u00e9 in Z\u00fcrich", ("caf\u00e9", "Z\u00fcrich")),
    ("\u732b", ("\u732b",)),
    ("don't show the face", ("don't", "show", "face")),
    ("neither sun nor moon", ("neither", "sun", "nor", "moon")),
    ("one two three four", ("one", "two", "three", "four")),
    ("The Who on stage", ("Who", "stage")),
    ("May walks in May", ("May", "walks")),
    ("WALL-E", ("WALL-E",)),
    ("a low-angle shot of two red-haired twins", ("low-angle", "two", "red-haired", "twins")),
)
"""Prompts with numbers, quoted texts, names and negations, and the words that every rewrite must keep."""


def hard_prompts() -> list[Prompt]:
    """Return the hard prompts."""
    return [Prompt(text=text, kind="hard", spec=None, kept=kept) for text, kept in HARD]
