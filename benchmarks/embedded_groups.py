"""What the embedded model is asked for: groups of prompts, each with the scene that the judge looks for.

Scenes have seeds below the training seeds. Prompts are the plainest wording of a scene, but for the groups of words
and of cameras. Clip i of a group has seed `first_seed + i`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.embedded_sampling import Defaults
from postgen import world
from postgen.errors import UserError
from postgen.world import Reading, Spec
from postgen.world.scenes import FIRST_TRAINING_SEED
from postgen.world.spec import CAMERAS, COLOURS, PAIR_EVENTS, SHAPES
from postgen.world.wording import EVENT_FORMS
from postgen.world.words import (
    CAMERA_READINGS,
    COLOUR_SYNONYMS,
    EVENT_PHRASES,
    PLACE_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
)

#: Clips of one prompt in the group that measures diversity.
SEEDS_A_PROMPT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Prompts, and what each should show; lists of one length."""

    name: str
    prompts: list[str]
    asked: list[Spec | Reading]
    seeds: list[int]
    size: int
    frames: int
    #: The model before the measured one makes these.
    old: bool = False
    #: True clips to measure beside the generated ones.
    truth: list[Spec] | None = None
    #: Whether the first frame of `truth` is given.
    image: bool = False
    #: What each prompt is counted under beside the whole: its words, its camera move, the number of its scene.
    labels: list[tuple[str, ...]] = field(default_factory=list)

    def part(self, rows: slice) -> tuple[list[Spec | Reading], list[Spec] | None]:
        """What is asked of some rows, and their true scenes."""
        return self.asked[rows], None if self.truth is None else self.truth[rows]


def _scenes(count: int, first: int, **how: Any) -> list[Spec]:
    return [world.sample(first + i, **{"camera": "static", **how}) for i in range(count)]


def _group(name: str, first: int, scenes: list[Spec], size: int, frames: int, **more: Any) -> Group:
    return Group(
        name=name,
        prompts=[world.simple_caption(spec) for spec in scenes],
        asked=list(scenes),
        seeds=[first + i for i in range(len(scenes))],
        size=size,
        frames=frames,
        **more,
    )


def _plain(
    name: str,
    bodies: int,
    *,
    size: int | None = None,
    frames: int | None = None,
    truth: bool = False,
    image: bool = False,
    **how: Any,
) -> Callable[[int, int, Defaults], Group]:
    """A group of scenes of so many bodies; size and frames are the model's where none are given."""

    def build(count: int, first: int, model: Defaults) -> Group:
        length = frames or model.frames
        scenes = _scenes(count, first, num_bodies=bodies, num_frames=length, **how)
        seen = scenes if truth or image else None
        return _group(name, first, scenes, size or model.size, length, truth=seen, image=image)

    return build


def _camera(count: int, first: int, model: Defaults) -> Group:
    """One body at rest, filmed by each of the moves in turn, said in each of its ways in turn, sentences also joined
    by "while"."""
    moves = CAMERAS[1:]
    scenes, prompts, labels = [], [], []
    for i in range(count):
        move = moves[i % len(moves)]
        spec = world.sample(first + i, num_bodies=1, camera=move, num_frames=model.frames)
        phrases = CAMERA_READINGS[move]
        still = world.simple_caption(replace(spec, camera="static"))
        turn, number = divmod(i // len(moves), len(phrases))
        joined = " while " if turn % 2 and phrases[number].startswith("the camera ") else ", "
        prompts.append(f"{still}{joined}{phrases[number]}")
        scenes.append(spec)
        labels.append((move,))
    group = _group("camera", first, scenes, model.size, model.frames, truth=scenes, labels=labels)
    return replace(group, prompts=prompts)


def _seeds(count: int, first: int, model: Defaults) -> Group:
    """Few prompts of one body, many seeds each; true are other scenes of the same prompts, as training draws them."""
    each = min(SEEDS_A_PROMPT, max(2, count // 2))
    scenes, truth, labels = [], [], []
    for number, spec in enumerate(_scenes(max(1, count // each), first, num_bodies=1, num_frames=model.frames)):
        body = spec.bodies[0]
        wish = world.Wish(colour=body.colour, shape=body.shape, event=body.event)
        rng = random.Random(f"postgen-embedded-seeds-{first}-{number}")
        for _ in range(each):
            scene = None
            while scene is None:
                scene = world.arrange([wish], rng, num_frames=model.frames)
            scenes.append(spec)
            truth.append(scene)
            labels.append((str(number),))
    return _group("seeds", first, scenes, model.size, model.frames, truth=truth, labels=labels)


def verb_phrases(pairs: bool) -> list[tuple[str, str]]:
    """Event and wording of every verb that prompts are read with, those of two bodies or the others, {roll} open."""
    return [
        (event, phrase)
        for event, phrases in EVENT_PHRASES.items()
        if (event in PAIR_EVENTS) == pairs
        for phrase in (*phrases, *EVENT_FORMS[event])
    ]


def _noun(rng: random.Random, colour: str, number: int, sizes: bool) -> tuple[str, str, tuple[str, ...]]:
    """Text of a body, its shape, and its words; the other words for shapes take turns with `number`."""
    shape_words = [word for shape in SHAPES for word in SHAPE_WORDS[shape][1:]]
    shape_word = shape_words[number % len(shape_words)]
    shape = next(name for name, words in SHAPE_WORDS.items() if shape_word in words)
    words = (colour, shape_word)
    if sizes and rng.random() < 0.25:
        words = (rng.choice([word for said in SIZE_WORDS.values() for word in said]), *words)
    text = " ".join(words)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}", shape, words


def _say(phrase: str, shape: str, other: str = "") -> str:
    ball = shape == "ball"
    return (
        phrase.replace("{rolling}", "rolling" if ball else "sliding")
        .replace("{roll}", "rolls" if ball else "slides")
        .replace("{other}", other)
    )


def _words(name: str, pairs: bool) -> Callable[[int, int, Defaults], Group]:
    """Every verb in turn, with colours and shapes said by synonyms in turn, sometimes a size or a place."""

    def build(count: int, first: int, model: Defaults) -> Group:
        phrases = verb_phrases(pairs)
        rng = random.Random(f"postgen-{name}-{first}")
        prompts, asked, labels = [], [], []
        for i in range(max(1, round(count / len(phrases))) * len(phrases)):
            event, phrase = phrases[i % len(phrases)]
            text, words, want = _prompt(rng, i, event, phrase, pairs)
            prompts.append(text)
            asked.append(_reading(text, want))
            labels.append((_say(phrase, "ball", "..."), *words))
        seeds = [first + i for i in range(len(prompts))]
        return Group(
            name=name,
            prompts=prompts,
            asked=asked,
            seeds=seeds,
            size=model.size,
            frames=model.frames,
            labels=labels,
        )

    return build


def _prompt(
    rng: random.Random, i: int, event: str, phrase: str, pairs: bool
) -> tuple[str, tuple[str, ...], list[tuple[str, str, str]]]:
    """A prompt, its words to count, and what `world.read` must read in it: colour, shape, event of each body."""
    colours = list(COLOUR_SYNONYMS)
    colour = colours[(i + i // len(colours)) % len(colours)]
    text, shape, words = _noun(rng, colour, i, sizes=not pairs)
    want = [(COLOUR_SYNONYMS[colour], shape, event)]
    if not pairs:
        text += f" {_say(phrase, shape)}"
        if event in ("stays", "falls", "bounces") and not any(place in text for place in ("left", "right")):
            place = rng.choice([said for all_said in PLACE_PHRASES.values() for said in all_said])
            text, words = f"{text} {place}", (*words, place)
        return text, words, want
    other_colour = rng.choice([name for name in COLOURS if name != COLOUR_SYNONYMS[colour]])
    other, other_shape, other_words = _noun(rng, other_colour, i + 2, sizes=False)
    want.append((other_colour, other_shape, "stays"))
    return f"{text} {_say(phrase, shape, other)}", (*words, *other_words[-1:]), want


def _reading(text: str, want: list[tuple[str, str, str]]) -> Reading:
    """What the judge is asked; sizes, which it does not judge, do not fail a clip here.

    Raises:
        RuntimeError: the prompt does not say what was meant.
    """
    reading = world.read(text)
    found = [] if reading is None else [(b.colour, b.shape, b.event) for b in reading.scene.bodies]
    if reading is None or found != want:
        raise RuntimeError(f"{text!r} was meant as {want} and is read as {found}")
    return replace(reading, clauses=())


BUILDERS: dict[str, Callable[[int, int, Defaults], Group]] = {
    "one": _plain("one", 1, truth=True),
    "two": _plain("two", 2, truth=True),
    "image_one": _plain("image_one", 1, image=True),
    "synonyms": _words("synonyms", pairs=False),
    "camera": _camera,
    "unseen": _plain("unseen", 1, split="held_out"),
    "frames_17": _plain("frames_17", 1, frames=17),
    "frames_49": _plain("frames_49", 1, frames=49),
    "size_96": _plain("size_96", 1, size=96),
    "seeds": _seeds,
    "old_two": _plain("old_two", 2),
    "old_one": _plain("old_one", 1),
    "image_two": _plain("image_two", 2, image=True),
    "synonyms_two": _words("synonyms_two", pairs=True),
    "size_160": _plain("size_160", 1, size=160),
    "size_96_frames_17": _plain("size_96_frames_17", 1, size=96, frames=17),
    "size_96_frames_17_two": _plain("size_96_frames_17_two", 2, size=96, frames=17),
}
"""Name -> group of so many prompts from a first seed on, for a model; those that gates need come first."""


def build(name: str, count: int, first: int, new: Defaults, old: Defaults | None = None) -> Group:
    """A group by its name; those of the model before ("old_...") have that one's size and length.

    Raises:
        UserError: seeds that training may have seen, or a group of a model before that there is not.
    """
    if first < 0 or first + 4 * count >= FIRST_TRAINING_SEED:
        raise UserError(f"first_seed {first} with {count} prompts: seeds from {FIRST_TRAINING_SEED} on are trained.")
    before = name.startswith("old_")
    model = old if before else new
    if model is None:
        raise UserError(f"group {name} needs the model before: give its folder as --old")
    return replace(BUILDERS[name](count, first, model), old=before)
