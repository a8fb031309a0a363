"""`benchmarks.worldweaver`: its rollouts begin with the given frames, and arms use the memory of their training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.worldweaver import load_arm, main, make_clips, measured, table
from benchmarks.worldweaver_baselines import KINDS, stock_arm, stock_clips
from benchmarks.worldweaver_captions import schedule
from postgen import world
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.training.run_folder import RunLock
from tests.families.test_frame_levels import MAKERS
from tests.worldweaver.training import trained


def test_clips_of_arms(tmp_path: Path) -> None:
    specs = [world.sample_long(seed, num_frames=21) for seed in (1, 2)]
    truth = world.render(specs, num_frames=21, size=16)
    rows = {}
    for name, changes in {"a": {"aux": [], "groups": 1}, "c": {"depth_in_memory": False, "groups": 1}}.items():
        trained(tmp_path / name, max_steps=1, num_frames=21, pool_clips=1, **changes)
        arm = load_arm(name, tmp_path / name / "export", torch.device("cpu"), MAKERS["Wan"](), guidance=2.0)
        seen = []
        predict = arm.model.predict

        def watched(z, levels, condition, guidance, predict=predict, seen=seen):
            seen.append(levels)
            return predict(z, levels, condition, guidance)

        arm.model.predict = watched  # type: ignore[method-assign]
        made = make_clips(arm, specs, truth, given=9)
        assert made.frames.shape == truth.rgb_BF3HW.shape
        with torch.no_grad():
            given = arm.model.encode(truth.rgb_BF3HW[:, :9])
        assert torch.equal(made.latents[:, :4, :3], given)
        assert len(seen) == 3 * 6
        assert {levels.sigma.shape[1:] for levels in seen} == {(4, len(arm.model.modalities))}
        if name == "c":
            assert all((levels.sigma[:, :3, 1] == 1).all() for levels in seen)
            assert made.disparity is not None
        rows[name] = measured(arm, specs, truth, made, 9)
        assert all(len(row["latent_error"]["rgb"]) == 6 for row in rows[name])
        assert max(rows[name][0]["latent_error"]["rgb"][:3]) < 1e-9
    assert "c - a" in table(rows)


def test_a_model_is_told_what_its_oldest_group_shows() -> None:
    """As in training, a caption describes the scene from the oldest group on, but takes effect with the newest."""
    specs = [world.sample_long(seed, num_frames=161) for seed in (3, 4)]
    latents, given, size, groups = 41, 5, 2, 3
    told = schedule("along", specs, range(161), latents, given=given, size=size, groups=groups)
    assert told[0][0] == 0
    assert len(told) > 1
    for start in range(given, latents, size):
        newest = start + (groups - 1) * size
        due = [texts for begin, texts in told if begin <= newest][-1]
        # Latent frame n > 0 begins with video frame 4 n - 3.
        assert due == [world.caption_at(spec, 4 * start - 3) for spec in specs]
    later = schedule("along", specs, range(100, 161), 16, given=given, size=size, groups=1)
    assert later[0][1] == [world.caption_at(spec, 117) for spec in specs]
    first = [world.caption_at(spec, 0) for spec in specs]
    assert schedule("start", specs, range(161), latents, given=given, size=size, groups=groups) == [(0, first)]


def test_the_sliding_window_is_the_stock_model() -> None:
    """Its windows have nine latent frames, known frames at level 0, and predictions of the unchanged model."""
    specs = [world.sample_long(seed, num_frames=49) for seed in (1, 2)]
    truth = world.render(specs, num_frames=49, size=16)
    arm = stock_arm("sliding", torch.device("cpu"), MAKERS["Wan"](), steps=2)
    stock, predict, seen = denoiser_for(MAKERS["Wan"]()), arm.model.predict, []

    def watched(z, levels, condition, guidance):
        found = predict(z, levels, condition, guidance)
        seen.append(levels.rgb[0].tolist())
        assert torch.equal(found, stock.predict(z, levels.rgb, condition, guidance))
        return found

    arm.model.predict = watched  # type: ignore[method-assign]
    clips = {kind: stock_clips(kind, arm, specs, truth, given=17) for kind in KINDS}
    assert len(seen) == 2 * 2 * 2
    assert all(len(levels) == 9 and levels[:5] == [0.0] * 5 and min(levels[5:]) > 0 for levels in seen)
    begun = [made.frames[:, :17] for made in clips.values()]
    assert all(made.frames.shape == truth.rgb_BF3HW.shape for made in clips.values())
    assert torch.equal(begun[0], begun[1]), "given frames went through the autoencoder in some arms only"
    with pytest.raises(UserError, match="context must be"):
        stock_arm("sliding", torch.device("cpu"), MAKERS["Wan"](), context=9)


def test_jobs_are_shared_through_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arms", "ceiling=", "--worlds", "2", "--batch", "1", "--frames", "9", "--given", "5", "--size", "32"]
    words += ["--device", "cpu", "--out", str(tmp_path)]
    parts = tmp_path / "parts"
    parts.mkdir()
    with RunLock(parts, "ceiling.00001.lock"):  # another process measures the second scene
        assert main(words) == 0
    assert "1 of 2 parts" in capsys.readouterr().out
    assert not (tmp_path / "ceiling.json").exists()
    first = (parts / "ceiling.00000.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (parts / "ceiling.00000.json").stat().st_mtime_ns == first
    whole = json.loads((tmp_path / "ceiling.json").read_text())
    assert [row["frames"] for row in whole["rows"]] == [9, 9]
    assert [row["world_seed"] for row in whole["rows"]] == [500_000, 500_001]
    assert max(whole["rows"][0]["latent_error"]["rgb"]) == 0
    assert (tmp_path / "films" / "ceiling.0.webp").is_file()
    assert main([*words, "--given", "9"]) == 2
    assert "give another --out" in capsys.readouterr().err
