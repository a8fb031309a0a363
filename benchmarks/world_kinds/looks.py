"""Shape and colour: outlines of none of the three solids, and colours that are none of the eight."""

from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.world_kinds import paint
from benchmarks.world_kinds.paint import Outline
from benchmarks.world_kinds.stage import RGB, Take, disc, gone, other, scaled, shaped, shot
from benchmarks.world_kinds.table import Made, kind
from postgen.world.spec import COLOURS, SHAPES

_CALM = ("moves left", "moves right", "stays", "moves closer")


def _shape(rng: random.Random, shape: str, size: str = "large") -> Take:
    """Return a take of one body of the given shape and size."""
    clip = shot(rng, rng.choice(_CALM))
    clip.spec = replace(clip.spec, bodies=(replace(clip.spec.bodies[0], shape=shape, size=size),))
    return clip.edit(0, lambda _, b: shaped(replace(b, size=size), shape))


def _painted(rng: random.Random, shape: str, outline: Outline, grow: float = 1.0, flat: bool | None = None) -> Made:
    """Return the prompt of a body, and a clip in which a painted outline moves in place of the body."""
    clip = _shape(rng, shape)
    places, rgb = [disc(frame[0]) for frame in clip.frames], COLOURS[clip.frames[0][0].colour]
    flat = rng.random() < 0.4 if flat is None else flat
    pictures = clip.edit(0, lambda _, b: gone(b)).shoot().clone()
    for f, (x, y, r) in enumerate(places):
        pictures[f] = paint.paint(pictures[f], outline, x, y, r * grow, rgb, flat)
    return clip.prompt, pictures


@kind("looks", right=True, count=6)
def painted_ball(rng: random.Random) -> Made:
    """A disc with the shading and the shadow of a ball."""
    return _painted(rng, "ball", paint.circle, flat=False)


@kind("looks", right=False)
def triangle_for_ball(rng: random.Random) -> Made:
    """A triangle in place of a ball."""
    return _painted(rng, "ball", paint.polygon(3, rng.uniform(0, 6)))


@kind("looks", right=False)
def square_for_ball(rng: random.Random) -> Made:
    """A square in place of a ball."""
    return _painted(rng, "ball", paint.polygon(4, rng.uniform(0, 6)))


@kind("looks", right=False)
def pentagon_for_ball(rng: random.Random) -> Made:
    """A pentagon in place of a ball."""
    return _painted(rng, "ball", paint.polygon(5, rng.uniform(0, 6)), 1.1)


@kind("looks", right=False)
def hexagon_for_ball(rng: random.Random) -> Made:
    """A hexagon in place of a ball."""
    return _painted(rng, "ball", paint.polygon(6, rng.uniform(0, 6)), 1.3)


@kind("looks", right=False)
def ring_for_ball(rng: random.Random) -> Made:
    """A ring in place of a ball."""
    return _painted(rng, "ball", paint.ring(rng.uniform(0.4, 0.65)))


@kind("looks", right=False, count=4)
def star_for_ball(rng: random.Random) -> Made:
    """A star in place of a ball."""
    return _painted(rng, "ball", paint.star(rng.choice((4, 5, 6, 8)), rng.uniform(0.4, 0.65), rng.uniform(0, 6)))


@kind("looks", right=False)
def egg_for_ball(rng: random.Random) -> Made:
    """An egg in place of a ball."""
    return _painted(rng, "ball", paint.egg(rng.uniform(1.3, 1.5), rng.uniform(0.15, 0.3)), flat=False)


@kind("looks", right=False)
def ellipse_for_ball(rng: random.Random) -> Made:
    """An ellipse in place of a ball."""
    long = rng.uniform(1.3, 1.5)
    return _painted(rng, "ball", paint.ellipse(long, 1 / long, rng.uniform(0, 3)))


@kind("looks", right=False)
def half_disc_for_ball(rng: random.Random) -> Made:
    """Half a disc in place of a ball."""
    return _painted(rng, "ball", paint.half_disc(rng.uniform(0, 6)))


@kind("looks", right=False)
def flat_ellipse_for_cylinder(rng: random.Random) -> Made:
    """A flat ellipse in place of a cylinder."""
    return _painted(rng, "cylinder", paint.ellipse(1.35, rng.uniform(0.55, 0.75)))


@kind("looks", right=False)
def tall_ellipse_for_cylinder(rng: random.Random) -> Made:
    """A tall ellipse in place of a cylinder."""
    return _painted(rng, "cylinder", paint.ellipse(0.72, rng.uniform(1.2, 1.4)))


@kind("looks", right=False)
def disc_for_cube(rng: random.Random) -> Made:
    """A disc in place of a cube."""
    return _painted(rng, "cube", paint.circle)


@kind("looks", right=False)
def cone_for_cylinder(rng: random.Random) -> Made:
    """A triangle on its base in place of a cylinder or a cube."""
    return _painted(rng, rng.choice(("cube", "cylinder")), paint.triangle_up)


@kind("looks", right=False)
def cross_for_cube(rng: random.Random) -> Made:
    """A plus sign in place of a cube."""
    return _painted(rng, "cube", paint.cross(rng.uniform(0.25, 0.4)))


@kind("looks", right=False)
def star_for_cube(rng: random.Random) -> Made:
    """A star in place of a cube or a cylinder."""
    return _painted(rng, rng.choice(("cube", "cylinder")), paint.star(5, 0.5, rng.uniform(0, 6)))


@kind("looks", right=False, count=6)
def another_shape(rng: random.Random) -> Made:
    """The body has another one of the three shapes."""
    clip = shot(rng, rng.choice(_CALM), rng.choice((1, 2)))
    shape = other(rng, SHAPES, clip.frames[0][0].shape)
    return clip.prompt, clip.edit(0, lambda _, b: shaped(b, shape)).shoot()


@kind("looks", right=False, count=6)
def another_colour(rng: random.Random) -> Made:
    """The body has another one of the eight colours."""
    clip = shot(rng, rng.choice(_CALM), rng.choice((1, 2)))
    names = list(COLOURS)
    own = names.index(clip.frames[0][0].colour)
    colour = names[(own + rng.choice((1, 7, rng.randrange(2, 7)))) % 8]
    if colour in {b.colour for b in clip.frames[0]}:
        colour = other(rng, names, *(b.colour for b in clip.frames[0]))
    return clip.prompt, clip.edit(0, lambda _, b: replace(b, colour=colour)).shoot()


#: Colours that a person does not call by the name of the key, although their hue is similar to that colour.
_OFF: dict[str, tuple[RGB, ...]] = {
    "red": ((0.42, 0.1, 0.08), (0.95, 0.62, 0.58), (0.3, 0.05, 0.05)),
    "orange": ((0.42, 0.23, 0.06), (0.5, 0.3, 0.15), (0.92, 0.74, 0.55)),
    "yellow": ((0.42, 0.4, 0.08), (0.35, 0.34, 0.05), (0.92, 0.88, 0.68)),
    "green": ((0.05, 0.22, 0.07), (0.62, 0.8, 0.62), (0.3, 0.36, 0.3)),
    "cyan": ((0.05, 0.3, 0.32), (0.7, 0.88, 0.88), (0.35, 0.5, 0.5)),
    "blue": ((0.04, 0.06, 0.18), (0.6, 0.66, 0.9), (0.3, 0.33, 0.45)),
    "purple": ((0.18, 0.06, 0.25), (0.74, 0.64, 0.84), (0.4, 0.34, 0.45)),
    "pink": ((0.4, 0.1, 0.26), (0.5, 0.4, 0.45), (0.45, 0.06, 0.3)),
}


@kind("looks", right=False, count=16)
def off_the_palette(rng: random.Random) -> Made:
    """Brown for orange, olive for yellow, near-black for blue, and pale or dull colours."""
    clip = shot(rng, rng.choice(_CALM))
    rgb = rng.choice(_OFF[clip.frames[0][0].colour])
    return clip.prompt, clip.edit(0, lambda _, b: replace(b, rgb=rgb)).shoot()


@kind("looks", right=False)
def grey_for_colour(rng: random.Random) -> Made:
    """A grey, black or white body in place of a coloured one."""
    clip, level = shot(rng, rng.choice(_CALM)), rng.choice((0.05, 0.3, 0.95))
    return clip.prompt, clip.edit(0, lambda _, b: replace(b, rgb=(level, level, level))).shoot()


@kind("looks", right=True, count=6)
def shade_of_its_name(rng: random.Random) -> Made:
    """The colour differs slightly, and a person still gives it the same name."""
    clip = shot(rng, rng.choice(_CALM))
    rgb = COLOURS[clip.frames[0][0].colour]
    grey, dim = rng.uniform(0, 0.12), rng.uniform(0.9, 1.0)
    new = tuple(min(1.0, dim * ((1 - grey) * c + grey * 0.5) + rng.uniform(-0.03, 0.03)) for c in rgb)
    return clip.prompt, clip.edit(0, lambda _, b: replace(b, rgb=new)).shoot()


@kind("harsh", right=True, count=6)
def saturated_ground(rng: random.Random) -> Made:
    """A ground with a saturated colour that differs from that of the body."""
    clip = shot(rng, rng.choice((*_CALM, "falls")), 1)
    grounds = {"red": (0.6, 0.3, 0.25), "green": (0.3, 0.55, 0.28), "blue": (0.3, 0.38, 0.62)}
    grounds["orange"] = (0.7, 0.5, 0.3)
    clip.ground = grounds[other(rng, list(grounds), clip.frames[0][0].colour, "red")]
    return clip.prompt, clip.shoot()


@kind("harsh", right=True, count=4)
def green_ground(rng: random.Random) -> Made:
    """A green ground, like a meadow."""
    clip = shot(rng, rng.choice(_CALM), 1)
    if clip.frames[0][0].colour in ("green", "yellow", "cyan"):
        clip.spec = replace(clip.spec, bodies=(replace(clip.spec.bodies[0], colour="red"),))
        clip.edit(0, lambda _, b: replace(b, colour="red"))
    clip.ground = rng.choice(((0.32, 0.55, 0.25), (0.4, 0.6, 0.35), (0.36, 0.5, 0.3)))
    return clip.prompt, clip.shoot()


@kind("harsh", right=True, count=4)
def very_large(rng: random.Random) -> Made:
    """A body that is more than half as wide as the picture."""
    clip = shot(rng, rng.choice(("stays", "moves left", "moves right")))
    factor = rng.uniform(0.5, 0.62) / 2 / disc(clip.frames[8][0])[2]
    middle = clip.frames[8][0].position[0]
    clip.edit(0, lambda _, b: scaled(b, factor))
    clip.edit(0, lambda _, b: replace(b, position=((b.position[0] - middle) * 0.55, 0.4, b.position[2])))
    return clip.prompt, clip.shoot()


@kind("harsh", right=True, count=4)
def very_small(rng: random.Random) -> Made:
    """A body of 8 to 10 px."""
    clip = shot(rng, rng.choice(("stays", "moves left", "moves right", "falls")))
    factor = rng.uniform(4.0, 5.0) / 96 / disc(clip.frames[8][0])[2]
    return clip.prompt, clip.edit(0, lambda _, b: scaled(b, factor)).shoot()


@kind("harsh", right=True, count=4)
def behind_its_own_colour(rng: random.Random) -> Made:
    """A body passes behind a body of its own colour."""
    clip = shot(rng, "passes behind", 2)
    one, two = clip.spec.bodies
    if one.shape == two.shape:
        shape = other(rng, SHAPES, one.shape)
        clip.edit(0, lambda _, b: shaped(b, shape))
        one = replace(one, shape=shape)
    clip.spec = replace(clip.spec, bodies=(replace(one, colour=two.colour), two))
    return clip.prompt, clip.edit(0, lambda _, b: replace(b, colour=two.colour)).shoot()


@kind("harsh", right=True)
def two_of_one_colour(rng: random.Random) -> Made:
    """Two bodies of one colour and different shapes."""
    for _ in range(50):
        clip = shot(rng, rng.choice(_CALM), 2)
        one, two = clip.spec.bodies
        if one.shape != two.shape:
            break
    clip.spec = replace(clip.spec, bodies=(one, replace(two, colour=one.colour)))
    return clip.prompt, clip.edit(1, lambda _, b: replace(b, colour=one.colour)).shoot()


@kind("harsh", right=True)
def soft_and_noisy(rng: random.Random) -> Made:
    """A clip with the blur and noise of a small autoencoder."""
    from benchmarks.world_corruptions import softened

    clip = shot(rng, None, None)
    return clip.prompt, softened(clip.shoot(), rng.randrange(10**6))


@kind("harsh", right=True)
def another_exposure(rng: random.Random) -> Made:
    """A clip that is slightly darker, lighter or tinted."""
    clip = shot(rng, rng.choice(_CALM), rng.choice((1, 2)))
    gamma, tint = rng.uniform(0.8, 1.25), [rng.uniform(0.95, 1.05) for _ in range(3)]
    pictures = clip.shoot() ** gamma
    return clip.prompt, (pictures * pictures.new_tensor(tint).reshape(3, 1, 1)).clamp(0, 1)
