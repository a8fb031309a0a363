"""Training scenes: shares of numbers of bodies, and of scenes in which two bodies meet."""

from __future__ import annotations

from postgen import world
from postgen.world.scenes import draw_scenes
from postgen.world.spec import PAIR_EVENTS

COUNT = 200


def meeting(scenes):
    return [any(body.event in PAIR_EVENTS for body in scene.spec.bodies) for scene in scenes]


def test_scenes_with_more_bodies_meet_as_often_as_asked():
    few = meeting(draw_scenes(7_000_000, COUNT, 17, bodies=(0.0, 1.0, 0.0)))
    all_of_them = draw_scenes(7_000_000, COUNT, 17, bodies=(0.0, 0.5, 0.5), pair_share=1.0)
    half = meeting(draw_scenes(7_000_000, COUNT, 17, bodies=(0.0, 1.0, 0.0), pair_share=0.5))
    assert all(meeting(all_of_them))
    assert {body.event for scene in all_of_them for body in scene.spec.bodies if body.partner is not None} == set(
        PAIR_EVENTS
    )
    # Half of the scenes, and in the other half the share of `few`, within four standard deviations.
    expected = 0.5 + 0.5 * sum(few) / COUNT
    assert abs(sum(half) / COUNT - expected) < 4 * 0.5 / COUNT**0.5


def test_a_scene_that_cannot_show_a_meeting_is_drawn_all_the_same():
    short = draw_scenes(7_000_000, 20, 9, bodies=(0.0, 1.0, 0.0), pair_share=1.0)
    alone = draw_scenes(7_000_000, 20, 17, bodies=(1.0, 0.0, 0.0), pair_share=1.0)
    assert not any(meeting(short))
    assert not any(meeting(alone))


def test_shares_of_nothing_leave_scenes_as_the_world_draws_them():
    scenes = draw_scenes(7_000_000, 20, 17)
    assert [scene.spec for scene in scenes] == [world.sample(7_000_000 + i, num_frames=17) for i in range(20)]
