"""Repainted scenes are judged like scenes of the world, and scenes in the old colours are not taken for them."""

import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.world.check import check_batch

PALETTE = world.Palette()


@pytest.fixture(scope="module")
def scenes():
    specs = [PALETTE.sample(seed) for seed in range(6)]
    return specs, world.render(specs, num_frames=17, size=96).rgb_BF3HW


def test_the_checker_judges_a_repainted_clip_like_the_clip_itself(scenes):
    specs, clips = scenes
    # Colours of 8 bits, as a video file keeps them.
    stored = (PALETTE.paint(clips) * 255).round() / 255
    found, expected = check_batch(PALETTE.unpaint(stored), specs), check_batch(clips, specs)
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=0.03)
    assert min(each.score for each in expected) > 0.8


def test_old_colours_are_wrong_in_the_new_world(scenes):
    specs, clips = scenes
    assert all(report.score < 0.5 for report in check_batch(PALETTE.unpaint(clips), specs))


def test_grey_stays_and_the_inverse_restores(scenes):
    _, clips = scenes
    grey = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4)
    torch.testing.assert_close(PALETTE.paint(grey), grey)
    torch.testing.assert_close(PALETTE.unpaint(PALETTE.paint(clips)), clips, atol=0.05, rtol=0)


def test_captions_have_the_new_names():
    assert PALETTE.rename("a green ball passes a yellow cube") == "a emerald ball passes a lime cube"
    assert PALETTE.rename("evergreen") == "evergreen"


def test_scenes_have_only_the_colours_of_the_palette():
    for seed in range(20):
        spec = PALETTE.sample(seed, num_bodies=1 + seed % 2)
        assert len(spec.bodies) == 1 + seed % 2
        assert {body.colour for body in spec.bodies} <= {"yellow", "green"}
        assert spec == PALETTE.sample(seed, num_bodies=1 + seed % 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"names": {}}, "must map colours of the world"),
        ({"names": {"lime": "green"}}, "must map colours of the world"),
        ({"turn": 300.0}, "degrees"),
        ({"strength": 0.0}, "above 0"),
    ],
)
def test_bad_palettes(settings, said):
    with pytest.raises(UserError, match=said):
        world.Palette(**settings)


def test_too_many_bodies():
    with pytest.raises(UserError, match="allows 1 to 2"):
        PALETTE.sample(0, num_bodies=3)
