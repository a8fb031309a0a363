"""Gravity, contact and occlusion: events that look nearly right."""

from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.world_kinds.stage import Take, at, moved, scene, shot, take
from benchmarks.world_kinds.table import Made, kind


@kind("physics", right=True)
def true_fall(rng: random.Random) -> Made:
    """A true fall, after which the body lies on the ground."""
    clip = shot(rng, "falls", rng.choice((1, 2)))
    return clip.prompt, clip.shoot()


@kind("physics", right=True)
def true_collision(rng: random.Random) -> Made:
    """A true collision."""
    clip = shot(rng, "collides", 2)
    return clip.prompt, clip.shoot()


@kind("physics", right=True)
def true_passing(rng: random.Random) -> Made:
    """A body passes behind another one and comes out."""
    clip = shot(rng, "passes behind", 2)
    return clip.prompt, clip.shoot()


@kind("physics", right=True)
def true_bounce(rng: random.Random) -> Made:
    """A true bounce on the ground."""
    clip = shot(rng, "bounces", rng.choice((1, 2)))
    return clip.prompt, clip.shoot()


def _high(rng: random.Random, event: str) -> Take:
    for _ in range(40):
        clip = shot(rng, event)
        if clip.frames[0][0].position[2] - clip.frames[0][0].half_height > 1.25:
            break
    return clip


@kind("physics", right=False, count=6)
def stops_in_mid_air(rng: random.Random) -> Made:
    """The fall ends above the ground."""
    clip = _high(rng, "falls")
    low = clip.frames[0][0].half_height + rng.uniform(0.5, 0.8)
    return clip.prompt, clip.edit(0, lambda _, b: at(b, z=max(b.position[2], low))).shoot()


@kind("physics", right=False)
def hangs_in_the_air(rng: random.Random) -> Made:
    """The body should fall, but hangs in the air."""
    clip = _high(rng, "falls")
    height = clip.frames[0][0].position[2]
    return clip.prompt, clip.edit(0, lambda _, b: at(b, z=height)).shoot()


@kind("physics", right=False)
def slides_instead_of_falling(rng: random.Random) -> Made:
    """The body should fall, but slides along the floor towards the viewer."""
    clip = shot(rng, "falls")
    clip.edit(0, lambda f, b: at(b, y=1.6 - 2.6 * min(1.0, f / 12) ** 2, z=b.half_height))
    return clip.prompt, clip.shoot()


@kind("physics", right=False)
def slides_after_landing(rng: random.Random) -> Made:
    """The body falls and then slides away."""
    clip = shot(rng, "falls")
    landed = next(f for f, frame in enumerate(clip.frames) if frame[0].position[2] <= frame[0].half_height + 1e-3)
    sign = -1 if clip.frames[0][0].position[0] > 0 else 1
    clip.edit(0, lambda f, b: moved(b, dx=sign * 1.9 * max(0, f - landed) / max(1, 16 - landed)))
    return clip.prompt, clip.shoot()


@kind("physics", right=False)
def rises(rng: random.Random) -> Made:
    """A fall played backwards."""
    clip = _high(rng, "falls")
    return clip.prompt, clip.shoot().flip(0)


@kind("physics", right=False)
def bounces_on_nothing(rng: random.Random) -> Made:
    """The body bounces above the ground."""
    clip = shot(rng, "bounces")
    lift = rng.uniform(0.6, 0.8)
    return clip.prompt, clip.edit(0, lambda _, b: moved(b, dz=lift - 0.3 * (b.position[2] - b.half_height))).shoot()


@kind("physics", right=False)
def only_rises_and_sinks(rng: random.Random) -> Made:
    """The body should bounce, but moves up slowly once and does not touch the ground again."""
    clip = shot(rng, "bounces")
    top = clip.frames[0][0].position[2]
    clip.edit(0, lambda f, b: at(b, z=b.half_height + (top - b.half_height) * f / 16))
    return clip.prompt, clip.shoot()


def _collision(rng: random.Random) -> tuple[Take, int, float]:
    """Return a collision, the frame at which the second body starts to move, and the first one's side (-1: left)."""
    clip = take(scene(rng, "collides", 2))
    start = clip.frames[0][1].position[0]
    when = next(f for f, frame in enumerate(clip.frames) if abs(frame[1].position[0] - start) > 1e-3)
    return clip, when, 1.0 if start > clip.frames[0][0].position[0] else -1.0


@kind("physics", right=False, count=6)
def hits_without_contact(rng: random.Random) -> Made:
    """The second body starts to move before the first one reaches it, so a gap is left."""
    clip, _, sign = _collision(rng)
    gap = rng.uniform(0.4, 0.65)
    return clip.prompt, clip.edit(0, lambda _, b: moved(b, dx=-sign * gap)).shoot()


@kind("physics", right=False)
def hit_moves_late(rng: random.Random) -> Made:
    """The second body starts to move five to seven frames after the contact."""
    clip, _, _ = _collision(rng)
    late = rng.randrange(5, 8)
    places = [frame[1].position for frame in clip.frames]
    return clip.prompt, clip.edit(1, lambda f, b: replace(b, position=places[max(0, f - late)])).shoot()


@kind("physics", right=False)
def hit_moves_early(rng: random.Random) -> Made:
    """The second body starts to move four to five frames before the contact."""
    clip, _, _ = _collision(rng)
    early = rng.randrange(4, 6)
    places = [frame[1].position for frame in clip.frames]
    return clip.prompt, clip.edit(1, lambda f, b: replace(b, position=places[min(16, f + early)])).shoot()


@kind("physics", right=False)
def runs_through(rng: random.Random) -> Made:
    """The first body moves on through the second one, which stays or also starts to move."""
    clip, _, _ = _collision(rng)
    x0, x1 = clip.frames[0][0].position[0], clip.frames[1][0].position[0]
    clip.edit(0, lambda f, b: at(b, x=x0 + (x1 - x0) * f))
    stands = rng.random() < 0.5
    place = clip.frames[0][1].position
    return clip.prompt, clip.edit(1, lambda f, b: replace(b, position=place) if stands else b).shoot()


@kind("physics", right=False)
def hit_body_stays(rng: random.Random) -> Made:
    """The first body reaches the second one, but neither moves after that, so there is no collision."""
    clip, when, _ = _collision(rng)
    place, last = clip.frames[0][1].position, clip.frames[when - 1][0].position
    clip.edit(1, lambda _, b: replace(b, position=place))
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, position=last) if f >= when else b).shoot()


@kind("physics", right=False)
def both_stand(rng: random.Random) -> Made:
    """The bodies should collide, but nothing moves."""
    clip, _, _ = _collision(rng)
    return clip.prompt, clip.shoot()[:1].expand(17, -1, -1, -1)


@kind("physics", right=False)
def passes_in_front(rng: random.Random) -> Made:
    """The body passes in front of the other one instead of behind it."""
    clip = shot(rng, "passes behind", 2)
    front = clip.frames[0][1]
    return clip.prompt, clip.edit(0, lambda _, b: at(b, y=front.position[1] - front.radius - b.radius - 0.1)).shoot()


@kind("physics", right=False)
def passes_through(rng: random.Random) -> Made:
    """The body moves through the body behind which it should pass."""
    clip = shot(rng, "passes behind", 2)
    return clip.prompt, clip.edit(0, lambda _, b: at(b, y=clip.frames[0][1].position[1])).shoot()


@kind("physics", right=False)
def stays_behind(rng: random.Random) -> Made:
    """The body goes behind the other one and does not come out."""
    clip = shot(rng, "passes behind", 2)
    middle = clip.frames[8][0].position
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, position=middle) if f > 8 else b).shoot()


@kind("physics", right=False)
def turns_round_behind(rng: random.Random) -> Made:
    """The body goes behind the other one and comes out on the same side."""
    clip = shot(rng, "passes behind", 2)
    places = [frame[0].position for frame in clip.frames]
    return clip.prompt, clip.edit(0, lambda f, b: replace(b, position=places[f if f <= 8 else 16 - f])).shoot()


@kind("physics", right=False)
def movers_run_through_each_other(rng: random.Random) -> Made:
    """Two bodies move towards each other on one line and through each other."""
    for _ in range(60):
        clip = shot(rng, "moves left", 2)
        if clip.spec.bodies[1].event == "moves right":
            break
    y = clip.frames[0][0].position[1]
    clip.edit(0, lambda f, b: at(b, x=1.3 - 2.6 * f / 16))
    return clip.prompt, clip.edit(1, lambda f, b: at(b, x=-1.3 + 2.6 * f / 16, y=y)).shoot()


@kind("physics", right=False)
def floats_along(rng: random.Random) -> Made:
    """The body should roll or slide past, but flies 0.7 m or more above the ground."""
    clip = shot(rng, rng.choice(("moves left", "moves right")))
    lift = rng.uniform(0.7, 1.1)
    return clip.prompt, clip.edit(0, lambda _, b: moved(b, dz=lift)).shoot()
