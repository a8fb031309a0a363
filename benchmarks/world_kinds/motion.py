"""Order and direction: which body moves, when, in which direction, and in which frames."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from benchmarks.world_kinds.stage import Puppet, Take, at, disc, moved, scaled, scene, shot, take
from benchmarks.world_kinds.table import Made, kind
from postgen import world
from postgen.world.spec import EVENTS

_MOVES = ("moves left", "moves right", "moves closer", "moves away")
_SIDE = ("moves left", "moves right")
_TURNED = {"left": "right", "right": "left"}


def turned(prompt: str) -> str:
    """Return the prompt with left and right exchanged."""
    return re.sub(r"\b(left|right)\b", lambda found: _TURNED[found[1]], prompt)


def _still(rng: random.Random, event: str) -> Take:
    """Return a take of a body at rest in the middle of its path, with the prompt of the motion."""
    clip = shot(rng, event)
    middle = clip.frames[8][0].position
    return clip.edit(0, lambda _, b: replace(b, position=middle))


@kind("motion", right=True, count=14)
def true_clip(rng: random.Random) -> Made:
    """True clips of the world, with several sizes and lengths."""
    size, frames = rng.choice(((96, 17), (64, 17), (128, 17), (192, 17), (96, 33), (96, 60), (64, 9), (96, 9)))
    event = rng.choice(world.eligible_events(frames, 2))
    clip = take(scene(rng, event, None, frames), frames, size)
    return clip.prompt, clip.shoot()


@kind("motion", right=True, count=3)
def short_clip(rng: random.Random) -> Made:
    """A true clip of five frames."""
    clip = take(scene(rng, rng.choice(("stays", *_SIDE)), 1, 5), 5, 96)
    return clip.prompt, clip.shoot()


@kind("motion", right=True)
def still_picture(rng: random.Random) -> Made:
    """One repeated frame of a body that stays."""
    clip = shot(rng, "stays", 1, rng.choice((64, 96, 128)))
    return clip.prompt, clip.shoot()[:1].expand(17, -1, -1, -1)


@kind("motion", right=False)
def still_under_a_move(rng: random.Random) -> Made:
    """One repeated frame of a body that should move."""
    clip = shot(rng, rng.choice(EVENTS[:4]))
    return clip.prompt, clip.shoot()[:1].expand(17, -1, -1, -1)


@kind("motion", right=False, count=6)
def jumps_once(rng: random.Random) -> Made:
    """The body stands, jumps to another place between two frames, and stands again."""
    event = rng.choice(_SIDE)
    clip, when, far = _still(rng, event), rng.randrange(4, 13), rng.uniform(0.35, 0.9)
    sign = -1.0 if event == "moves left" else 1.0
    clip.edit(0, lambda f, b: moved(b, dx=sign * far * (0.5 if f >= when else -0.5)))
    return clip.prompt, clip.shoot()


@kind("motion", right=False)
def jumps_closer(rng: random.Random) -> Made:
    """The body stands, jumps in depth between two frames, and stands again."""
    event = rng.choice(("moves closer", "moves away"))
    clip, when = _still(rng, event), rng.randrange(4, 13)
    sign = -1.0 if event == "moves closer" else 1.0
    clip.edit(0, lambda f, b: moved(b, dy=sign * (0.6 if f >= when else -0.6)))
    return clip.prompt, clip.shoot()


@kind("motion", right=False)
def mirrored(rng: random.Random) -> Made:
    """The motion goes to the other side."""
    clip = shot(rng, rng.choice(_SIDE))
    return clip.prompt, clip.shoot().flip(-1)


@kind("motion", right=True)
def mirrored_with_words(rng: random.Random) -> Made:
    """The clip is mirrored, and left and right are exchanged in the prompt."""
    clip = shot(rng, rng.choice((*_SIDE, "collides", "passes behind", "falls")), None)
    return turned(clip.prompt), clip.shoot().flip(-1)


@kind("motion", right=False)
def backwards(rng: random.Random) -> Made:
    """The frames are in reverse order."""
    clip = shot(rng, rng.choice((*_MOVES, "falls", "collides")), None)
    return clip.prompt, clip.shoot().flip(0)


@kind("motion", right=True)
def backwards_with_words(rng: random.Random) -> Made:
    """The frames and the direction in the prompt are reversed."""
    clip = shot(rng, rng.choice(_MOVES))
    words = {"left": "right", "right": "left", "closer": "away", "away": "closer"}
    return " ".join(words.get(w, w) for w in clip.prompt.split()), clip.shoot().flip(0)


@kind("motion", right=False)
def there_and_back(rng: random.Random) -> Made:
    """The body goes half of its path and returns."""
    return _reordered(rng, [f if f <= 8 else 16 - f for f in range(17)])


def _reordered(rng: random.Random, order: list[int]) -> Made:
    """Return a clip of a motion to one side with its frames in the given order."""
    clip = shot(rng, rng.choice(_SIDE))
    return clip.prompt, clip.shoot()[order]


@kind("motion", right=False)
def shuffled_frames(rng: random.Random) -> Made:
    """The frames are in random order."""
    return _reordered(rng, rng.sample(range(17), 17))


@kind("motion", right=False)
def swapped_blocks(rng: random.Random) -> Made:
    """Two parts of the motion are exchanged."""
    cut = rng.randrange(5, 12)
    return _reordered(rng, [*range(cut, 17), *range(cut)])


@kind("motion", right=True)
def held_frames(rng: random.Random) -> Made:
    """Every second frame is shown twice, as at half the frame rate."""
    return _reordered(rng, [f // 2 * 2 for f in range(17)])


@kind("motion", right=True)
def eased(rng: random.Random) -> Made:
    """The motion starts and ends slowly."""
    clip = shot(rng, rng.choice(_MOVES))
    first, last = clip.frames[0][0].position, clip.frames[-1][0].position

    def place(f: int, b: Puppet) -> Puppet:
        part = (t := f / 16) * t * (3 - 2 * t)
        return replace(b, position=tuple(p + part * (q - p) for p, q in zip(first, last, strict=True)))

    return clip.prompt, clip.edit(0, place).shoot()


@kind("motion", right=False)
def drifts_instead_of_staying(rng: random.Random) -> Made:
    """The body should stay, but moves by about its width."""
    clip = shot(rng, "stays")
    far, axis = rng.choice((-1, 1)) * rng.uniform(0.8, 1.3), rng.random()
    clip.edit(0, lambda f, b: moved(b, dx=far * f / 16 * (axis > 0.4), dy=1.6 * far * f / 16 * (axis <= 0.4)))
    return clip.prompt, clip.shoot()


@kind("motion", right=False)
def trembles(rng: random.Random) -> Made:
    """The body should stay, but shakes."""
    clip, far = shot(rng, "stays"), rng.uniform(0.15, 0.3)
    steps = [(rng.uniform(-far, far), rng.uniform(-far, far)) for _ in range(17)]
    clip.edit(0, lambda f, b: moved(b, dx=steps[f][0], dy=steps[f][1]))
    return clip.prompt, clip.shoot()


@kind("motion", right=False)
def shaky_way(rng: random.Random) -> Made:
    """The body moves in the right direction, but shakes by more than one step."""
    clip = shot(rng, rng.choice(_SIDE))
    steps = [rng.uniform(-0.45, 0.45) for _ in range(17)]
    return clip.prompt, clip.edit(0, lambda f, b: moved(b, dx=steps[f])).shoot()


@kind("motion", right=False)
def leaps_on_its_way(rng: random.Random) -> Made:
    """The body leaps in the middle of its path."""
    clip = shot(rng, rng.choice(_SIDE))
    when, far = rng.randrange(5, 12), rng.uniform(0.9, 1.4) * (-1) ** rng.randrange(2)
    x = clip.frames[8][0].position[0]
    clip.edit(0, lambda f, b: at(b, x=x + 0.5 * (b.position[0] - x) + (far / 2 if f >= when else -far / 2)))
    return clip.prompt, clip.shoot()


@kind("motion", right=False, count=6)
def another_event(rng: random.Random) -> Made:
    """The body does something else than the prompt says."""
    shown, asked = rng.sample(("moves left", "moves right", "moves closer", "moves away", "falls", "bounces"), 2)
    spec = scene(rng, shown, 1)
    clip = take(spec)
    named = replace(spec, bodies=(replace(spec.bodies[0], event=asked),))
    return world.simple_caption(named), clip.shoot()


@kind("motion", right=False)
def closer_without_growth(rng: random.Random) -> Made:
    """The body should come closer or move away, and keeps its size in the picture."""
    clip = shot(rng, rng.choice(("moves closer", "moves away")))
    first = clip.frames[8][0]
    size = disc(first)[2]
    return clip.prompt, clip.edit(0, lambda _, b: scaled(b, size / disc(b)[2])).shoot()


@kind("motion", right=False)
def frozen_half(rng: random.Random) -> Made:
    """One of two bodies stands, but should move."""
    for _ in range(50):
        clip = shot(rng, rng.choice(_SIDE), 2)
        if clip.spec.bodies[1].event in _MOVES:
            break
    start = clip.frames[0][1].position
    return clip.prompt, clip.edit(1, lambda _, b: replace(b, position=start)).shoot()
