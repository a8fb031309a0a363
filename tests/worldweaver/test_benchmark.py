"""The benchmark's rollouts: they begin with what is given, and arms see the memory that they were trained for."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.worldweaver import load_arm, make_clips, measured, table
from postgen import world
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
