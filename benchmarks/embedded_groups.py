"""Groups of prompts for the benchmark of the embedded model, each prompt with the scene that the judge expects.

The seeds of the scenes are below the training seeds. A prompt is the simplest caption of its scene, except in the
groups that test words ("synonyms") and cameras. Clip i of a group uses seed `first_seed + i`.
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

#: Number of clips (seeds) per prompt in the group that measures diversity.
SEEDS_A_PROMPT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Prompts and what each clip should show. All lists have the same length, except `labels`, which may be empty."""

    name: str
    prompts: list[str]
    asked: list[Spec | Reading]
    seeds: list[int]
    size: int
    frames: int
    #: Whether the previous model generates these clips instead of the measured model.
    old: bool = False
    #: Scenes whose renders (the true clips) are measured too, for comparison with the generated clips.
    truth: list[Spec] | None = None
    #: Whether the model receives the first frame of `truth` (image-to-video).
    image: bool = False
    #: Labels of each prompt for separate counts: its words, its camera move, or the number of its scene.
    labels: list[tuple[str, ...]] = field(default_factory=list)

    def part(self, rows: slice) -> tuple[list[Spec | Reading], list[Spec] | None]:
        """Return what the judge expects in the clips of `rows`, and the true scenes of these rows."""
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
    """Return a builder of a group whose scenes have `bodies` bodies.

    `size` and `frames` default to the values of the model.
    """

    def build(count: int, first: int, model: Defaults) -> Group:
        length = frames or model.frames
        scenes = _scenes(count, first, num_bodies=bodies, num_frames=length, **how)
        seen = scenes if truth or image else None
        return _group(name, first, scenes, size or model.size, length, truth=seen, image=image)

    return build


def _camera(count: int, first: int, model: Defaults) -> Group:
    """Build the group of camera moves: one body at rest in each clip.

    The prompts take every move in turn, and for each move all of its phrases in turn. In every second pass through the
    phrases, the word "while" instead of a comma comes before a phrase that begins with "the camera".
    """
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
    """Build the group that measures diversity: few prompts of one body, with many seeds each.

    The true clips are other scenes with the same prompt, drawn as in training.
    """
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
    """Return (event, phrase) for every verb phrase that the world can read.

    With `pairs`, return the phrases of events with two bodies; otherwise the phrases of events with one body. The
    placeholders of a phrase, such as {roll}, are not filled in.
    """
    return [
        (event, phrase)
        for event, phrases in EVENT_PHRASES.items()
        if (event in PAIR_EVENTS) == pairs
        for phrase in (*phrases, *EVENT_FORMS[event])
    ]


def _noun(rng: random.Random, colour: str, number: int, sizes: bool) -> tuple[str, str, tuple[str, ...]]:
    """Return the text of a body, its shape, and its words. `number` selects the synonym for the shape, in turn."""
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
    """Return a builder of a group that tests words.

    The prompts take every verb phrase in turn, and name colours and shapes by synonyms, also in turn. Some prompts
    also name a size or a place.
    """

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
    """Return prompt number `i`, its words to count, and the (colour, shape, event) of each body it describes."""
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
    """Return the reading of a prompt that the judge receives.

    The reading has no clauses: the judge does not check sizes, and a size in the prompt must not make a clip fail.

    Raises:
        RuntimeError: if `world.read` finds other bodies in the prompt than `want`.
    """
    reading = world.read(text)
    found = [] if reading is None else [(b.colour, b.shape, b.event) for b in reading.scene.bodies]
    if reading is None or found != want:
        raise RuntimeError(f"the prompt {text!r} should describe {want}, but world.read finds {found}")
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
"""Builder of each group by name. Its arguments are the number of prompts, the first seed and the model's defaults.

The groups that the gates need come first.
"""


def build(name: str, count: int, first: int, new: Defaults, old: Defaults | None = None) -> Group:
    """Build the group `name`. Groups of the previous model ("old_...") have the default size and length of that model.

    Raises:
        UserError: if the training data may contain the seeds, or if the group needs the previous model and `old` is
            None.
    """
    if first < 0 or first + 4 * count >= FIRST_TRAINING_SEED:
        raise UserError(
            f"first_seed {first} with {count} prompts: first_seed must be at least 0, and first_seed + 4 * prompts"
            f" must be below {FIRST_TRAINING_SEED}, where the training seeds begin"
        )
    before = name.startswith("old_")
    model = old if before else new
    if model is None:
        raise UserError(f"group {name} needs the previous model: give its folder with --old")
    return replace(BUILDERS[name](count, first, model), old=before)
