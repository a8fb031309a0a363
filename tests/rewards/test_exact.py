"""The exact rewards: about 1 on true clips, below 0.2 on the matching corruption, monotone in graded corruption."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.metrics.world_truth import exact_motion
from postgen.rewards import RewardRunner, get_reward
from postgen.rewards.depth_consistency import block_motion, carried, outlined
from postgen.rewards.parabola import flight_score
from postgen.world.grammar import simple_caption

SIZE, FRAMES = 64, 17
BALL = np.array(json.loads((Path(__file__).parent / "red_ball_track.json").read_text())["track"])


def draw(seeds, **wish):
    specs = [world.sample(seed, split="all", **wish) for seed in seeds]
    return specs, world.render(specs, num_frames=FRAMES, size=SIZE)


@pytest.fixture(scope="module")
def mixed():
    """Scenes of all kinds with their ground truth."""
    return draw(range(6), camera="static")


@pytest.fixture(scope="module")
def flying():
    """Bodies that fall and bounce, alone."""
    specs = [world.sample(k, event=e, num_bodies=1, camera="static") for k in range(3) for e in ("falls", "bounces")]
    return specs, list(world.render(specs, num_frames=FRAMES, size=SIZE, geometry=False).rgb_BF3HW)


def mean(values):
    assert all(value is not None for value in values)
    return sum(values) / len(values)


def falls_steadily(values, slack=0.02):
    return all(b <= a + slack for a, b in pairwise(values)) and values[-1] < 0.2 < values[0]


# world


def test_world_scores_true_clips_and_swapped_ones(mixed):
    specs, frames = mixed
    clips = list(frames.rgb_BF3HW)
    reward = get_reward("world")
    assert mean(reward([""] * 6, clips, spec=specs)) > 0.9
    captions, told = [simple_caption(s) for s in specs[:2]], [s.to_dict() for s in specs[:2]]
    assert reward(captions, clips[:2]) == reward(["", ""], clips[:2], spec=told)
    noise = torch.rand(clips[0].shape, generator=torch.Generator().manual_seed(0))
    assert reward([""], [noise], spec=specs[:1])[0] < 0.2


def test_world_is_monotone_in_noise(mixed):
    specs, frames = mixed
    noise = torch.randn(frames.rgb_BF3HW[:2].shape, generator=torch.Generator().manual_seed(0))
    values = [
        mean(get_reward("world")(["", ""], list((frames.rgb_BF3HW[:2] + s * noise).clamp(0, 1)), spec=specs[:2]))
        for s in (0.0, 0.1, 0.2, 0.5)
    ]
    assert falls_steadily(values)


def test_world_says_none_where_it_cannot_judge(mixed):
    _, frames = mixed
    clip = frames.rgb_BF3HW[0]
    short, small = clip[:4], torch.rand(8, 3, 16, 16)
    prompts = ["a cat on a sofa", "a red ball falls", "a red ball falls"]
    assert get_reward("world")(prompts, [clip, short, small]) == [None, None, None]
    result = RewardRunner(["world"])(["a red ball falls"], [clip])
    assert {"world/count", "world/colour", "world/shape"} <= set(result.metrics)
    with pytest.raises(UserError, match="Not a world spec"):
        get_reward("world")([""], [clip], spec=[{"bodies": 1}])


# parabola


def test_the_tossed_ball_flies_on_a_parabola():
    assert len(BALL) == 60
    assert flight_score(BALL) == 1.0
    t = np.arange(60)
    x, y = np.polyfit(t, BALL[:, 0], 1), np.polyfit(t, BALL[:, 1], 2)
    assert np.abs(BALL[:, 0] - np.polyval(x, t)).mean() < 0.4
    assert np.abs(BALL[:, 1] - np.polyval(y, t)).mean() < 0.25


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: np.random.default_rng(0).permutation(b),
        lambda b: np.stack((b[:, 0], np.linspace(b[0, 1], b[-1, 1], len(b))), 1),
        lambda b: b * [1, -1],
        lambda b: b[:1].repeat(60, 0),
        lambda b: b + np.where(np.arange(60) < 30, 0, 40)[:, None],
        lambda b: np.stack((b[:, 0], np.interp(np.arange(60), [0, 30, 59], [100, 50, 100])), 1),
        lambda b: b[:3],
        lambda b: np.full((60, 2), np.nan),
    ],
    ids=["shuffled", "no gravity", "upside down", "hangs", "leaps", "two straight lines", "too short", "not seen"],
)
def test_other_ways_are_no_flight(spoil):
    assert flight_score(spoil(BALL)) < 0.2


def test_flights_are_graded_by_jitter():
    jitter = np.random.default_rng(0).standard_normal(BALL.shape)
    assert falls_steadily([flight_score(BALL + s * jitter) for s in (0, 1, 2, 4, 8)])


def test_bounces_are_several_flights_and_gaps_are_no_matter():
    t = np.arange(40.0)
    y = -np.abs(np.concatenate([20 - (t[:21] - 10) ** 2 / 5, 10 - (t[21:] - 30) ** 2 / 8.1]))
    track = np.stack((2 * t, y), 1)
    assert flight_score(track) == 1.0
    track[[5, 6, 28]] = np.nan
    assert flight_score(track) == 1.0


def test_bounces_have_one_gravity_and_flights_fill_the_time_in_the_air():
    t = np.arange(41.0)

    def bounces(second):
        """Up and down within 20 frames under one gravity, and again under another."""
        y = -np.where(t <= 20, 100 - (t - 10) ** 2, second * (100 - (t - 30) ** 2))
        return np.stack((2 * t, y), 1)

    assert flight_score(bounces(1.0)) == 1.0
    slight, half, fifth = (flight_score(bounces(second)) for second in (0.9, 0.4, 0.2))
    assert 1.0 == slight > half > fifth
    assert fifth < 0.4
    # Bounces too short to tell, after a flight that is a parabola.
    hops = np.concatenate([bounces(1.0)[:21, 1], np.tile([-40.0, -40.0, 0.0], 14)])
    assert flight_score(np.stack((np.arange(len(hops)), hops), 1)) < 0.4


def test_parabola_on_clips_of_the_world(flying):
    specs, clips = flying
    reward = get_reward("parabola")
    assert mean(reward([""] * 6, clips, spec=specs)) > 0.95
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(1))
    assert mean(reward([""] * 6, [clip[order] for clip in clips], spec=specs)) < 0.2
    assert reward(["a red ball stays still", "a cat"], clips[:2]) == [None, None]
    assert reward(["a cat", ""], clips[:2], track=[torch.tensor(BALL), None]) == [1.0, None]


# permanence


def test_permanence_on_true_clips_and_graded_vanishing(mixed):
    specs, frames = mixed
    reward = get_reward("permanence")
    empty = [world.Spec(bodies=(world.Body(colour="red", shape="ball", position=(0.0, 900.0, 0.6)),))] * 6
    ground = world.render(empty, num_frames=FRAMES, size=SIZE, geometry=False).rgb_BF3HW
    values = []
    for gone in (0, 1, 3, 5, 8):
        clips = frames.rgb_BF3HW.clone()
        clips[:, FRAMES - gone :] = ground[:, FRAMES - gone :]
        values.append(mean(reward([""] * 6, list(clips), spec=specs)))
    assert values[0] > 0.95
    assert falls_steadily(values)
    assert reward([""] * 6, list(ground), spec=specs) == [0.0] * 6


def test_permanence_counts_the_bodies_and_sees_leaps():
    ball = world.Body(colour="red", shape="ball", position=(-1.5, 1.0, 0.6))
    cube = world.Body(colour="blue", shape="cube", position=(1.5, 1.0, 0.51))
    moved = world.Body(colour="red", shape="ball", position=(0.0, 1.0, 0.6))
    both, one = world.Spec(bodies=(ball, cube)), world.Spec(bodies=(moved, cube))
    clips = world.render([both, one], num_frames=8, size=SIZE, geometry=False).rgb_BF3HW
    alone = world.render([world.Spec(bodies=(ball,))], num_frames=8, size=SIZE, geometry=False).rgb_BF3HW[0]
    leap = torch.cat((clips[0, :4], clips[1, 4:]))
    assert get_reward("permanence")([""] * 3, [clips[0], alone, leap], spec=[both] * 3) == [1.0, 0.5, 0.0]


def test_permanence_allows_a_body_to_pass_behind():
    spec = world.sample(5, event="passes behind", camera="static")
    clip = world.render([spec], num_frames=FRAMES, size=96, geometry=False).rgb_BF3HW[0]
    assert get_reward("permanence")([""], [clip], spec=[spec]) == [1.0]


# depth


def depth_scores(frames, depth, flow=True):
    columns = {"flow": list(frames.flow_BF2HW)} if flow else {}
    return get_reward("depth_consistency")([""] * 6, list(frames.rgb_BF3HW), depth=list(depth), **columns)


def test_true_depth_belongs_to_its_clip(mixed):
    _, frames = mixed
    scores = depth_scores(frames, frames.depth_BFHW)
    assert mean(scores) > 0.95
    assert min(scores) > 0.8
    assert depth_scores(frames, 7 * frames.depth_BFHW) == pytest.approx(scores)  # the unit does not matter
    assert depth_scores(frames, frames.depth_BFHW, flow=False)[0] > 0.9


def test_the_depth_of_another_clip_does_not(mixed):
    _, frames = mixed
    assert mean(depth_scores(frames, frames.depth_BFHW.roll(1, 0))) < 0.2
    assert mean(depth_scores(frames, torch.full_like(frames.depth_BFHW, 3.0))) == 0.0


def test_depth_is_graded(mixed):
    _, frames = mixed
    rng = torch.Generator().manual_seed(0)
    flicker = torch.randn(6, FRAMES, 1, 1, generator=rng)
    noise = torch.randn(frames.depth_BFHW.shape, generator=rng)
    assert falls_steadily(
        [mean(depth_scores(frames, frames.depth_BFHW * (s * flicker).exp())) for s in (0, 0.03, 0.1, 0.3)]
    )
    assert falls_steadily(
        [mean(depth_scores(frames, frames.depth_BFHW * (s * noise).exp())) for s in (0, 0.02, 0.05, 0.2)]
    )
    pairs = list(zip(frames.rgb_BF3HW, frames.depth_BFHW, strict=True))
    assert falls_steadily([mean([outlined(c, d.roll(s, -1)) for c, d in pairs]) for s in (0, 2, 3, 6)])


def test_sky_and_unknown_depth(mixed):
    _, frames = mixed
    depth = frames.depth_BFHW.clone()
    assert depth.isinf().any()
    depth[:, :, :10, :10] = torch.nan
    assert mean(depth_scores(frames, depth)) > 0.95
    still = torch.zeros(FRAMES - 1, 2, SIZE, SIZE)
    assert carried(torch.full((FRAMES, SIZE, SIZE), torch.nan), still) == 0.0


def test_depth_of_another_size_is_an_error(mixed):
    _, frames = mixed
    clip, depth = frames.rgb_BF3HW[0], frames.depth_BFHW[0]
    reward = get_reward("depth_consistency")
    with pytest.raises(ValueError, match="depth must be"):
        reward([""], [clip], depth=[depth[:-1]])
    with pytest.raises(ValueError, match="flow must be"):
        reward([""], [clip], depth=[depth], flow=[torch.zeros(3, 2, SIZE, SIZE)])
    assert reward([""], [clip[:1]], depth=[depth[:1]]) == [None]
    with pytest.raises(UserError, match="needs the column 'depth'"):
        RewardRunner(["depth_consistency"])([""], [clip])


def test_block_motion_finds_a_shift():
    picture = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    clip = torch.cat((picture, picture.roll((2, -3), (2, 3))))
    motion = block_motion(clip)[0, :, 8:-8, 8:-8]
    assert (motion[0] == -3).float().mean() > 0.98
    assert (motion[1] == 2).float().mean() > 0.98


# motion of the exact clip


def test_motion_of_true_slow_fast_and_frozen_clips(mixed):
    specs, frames = mixed
    reward, logged = get_reward("world_motion"), {}
    clips, columns = list(frames.rgb_BF3HW), {"spec": list(specs)}
    moving = [row for row, value in enumerate(exact_motion(specs, FRAMES, SIZE)) if value > 1e-3]
    assert len(moving) > 2

    def scores(changed):
        runner = RewardRunner([reward], reward_error="raise")
        found = runner([""] * len(changed), changed, must_score=False, **columns)
        logged.update(found.metrics)
        return found.values[moving, 0]

    assert scores(clips).tolist() == [1.0] * len(moving)
    assert logged["world_motion/log_ratio"] == pytest.approx(0, abs=1e-4)
    # Contrast scales this measure of motion, so a known factor can be tested in both directions.
    for factor, expected in ((1.1, 1.0), (2.0, 1 - (math.log(2) - 0.1) / 0.7), (0.5, 1 - (math.log(2) - 0.1) / 0.7)):
        assert scores([clip * factor for clip in clips]).tolist() == pytest.approx([expected] * len(moving), abs=1e-3)
        assert logged["world_motion/log_ratio"] == pytest.approx(math.log(factor), abs=1e-3)
    assert scores([clip[:1].expand_as(clip) for clip in clips]).tolist() == [0.0] * len(moving)
    result = RewardRunner([reward])([""], [clips[0][..., :-1, :]], must_score=False, spec=[specs[0]])
    assert "it is not square" in result.reasons["world_motion"][0]


# all of them


@pytest.mark.parametrize("name", ["world", "world_motion", "permanence", "parabola", "depth_consistency"])
def test_a_batch_equals_single_calls(name, mixed):
    specs, frames = mixed
    clips = [*frames.rgb_BF3HW, frames.rgb_BF3HW[0, :9], frames.rgb_BF3HW[1, :9]]
    columns = {
        "spec": [*specs, *specs[:2]],
        "depth": [*frames.depth_BFHW, frames.depth_BFHW[0, :9], frames.depth_BFHW[1, :9]],
        "flow": [*frames.flow_BF2HW, frames.flow_BF2HW[0, :8], frames.flow_BF2HW[1, :8]],
    }
    runner = RewardRunner([name])
    together = runner([""] * 8, clips, must_score=False, **columns).values
    alone = [
        runner([""], [clips[k]], must_score=False, **{c: [v[k]] for c, v in columns.items()}).values for k in range(8)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0, equal_nan=True)
