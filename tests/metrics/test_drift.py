"""Measures of drift on clips with known drift."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from postgen import UserError, world
from postgen.metrics import drift
from postgen.metrics.colour import appearance, delta_e, lab
from postgen.metrics.drift import TrueClip, measure_drift
from postgen.metrics.world_truth import true_clip
from tests.metrics.planted import FRAMES, GONE, HEIGHT, WIDTH, erased, planted


@pytest.fixture
def true() -> TrueClip:
    return planted()


def test_the_truth_does_not_drift(true: TrueClip) -> None:
    true = replace(true, decoded=true.frames)
    report = measure_drift(true.frames, true, disparity=true.disparity, borders=[10, 20, 30], window=20)
    assert (report.score, report.seam) == (0, 1)
    assert all(row.excess == row.excess_slope == 0 for name, row in report.contrast.items() if "depth" not in name)
    assert report.colour.delta_e.first == report.colour.delta_e.last == report.colour.delta_e.slope == 0
    assert report.colour.wasserstein == report.colour.true_wasserstein
    found = report.permanence
    assert (found.after_absence, found.always, found.after_absence_anywhere, found.always_anywhere) == (1, 1, 1, 1)
    assert (found.wrong_count, found.spurious, found.swapped, found.last) == (0, 0, 0, 1)
    assert found.returns == FRAMES - GONE.stop
    background = report.background
    assert (background.psnr.first, background.psnr.last, background.ceiling_gap) == (100, 100, 0)
    assert background.texel_first == background.texel_last == 100
    assert report.revisit is not None
    assert report.revisit.context.pairs > 0 < report.revisit.memory.pairs
    assert (report.revisit.all.psnr, report.revisit.all.ssim, report.revisit.all.gap_db) == (100, 1, 0)
    assert report.revisit.all.pairs == report.revisit.context.pairs + report.revisit.memory.pairs
    assert (report.motion.total, set(report.motion.parts)) == (1, {1})
    assert report.depth is not None
    assert report.depth.abs_rel.last < 1e-6
    assert (report.depth.delta.first, report.depth.delta.last) == (1, 1)
    assert report.object_depth is not None
    assert report.object_depth.last < 1e-6


def test_the_json_form_holds_all_numbers_and_no_tensor(true: TrueClip) -> None:
    plain = measure_drift(true.frames, replace(true, poses=None, texels=None)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["depth"], plain["revisit"], plain["seam"], plain["background"]["texel_last"]) == (None,) * 4
    assert plain["contrast"]["sharpness"]["contrast"] == abs(plain["contrast"]["sharpness"]["change"])
    assert "present_FJ" not in plain["permanence"]


def test_a_known_shift_of_colour_has_the_known_distance(true: TrueClip) -> None:
    still = true.ids == 0
    grey, tinted = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.6, 0.45, 0.5])
    plain = grey[:, None, None].expand(FRAMES, 3, HEIGHT, WIDTH).clone()
    shifted = plain.clone()
    shifted[20:] = tinted[:, None, None]
    distance = float(delta_e(lab(grey, dim=0), lab(tinted, dim=0), dim=0))
    found = drift.colour_drift(shifted, plain, still)
    assert found.delta_e.first == 0
    assert found.delta_e.last == pytest.approx(distance, rel=1e-5)
    assert found.delta_e.slope > 0
    assert found.wasserstein == pytest.approx((lab(tinted, dim=0) - lab(grey, dim=0)).abs().tolist(), abs=1e-4)
    assert found.true_wasserstein == pytest.approx((0, 0, 0), abs=1e-6)
    whole = drift.colour_drift(tinted[:, None, None].expand_as(plain), plain, still)
    assert whole.delta_e.contrast == pytest.approx(0, abs=1e-5)
    assert whole.delta_e.first == pytest.approx(distance, rel=1e-5)


def test_start_end_and_slope() -> None:
    line = 2 + 0.03 * torch.arange(100.0)
    found = drift.start_end(line)
    assert found.slope == pytest.approx(3, rel=1e-5)
    assert found.change == pytest.approx(0.03 * 85, rel=1e-5) == found.excess
    assert drift.start_end(line.flip(0)).change == pytest.approx(-found.change)
    assert drift.start_end(line, line).excess == drift.start_end(line, line).excess_slope == 0
    line[50] = math.nan
    assert drift.start_end(line).slope == pytest.approx(3, rel=1e-4)
    assert drift.ends(2) == (slice(0, 1), slice(1, 2))
    for frames, share in ((1, 0.15), (10, 0.6), (10, 0)):
        with pytest.raises(UserError, match="share in"):
            drift.ends(frames, share)


def test_a_frozen_clip_is_caught_by_its_motion_alone(true: TrueClip) -> None:
    frozen = true.frames[:1].expand(FRAMES, -1, -1, -1)
    report = measure_drift(frozen, true)
    assert (report.motion.total, report.motion.most) == (0, 0)
    assert report.permanence.always < 1
    assert [report.contrast[name].contrast for name in appearance(frozen)] == [0, 0, 0, 0]
    assert report.revisit is not None
    assert (report.revisit.all.psnr, report.revisit.all.ssim) == (100, 1)


def test_motion_that_dies_out_shows_in_the_parts(true: TrueClip) -> None:
    frames = true.frames.clone()
    frames[27:] = frames[26]
    found = drift.motion_ratio(frames, true.frames, parts=3)
    assert found.parts[:2] == (1, 1)
    assert (found.least, found.most) == (0, 1)
    assert found.total == pytest.approx(
        float((frames.diff(dim=0).abs().mean()) / true.frames.diff(dim=0).abs().mean()), rel=1e-5
    )
    still = true.frames[:1].expand(FRAMES, -1, -1, -1)
    assert math.isnan(drift.motion_ratio(frames, still).total)
    assert math.isnan(drift.motion_ratio(frames, still).least)


def test_a_wrong_scale_of_depth_is_fitted_away_and_a_drifting_one_is_not(true: TrueClip) -> None:
    assert true.disparity is not None
    steady = drift.depth_drift(true.disparity * 3 - 0.2, true.disparity)
    assert steady.abs_rel_F.max() < 1e-5
    assert (steady.scale, steady.shift) == (pytest.approx(1 / 3, rel=1e-4), pytest.approx(0.2 / 3, rel=1e-3))
    scale = torch.ones(FRAMES)
    scale[-6:] = 1.5
    found = drift.depth_drift(true.disparity * scale[:, None, None], true.disparity)
    assert found.abs_rel.first < 1e-6
    assert found.abs_rel.last == pytest.approx(1 - 1 / 1.5, rel=1e-5)
    assert found.abs_rel.slope > 0
    assert (found.delta.first, found.delta.last) == (1, 0)
    near = drift.depth_drift(true.disparity * scale[:, None, None], true.disparity, farthest=5.0)
    assert near.abs_rel.last == pytest.approx(1 - 1 / 1.5, rel=1e-5)
    flat = drift.depth_drift(torch.ones_like(true.disparity), true.disparity)
    assert (flat.scale, flat.shift) == (0, pytest.approx(float(true.disparity[:6].mean()), rel=1e-5))


def test_background_psnr_and_the_ground_put_together(true: TrueClip) -> None:
    still = true.ids == 0
    frames = true.frames.clone()
    frames[-6:] += 0.1
    found = drift.background_psnr(frames, true.frames, still, texels=true.texels, cell=1.0, ceiling=true.frames + 0.01)
    assert (found.psnr.first, found.psnr.last) == (100, pytest.approx(20, abs=1e-4))
    assert found.psnr.change == pytest.approx(-80, abs=1e-4)
    assert (found.texel_first, found.texel_last) == (100, pytest.approx(20, abs=1e-4))
    assert found.ceiling_gap == pytest.approx(20, abs=1e-2)
    noise = 0.1 * (2 * (torch.arange(FRAMES) % 2) - 1).float()
    noisy = true.frames + noise[:, None, None, None]
    found = drift.background_psnr(noisy, true.frames, torch.ones_like(still), texels=torch.zeros_like(frames[:, :2]))
    assert found.psnr.first == pytest.approx(20, abs=1e-3)
    assert found.texel_first > 60, "what reverses from frame to frame is no wrong ground"


def test_revisits_of_a_pose(true: TrueClip) -> None:
    assert true.poses is not None
    still = true.ids == 0
    frames = true.frames.clone()
    frames[25:] += 0.1
    found = drift.revisit_consistency(frames, true.frames, still, true.poses, gap=1, window=10)
    place = true.poses[:, 0].tolist()
    pairs = [(a, b) for a in range(FRAMES) for b in range(a + 1, FRAMES) if place[a] == place[b]]
    near = [(a, b) for a, b in pairs if b - a <= 10]
    assert (found.context.pairs, found.memory.pairs) == (len(near), len(pairs) - len(near))
    for row, kind in ((found.context, near), (found.memory, [p for p in pairs if p not in near])):
        spoilt = sum(a < 25 <= b for a, b in kind) / len(kind)
        assert row.psnr == pytest.approx(100 - 80 * spoilt, abs=1e-2)
        assert row.gap_db == pytest.approx(80 * spoilt, abs=1e-2)
    late = drift.revisit_consistency(frames, true.frames, still, true.poses, gap=20)
    assert late.all.pairs == sum(b - a >= 20 for a, b in pairs) > sum(b - a > 20 for a, b in pairs)
    thinned = drift.revisit_consistency(frames, true.frames, still, true.poses, gap=1, most=7)
    assert (thinned.context.pairs, thinned.memory.pairs, thinned.all.pairs) == (0, 7, 7)
    assert math.isnan(thinned.context.psnr)
    moved = true.frames.clone()
    moved[30:, :, :5] += 0.3
    alike = drift.revisit_consistency(moved, moved, still, true.poses, gap=1)
    assert alike.all.psnr > 99.9, "what changes in truth does not count"


def test_seams(true: TrueClip) -> None:
    frames = true.frames.clone()
    steps = torch.zeros(FRAMES)
    steps[[10, 20, 30]] = 0.05
    plain = 0.3 + 0.01 * torch.arange(FRAMES)[:, None, None, None] * torch.ones(1, 3, 3, 3) / 4
    jumping = plain + steps.cumsum(0)[:, None, None, None]
    assert drift.seam_ratio(jumping, [10, 20, 30]) == pytest.approx((0.05 + 0.0025) / 0.0025, rel=1e-3)
    assert drift.seam_ratio(jumping, [5, 15]) < 1
    assert drift.seam_ratio(jumping, [10, 20, 30], jumping) == 1
    assert drift.seam_ratio(frames, [10, 20, 30], true.frames) == 1


def test_costs_that_grow_and_that_do_not() -> None:
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = drift.flat_cost((5 + 0.1 * noise).tolist())
    assert flat.flat
    assert flat.slope.low < 0 < flat.slope.high
    grows = drift.flat_cost((5 + 0.1 * noise + 0.02 * torch.arange(60.0, dtype=torch.float64)).tolist())
    assert not grows.flat
    assert grows.slope.value == pytest.approx(flat.slope.value + 0.02)
    assert grows.growth.value == pytest.approx(
        grows.slope.value * 59 / float((5 + 0.1 * noise).mean() + 0.59), rel=1e-9
    )
    memory = drift.flat_cost([3e9] * 50)
    assert (memory.slope.low, memory.slope.value, memory.slope.high, memory.flat) == (0, 0, 0, True)
    assert not drift.flat_cost([3e9 + 4096 * i for i in range(50)]).flat
    assert drift.flat_cost([90.0, 40.0, *[5.0] * 30], skip=2).flat
    assert drift.flat_cost([90.0, *[5.0] * 8], block=2).slope.value == 0, "a left-over chunk is one of the first"
    with pytest.raises(UserError, match="7 chunks in blocks"):
        drift.flat_cost([1.0] * 9, skip=2)


def test_noise_that_lasts_does_not_look_like_growth() -> None:
    """For constant costs with equal noise in five chunks, blocks find no trend far more often than single chunks."""
    generator, called = torch.Generator().manual_seed(3), {1: 0, 5: 0}
    for seed in range(30):
        noise = torch.randn(12, generator=generator).repeat_interleave(5)
        for block in called:
            called[block] += drift.flat_cost((10 + noise).tolist(), block=block, seed=seed).flat
    assert called[5] >= 24 > called[1]


def test_two_systems_compared(true: TrueClip) -> None:
    reports = {}
    for name, spoilt in (("good", 2), ("bad", 8)):
        clips = [erased(true, 1, range(40 - spoilt - k, 40)) for k in range(4)]
        reports[name] = [measure_drift(clip, true, borders=[20]).to_dict() for clip in clips]
    found = drift.compare_drift(reports["good"], reports["bad"])
    other = drift.compare_drift(reports["bad"], reports["good"])
    gain, loss = found["permanence.after_absence"], other["permanence.after_absence"]
    assert gain.clips == 4
    assert gain.difference.value == pytest.approx(6 / 16)
    assert gain.difference.low > 0
    assert loss.difference.value == -gain.difference.value
    assert (loss.a, loss.b) == (gain.b, gain.a)
    assert gain.ratio is not None
    assert gain.ratio.value == pytest.approx(gain.a / gain.b)
    assert {"motion.least", "motion.most", "colour.delta_e.slope", "seam"} <= set(found)
    assert "contrast.sharpness.excess_size" in found
    assert "depth.scale" not in found
    assert found["permanence.swapped"].ratio is None
    with pytest.raises(UserError, match="got 4 and 3"):
        drift.compare_drift(reports["good"], reports["bad"][:3])
    # A NaN value is left out together with its clip, like a missing value.
    clips = [{"x": math.nan}, {"x": 1.0}, {"x": 3.0}]
    assert drift.compare_drift(clips, [{"x": 1.0}] * 3)["x"].clips == 2


def test_what_does_not_belong_together_is_refused(true: TrueClip) -> None:
    still, frames = true.ids == 0, true.frames
    broken = frames.clone()
    broken[3, 0, 0, 0] = math.nan
    kinds = drift.detect(frames, true.palette)
    assert true.disparity is not None
    assert true.poses is not None
    disparity, poses = true.disparity, true.poses
    for call, text in (
        (lambda: measure_drift(frames[:9], true), "the true clip has"),
        (lambda: measure_drift(frames, replace(true, disparity=None), disparity=disparity), "needs a true disparity"),
        (lambda: measure_drift(broken, true), "must hold finite numbers"),
        (lambda: drift.colour_drift(frames, frames, true.ids), "background must be bool"),
        (lambda: drift.colour_drift(frames, frames, still[:3]), "give \\(F, 3, H, W\\) for both clips"),
        (lambda: drift.colour_drift(frames, frames, still & False), "found none"),
        (lambda: drift.background_psnr(frames, frames, still, texels=frames), "texels must be"),
        (lambda: drift.revisit_consistency(frames, frames, still, poses[:3]), "3 poses for 40 frames"),
        (lambda: drift.detect(frames, torch.rand(3)), "palette has shape"),
        (lambda: drift.detect(frames, true.palette, others=torch.rand(3)), "others has shape"),
        (lambda: drift.object_permanence(kinds[:3], true.ids), "for both"),
        (lambda: drift.object_permanence(kinds, true.ids, least=0), "least=0"),
        (lambda: drift.depth_drift(disparity[0], disparity), "for both"),
        (lambda: drift.depth_drift(disparity / 0, disparity), "must be finite"),
        (lambda: drift.depth_drift(disparity, disparity * 0), "no pixel at the start"),
        (lambda: drift.motion_ratio(frames, frames, parts=40), "at most one part per pair"),
        (lambda: drift.seam_ratio(frames, []), "some but not all of 1 to 39"),
        (lambda: drift.seam_ratio(frames, [40]), "some but not all of 1 to 39"),
        (lambda: drift.seam_ratio(frames, [4], frames[:9]), "give equal shapes"),
        (lambda: drift.start_end(torch.rand(4), torch.rand(5)), "one value per frame"),
        (lambda: appearance(frames[..., :2]), "at least 3 pixels"),
    ):
        with pytest.raises(UserError, match=text):
            call()


def test_the_truth_of_a_rendered_world_does_not_drift() -> None:
    spec = world.sample_long(1, absence="hidden")
    out = world.render([spec], num_frames=24, size=64)
    true = true_clip(spec, out)
    report = measure_drift(true.frames, true, disparity=2 * out.disparity_BFHW[0] + 1, farthest=25)
    assert report.permanence.always == 1
    assert (report.permanence.wrong_count, report.permanence.spurious, report.permanence.swapped) == (0, 0, 0)
    assert report.depth is not None
    assert report.depth.abs_rel_F.max() < 1e-4
    assert report.object_depth is not None
    assert report.object_depth.last < 0.05
    with pytest.raises(UserError, match="Unknown background 'lava'"):
        world.ground_shades("lava")
    with pytest.raises(UserError, match="need bodies of different colours"):
        true_clip(replace(spec, bodies=spec.bodies[:1] * 2), out)
    with pytest.raises(UserError, match="have no geometry"):
        true_clip(spec, replace(out, ids_BFHW=None))
