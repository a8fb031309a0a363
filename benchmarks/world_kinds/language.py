"""Words: numbers, negations, sizes, places, unknown things, and camera moves."""

from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.world_kinds.stage import at, extra, scaled, shot, take
from benchmarks.world_kinds.table import Made, kind
from postgen import world
from postgen.world.spec import CAMERAS, COLOURS, SHAPES, Spec

_CALM = ("moves left", "moves right", "stays")
_DOES = {"moves left": "move left", "moves right": "move right", "stays": "stay still", "bounces": "bounce"}


def _many(rng: random.Random, shown: int, said: str) -> Made:
    clip = shot(rng, rng.choice(_CALM))
    body, event = clip.spec.bodies[0], clip.spec.bodies[0].event
    for _ in range(shown - 1):
        place = extra(rng, clip, colour=body.colour, shape=body.shape, size=body.size).position
        start, first = clip.frames[0][0].position, [frame[0] for frame in clip.frames]
        dx, dy = place[0] - start[0], place[1] - start[1]
        if event != "stays":
            dx, dy = 0.0, 1.5 if start[1] < 0 else -1.5
        shifts = [replace(b, position=(b.position[0] + dx, b.position[1] + dy, b.position[2])) for b in first]
        clip.add(lambda f, shifts=shifts: shifts[f])
    return f"{said} {body.colour} {body.shape}s {_DOES[event]}", clip.shoot()


@kind("language", right=True, count=4)
def two_of_a_kind(rng: random.Random) -> Made:
    """The prompt asks for two equal bodies, and the clip shows two."""
    return _many(rng, 2, rng.choice(("two", "two", "2")))


@kind("language", right=False, count=4)
def two_asked_one_there(rng: random.Random) -> Made:
    """The prompt asks for two or three equal bodies, but the clip shows one."""
    return _many(rng, 1, rng.choice(("two", "three")))


@kind("language", right=False)
def two_asked_three_there(rng: random.Random) -> Made:
    """The prompt asks for two equal bodies, but the clip shows three."""
    clip = shot(rng, "stays")
    body = clip.spec.bodies[0]
    for _ in range(2):
        more = extra(rng, clip, colour=body.colour, shape=body.shape, size="small")
        clip.add(lambda _, more=more: more)
    return f"two {body.colour} {body.shape}s stay still", clip.shoot()


@kind("language", right=False, count=4)
def negated_event(rng: random.Random) -> Made:
    """The body does what the prompt negates."""
    clip = shot(rng, rng.choice(("moves left", "moves right", "bounces", "falls")))
    body = clip.spec.bodies[0]
    verb = {**_DOES, "falls": "fall"}[body.event]
    no = rng.choice(("does not", "doesn't", "never"))
    verb = clip.spec.bodies[0].event if no == "never" else verb
    return f"a {body.colour} {body.shape} {no} {verb}", clip.shoot()


@kind("language", right=False)
def negated_look(rng: random.Random) -> Made:
    """The body has the colour and shape that the prompt negates."""
    clip = shot(rng, rng.choice(_CALM))
    body = clip.spec.bodies[0]
    text = rng.choice(("there is no {c} {s}", "a {s} that is not {c}, no {c} {s} {e}", "without a {c} {s}"))
    return text.format(c=body.colour, s=body.shape, e=body.event), clip.shoot()


@kind("language", right=False, count=5)
def unknown_thing(rng: random.Random) -> Made:
    """The prompt names another thing that the clip does not show."""
    clip = shot(rng, rng.choice(_CALM))
    things = (" and a cat", " and a tall tree", ", a dog runs by", " next to a brown cube", " and a green pyramid")
    return clip.prompt + rng.choice((*things, " in the rain")), clip.shoot()


@kind("language", right=False)
def size_word(rng: random.Random) -> Made:
    """The prompt calls a large body tiny, or a small body large."""
    clip = shot(rng, rng.choice(_CALM))
    say, factor = rng.choice((("tiny", 1.6), ("large", 0.6)))
    clip.edit(0, lambda _, b: scaled(replace(b, size="medium"), factor))
    body = clip.spec.bodies[0]
    return clip.prompt.replace(body.colour, f"{say} {body.colour}", 1), clip.shoot()


def _placed(rng: random.Random, right: bool) -> Made:
    clip, word = shot(rng, rng.choice(("stays", "falls"))), rng.choice(("left", "right"))
    shown = word if right else {"left": "right", "right": "left"}[word]
    x = rng.uniform(1.1, 1.8) * (-1 if shown == "left" else 1)
    clip.edit(0, lambda _, b: at(b, x=x))
    return f"{clip.prompt} on the {word}", clip.shoot()


@kind("language", right=True)
def place_named(rng: random.Random) -> Made:
    """The body is on the side that the prompt names."""
    return _placed(rng, True)


@kind("language", right=False)
def place_missed(rng: random.Random) -> Made:
    """The body is on the other side than the prompt says."""
    return _placed(rng, False)


@kind("language", right=False)
def heading_missed(rng: random.Random) -> Made:
    """The moving body of a collision or a passing comes from the other side than the prompt says."""
    clip = shot(rng, rng.choice(("collides", "passes behind")), 2)
    side = "right" if clip.spec.bodies[0].velocity[0] > 0 else "left"
    return f"{clip.prompt} from the {side}", clip.shoot()


@kind("language", right=False, count=4)
def one_clause_missed(rng: random.Random) -> Made:
    """The clip shows one of two clauses. The body of the other one differs in event, colour or shape."""
    clip = shot(rng, rng.choice(_CALM), 2)
    one, two = clip.spec.bodies
    if two.event in ("collides", "passes behind"):
        two = replace(two, event="stays", partner=None)
    change = rng.choice(("event", "colour", "shape"))
    if change == "event":
        two = replace(two, event="bounces" if two.event != "bounces" else "stays")
    elif change == "colour":
        two = replace(two, colour=next(c for c in COLOURS if c not in (one.colour, two.colour)))
    else:
        two = replace(two, shape=SHAPES[(SHAPES.index(two.shape) + 1) % 3])
    return world.simple_caption(replace(clip.spec, bodies=(one, two))), clip.shoot()


def _filmed(rng: random.Random, camera: str, bodies: int | None = None) -> Spec:
    return world.sample(rng.randrange(10**9), camera=camera, num_bodies=bodies, split="all")


@kind("camera", right=True, count=7)
def camera_as_named(rng: random.Random) -> Made:
    """The camera moves as the prompt says."""
    spec = _filmed(rng, rng.choice(CAMERAS[1:]), rng.choice((1, 2)))
    return world.simple_caption(spec), world.render([spec], geometry=False).rgb_BF3HW[0]


@kind("camera", right=False, count=5)
def camera_does_not_move(rng: random.Random) -> Made:
    """The prompt names a camera move, but the camera is static."""
    spec = _filmed(rng, rng.choice(CAMERAS[1:]), rng.choice((1, 2)))
    return world.simple_caption(spec), take(spec).shoot()


@kind("camera", right=False, count=5)
def camera_goes_the_other_way(rng: random.Random) -> Made:
    """The camera moves in the opposite direction."""
    kind_of = rng.choice(CAMERAS[1:7])
    spec = _filmed(rng, kind_of, rng.choice((1, 2)))
    turn = {"left": "right", "right": "left", "in": "out", "out": "in"}
    kind_of, way = kind_of.split()
    shown = replace(spec, camera=f"{kind_of} {turn[way]}")
    return world.simple_caption(spec), world.render([shown], geometry=False).rgb_BF3HW[0]


@kind("camera", right=False)
def camera_moves_too_little(rng: random.Random) -> Made:
    """The camera moves only an eighth of the usual amount."""
    spec = _filmed(rng, rng.choice(("pan left", "pan right", "dolly in", "dolly out")))
    shown = replace(spec, camera_amount=spec.camera_amount / 8)
    return world.simple_caption(spec), world.render([shown], geometry=False).rgb_BF3HW[0]


@kind("camera", right=False)
def another_camera(rng: random.Random) -> Made:
    """The camera makes another kind of move, for example a dolly instead of a pan."""
    said, shown = rng.choice((("pan left", "dolly in"), ("dolly out", "pan right"), ("dolly in", "orbit left")))
    spec = _filmed(rng, shown)
    return world.simple_caption(replace(spec, camera=said)), world.render([spec], geometry=False).rgb_BF3HW[0]


@kind("camera", right=False)
def body_moves_instead(rng: random.Random) -> Made:
    """The camera should pan, but only the body moves."""
    way, back = rng.choice((("left", "right"), ("right", "left")))
    clip = shot(rng, f"moves {back}")
    text = world.simple_caption(replace(clip.spec, bodies=(replace(clip.spec.bodies[0], event="stays"),)))
    return f"{text}, the camera pans {way}", clip.shoot()


@kind("camera", right=False)
def moves_and_camera(rng: random.Random) -> Made:
    """The body moves as the prompt says. The camera should move too, but is static."""
    clip = shot(rng, rng.choice(("moves left", "moves right")))
    return f"{clip.prompt}, the camera {rng.choice(('pans left', 'moves in', 'orbits right'))}", clip.shoot()


@kind("camera", right=False)
def camera_moves_unasked(rng: random.Random) -> Made:
    """The prompt names no camera move, but the camera moves far."""
    spec = _filmed(rng, rng.choice(("pan left", "pan right", "dolly in", "orbit left")), 1)
    return world.simple_caption(replace(spec, camera="static")), world.render([spec], geometry=False).rgb_BF3HW[0]
