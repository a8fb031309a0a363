"""Wrong bodies: too many, too few, not in all frames, or changing over time."""

from __future__ import annotations

import random
from dataclasses import replace

from torch import Tensor

from benchmarks.world_kinds import paint
from benchmarks.world_kinds.stage import Take, disc, extra, gone, other, scaled, shaped, shot
from benchmarks.world_kinds.table import Made, kind
from postgen.world.spec import COLOURS, SHAPES

_CALM = ("moves left", "moves right", "moves closer", "moves away", "stays", "falls", "bounces")


def _any(rng: random.Random, bodies: int | None = 1) -> Take:
    return shot(rng, rng.choice(_CALM), bodies)


def _with_grey(rng: random.Random, low: float, high: float) -> Made:
    clip = _any(rng, rng.choice((1, 2)))
    level = rng.uniform(low, high)
    body = replace(extra(rng, clip, size=rng.choice(("small", "medium"))), rgb=(level, level, level))
    return clip.prompt, clip.add(lambda _: body).shoot()


@kind("bodies", right=False, count=6)
def extra_grey(rng: random.Random) -> Made:
    """An additional grey body."""
    return _with_grey(rng, 0.25, 0.5)


@kind("bodies", right=False)
def extra_light_grey(rng: random.Random) -> Made:
    """An additional body about as light as the ground."""
    return _with_grey(rng, 0.55, 0.7)


@kind("bodies", right=False)
def extra_black(rng: random.Random) -> Made:
    """An additional black body."""
    return _with_grey(rng, 0.02, 0.1)


@kind("bodies", right=False)
def extra_white(rng: random.Random) -> Made:
    """An additional white body."""
    return _with_grey(rng, 0.9, 1.0)


@kind("bodies", right=False)
def extra_dull(rng: random.Random) -> Made:
    """An additional body in brown, olive or another dull colour."""
    clip = _any(rng)
    rgb = rng.choice(((0.4, 0.24, 0.1), (0.4, 0.4, 0.1), (0.35, 0.1, 0.1), (0.15, 0.2, 0.35), (0.6, 0.5, 0.42)))
    body = replace(extra(rng, clip), rgb=rgb)
    return clip.prompt, clip.add(lambda _: body).shoot()


@kind("bodies", right=False)
def extra_coloured(rng: random.Random) -> Made:
    """An additional body in another colour."""
    clip = _any(rng, rng.choice((1, 2)))
    body = extra(rng, clip, shape=rng.choice(SHAPES))
    return clip.prompt, clip.add(lambda _: body).shoot()


@kind("bodies", right=False)
def extra_of_the_same_colour(rng: random.Random) -> Made:
    """An additional body in the colour of the prompt."""
    clip = _any(rng)
    body = extra(rng, clip, colour=clip.frames[0][0].colour, shape=clip.frames[0][0].shape)
    return clip.prompt, clip.add(lambda _: body).shoot()


@kind("bodies", right=False)
def extra_small(rng: random.Random) -> Made:
    """An additional small body, 5 to 7 px wide."""
    clip = _any(rng)
    body = extra(rng, clip)
    body = scaled(body, rng.uniform(2.6, 3.6) / 96 / disc(body)[2])
    return clip.prompt, clip.add(lambda _: body).shoot()


def _sprinkled(rng: random.Random, clip: Take, picture: Tensor, many: int, grey: bool) -> Tensor:
    spots = []
    for _ in range(many):
        body = extra(rng, clip)
        x, y, _ = disc(body)
        level = rng.choice((0.1, 0.3, 0.95))
        spots.append((x, y, rng.uniform(1.6, 2.6) / 96, (level,) * 3 if grey else COLOURS[body.colour]))
    result = picture.clone()
    for f in range(len(result)):
        for x, y, r, rgb in spots:
            result[f] = paint.paint(result[f], paint.circle, x, y, r, rgb, True)
    return result


@kind("bodies", right=False)
def many_small_coloured(rng: random.Random) -> Made:
    """Six to ten coloured dots of 3 to 5 px."""
    clip = _any(rng)
    return clip.prompt, _sprinkled(rng, clip, clip.shoot(), rng.randrange(6, 11), False)


@kind("bodies", right=False)
def many_small_grey(rng: random.Random) -> Made:
    """Six to ten grey dots of 3 to 5 px."""
    clip = _any(rng)
    return clip.prompt, _sprinkled(rng, clip, clip.shoot(), rng.randrange(6, 11), True)


@kind("bodies", right=False)
def extra_in_changing_colours(rng: random.Random) -> Made:
    """An additional body that has another colour in every frame."""
    clip = _any(rng)
    body, names = extra(rng, clip), [c for c in COLOURS if c != clip.frames[0][0].colour]
    return clip.prompt, clip.add(lambda f: replace(body, colour=names[f * 3 % len(names)])).shoot()


def _ghost(rng: random.Random, alpha: float) -> Made:
    clip = _any(rng)
    without = clip.shoot()
    body = extra(rng, clip, size=rng.choice(("small", "medium")))
    return clip.prompt, (1 - alpha) * without + alpha * clip.add(lambda _: body).shoot()


@kind("bodies", right=False, count=6)
def ghost(rng: random.Random) -> Made:
    """An additional body that is 60 to 80 % transparent."""
    return _ghost(rng, rng.uniform(0.2, 0.4))


@kind("bodies", right=False)
def extra_at_the_end(rng: random.Random) -> Made:
    """An additional body that appears in the last frames."""
    clip = _any(rng)
    body, when = extra(rng, clip), rng.randrange(10, 14)
    return clip.prompt, clip.add(lambda f: body if f >= when else gone(body)).shoot()


@kind("bodies", right=False)
def extra_flashes(rng: random.Random) -> Made:
    """An additional body in two or three frames."""
    clip = _any(rng)
    body, when = extra(rng, clip, size="medium"), rng.sample(range(2, 15), rng.choice((2, 3)))
    return clip.prompt, clip.add(lambda f: body if f in when else gone(body)).shoot()


@kind("bodies", right=False)
def extra_flat_patch(rng: random.Random) -> Made:
    """A flat coloured patch with another outline, without a shadow."""
    clip = _any(rng)
    body = extra(rng, clip)
    x, y, r = disc(body)
    outline = rng.choice((paint.star(5, 0.45), paint.polygon(3), paint.ring(0.55), paint.ellipse(1.5, 0.5)))
    pictures = clip.shoot().clone()
    for f in range(len(pictures)):
        pictures[f] = paint.paint(pictures[f], outline, x, y, r, COLOURS[body.colour], True)
    return clip.prompt, pictures


@kind("bodies", right=False)
def one_of_two(rng: random.Random) -> Made:
    """One of two bodies is missing."""
    clip = _any(rng, 2)
    return clip.prompt, clip.edit(rng.randrange(2), lambda _, b: gone(b)).shoot()


@kind("bodies", right=False)
def none_at_all(rng: random.Random) -> Made:
    """There is only the ground."""
    clip = _any(rng)
    return clip.prompt, clip.edit(0, lambda _, b: gone(b)).shoot()


@kind("bodies", right=False, count=6)
def flickers(rng: random.Random) -> Made:
    """The body is missing in three to five frames."""
    clip = _any(rng)
    when = rng.sample(range(1, 16), rng.randrange(3, 6))
    return clip.prompt, clip.edit(0, lambda f, b: gone(b) if f in when else b).shoot()


@kind("bodies", right=False)
def blinks(rng: random.Random) -> Made:
    """The body is missing in one or two frames."""
    clip = _any(rng, rng.choice((1, 2)))
    when = rng.sample(range(3, 14), rng.choice((1, 2)))
    return clip.prompt, clip.edit(0, lambda f, b: gone(b) if f in when else b).shoot()


@kind("bodies", right=False)
def vanishes(rng: random.Random) -> Made:
    """The body is missing in the last third or the first third of the frames."""
    clip, late = _any(rng, rng.choice((1, 2))), rng.random() < 0.5
    cut = rng.randrange(11, 14) if late else rng.randrange(3, 6)
    return clip.prompt, clip.edit(0, lambda f, b: gone(b) if (f >= cut) == late else b).shoot()


@kind("bodies", right=False)
def strobes(rng: random.Random) -> Made:
    """The body is dark in every second or third frame."""
    clip, step, dim = _any(rng), rng.choice((2, 3)), rng.uniform(0.35, 0.6)
    rgb = tuple(dim * c for c in COLOURS[clip.frames[0][0].colour])
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, rgb=rgb) if f % step == 1 else b).shoot()


@kind("bodies", right=False)
def picture_strobes(rng: random.Random) -> Made:
    """The whole picture is darker in every second or third frame."""
    clip, step, dim = _any(rng), rng.choice((2, 3)), rng.uniform(0.55, 0.75)
    pictures = clip.shoot().clone()
    pictures[1::step] *= dim
    return clip.prompt, pictures


@kind("bodies", right=False, count=6)
def size_flickers(rng: random.Random) -> Made:
    """The size of the body jumps by some 20 % up or down from frame to frame."""
    clip, far = _any(rng), rng.uniform(0.18, 0.28)
    factors = [1 + far * rng.choice((-1, 1)) * rng.uniform(0.7, 1) for _ in range(17)]
    return clip.prompt, clip.edit(0, lambda f, b: scaled(b, factors[f])).shoot()


@kind("bodies", right=False)
def size_swells(rng: random.Random) -> Made:
    """A body that should stay or roll past grows or shrinks by half."""
    clip, grow = shot(rng, rng.choice(("stays", "moves left", "moves right"))), rng.choice((0.6, 1.6))
    return clip.prompt, clip.edit(0, lambda f, b: scaled(b, grow ** (f / 16))).shoot()


@kind("bodies", right=False, count=6)
def shape_alternates(rng: random.Random) -> Made:
    """The body has another shape in every second or third frame."""
    clip, step = _any(rng), rng.choice((2, 3))
    shape = other(rng, SHAPES, clip.frames[0][0].shape)
    return clip.prompt, clip.edit(0, lambda f, b: shaped(b, shape) if f % step == 1 else b).shoot()


@kind("bodies", right=False)
def shape_turns(rng: random.Random) -> Made:
    """The body changes its shape at some frame."""
    clip, when = _any(rng), rng.randrange(7, 13)
    shape = other(rng, SHAPES, clip.frames[0][0].shape)
    return clip.prompt, clip.edit(0, lambda f, b: shaped(b, shape) if f >= when else b).shoot()


@kind("bodies", right=False)
def colour_turns(rng: random.Random) -> Made:
    """The body has another colour in the last frames."""
    clip, when = _any(rng), rng.randrange(10, 14)
    colour = other(rng, list(COLOURS), clip.frames[0][0].colour)
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, colour=colour) if f >= when else b).shoot()


@kind("bodies", right=False)
def colour_flickers(rng: random.Random) -> Made:
    """The body has another colour in three or four frames."""
    clip, when = _any(rng), rng.sample(range(17), rng.choice((3, 4)))
    colour = other(rng, list(COLOURS), clip.frames[0][0].colour)
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, colour=colour) if f in when else b).shoot()


@kind("bodies", right=False)
def colours_exchanged(rng: random.Random) -> Made:
    """Two bodies exchange their colours half-way."""
    clip = _any(rng, 2)
    one, two = (b.colour for b in clip.frames[0])
    clip.edit(0, lambda f, b: replace(b, colour=two) if f >= 8 else b)
    return clip.prompt, clip.edit(1, lambda f, b: replace(b, colour=one) if f >= 8 else b).shoot()


@kind("bodies", right=False)
def fades_out(rng: random.Random) -> Made:
    """The body becomes transparent."""
    clip = _any(rng)
    there = clip.shoot()
    without = clip.edit(0, lambda _, b: gone(b)).shoot()
    part = [max(0.0, min(1.0, (15 - f) / 9)) for f in range(17)]
    weight = there.new_tensor(part).reshape(-1, 1, 1, 1)
    return clip.prompt, weight * there + (1 - weight) * without
