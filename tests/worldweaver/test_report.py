"""`benchmarks.worldweaver_report`: paired scenes, seeds, gates with and without values, tables of the page."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.worldweaver_along import along, rounded
from benchmarks.worldweaver_report import gates_of, long_picture, main, slopes
from benchmarks.worldweaver_stats import Runs, interval, read_runs
from benchmarks.worldweaver_tables import PAGE, TABLES, filled
from postgen import world
from postgen.errors import UserError
from postgen.metrics.drift import measure_drift
from postgen.metrics.world_truth import true_clip
from postgen.worldweaver.world_clips import latent_ends

SETTINGS = {"frames": 25, "given": 5, "size": 48, "first": 0, "worlds": 3, "batch": 3, "guidance": None}


@cache
def worlds() -> tuple[list[world.Spec], world.Frames]:
    """Return the scenes of all arms with their render, computed once."""
    specs = [world.sample_long(seed) for seed in range(3)]
    return specs, world.render(specs, num_frames=25, size=48)


def rows(fade: float, slope: float) -> list[dict[str, Any]]:
    """Return rows of an arm whose clips are true clips that fade, with rising latent errors."""
    specs, truth = worlds()
    ends, found = latent_ends(25, 7), []
    for number, spec in enumerate(specs):
        true = true_clip(spec, truth, number)
        clip = true.frames * fade ** torch.arange(25)[:, None, None, None]
        report = measure_drift(clip, true, disparity=true.disparity, borders=range(5, 25, 4), window=8)
        errors = {"rgb": [slope * k for k in range(7)], "depth": [slope * k / 2 for k in range(7)]}
        lines = along(clip, true, report, ends)
        assert lines["psnr"][0] == 100
        assert lines["motion"][0] is None
        assert len(lines["presence"]) == 7
        found.append({**rounded(report.to_dict()), "latent_error": errors, "along": lines})
    return found


def files(folder: Path) -> None:
    folder.mkdir()
    arms = {"a.0": (0.97, 0.1), "a.1": (0.96, 0.1), "e.0": (0.999, 0.1), "e.1": (1.0, 0.2), "sliding": (0.9, 0.3)}
    told = {"told": {"ar_step": 7}, "guidance": 3.0, "modalities": ["rgb", "depth"], "device": "x", "versions": {}}
    for name, how in arms.items():
        file = {"settings": SETTINGS, **told, "adapter_mb": 5.0 if name[0] == "e" else None, "rows": rows(*how)}
        (folder / f"{name}.json").write_text(json.dumps(file))


def test_sheet_of_long_clips_has_every_arm_and_every_second_picture(tmp_path: Path) -> None:
    """Strips have a picture every 20 frames; the sheet shows every second one, and one seed of an arm."""
    (tmp_path / "sheets").mkdir()
    runs = {name: Runs(name, {"0": {"settings": {"frames": 481}}}) for name in ("e", "sliding")}
    side, shades = 16, (10, 90, 170)
    for name, shade in zip(("truth", "e.0", "sliding"), shades, strict=True):
        strip = Image.new("RGB", (25 * side, side))
        for place in range(25):
            strip.paste((shade, 10 * place, 0), (place * side, 0, (place + 1) * side, side))
        strip.save(tmp_path / "sheets" / f"{name}.png")
    with Image.open(long_picture(runs, tmp_path, tmp_path)) as picture:
        assert picture.width == 110 + 13 * side
        pixels = [[picture.getpixel((118 + k * side, 24 + 18 * j)) for k in range(13)] for j in range(3)]
    for j, shade in enumerate(shades):
        for k, (red, green, _) in enumerate(pixels[j]):
            assert max(abs(red - shade), abs(green - 20 * k)) < 12


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path / "out")
    words = [str(tmp_path / "out"), "--long", str(tmp_path / "out"), "-o", str(tmp_path / "found.json")]
    assert main([*words, "--images", str(tmp_path), "--speed", str(tmp_path / "none.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    gates = {row["name"]: row for row in found["gates"]}
    assert gates["drift_vs_chunk_ar"]["ok"]
    assert gates["adapter_mb"]["value"] == 5.0
    assert gates["drift_vs_chunk_ar"]["value"] == found["against"]["a"]["e"]["score"]["ratio"]["high"]
    assert gates["time_slope"]["value"] is None
    assert not gates["seconds_per_20s_cpu"]["ok"]
    assert found["arms"]["a"]["seeds"] == ["0", "1"]
    assert len(found["arms"]["a"]["numbers"]["score"]["by_seed"]) == 2
    # The errors of arm e rise by .1 and .2 per latent frame in RGB (two seeds), and half as fast in depth.
    own = next(row for row in found["thesis"] if row["depth_of"] == row["rgb_of"] == "e")
    assert own["slope"]["rgb"]["value"] == pytest.approx(15)
    assert own["slope"]["depth"]["value"] == pytest.approx(7.5)
    assert own["slope"]["rgb"]["low"] == pytest.approx(10)
    assert own["slope"]["rgb"]["high"] == pytest.approx(20)
    page = filled(PAGE.read_text(encoding="utf-8"), found)
    assert "| e - a |" in page
    assert "| `drift_vs_chunk_ar` |" in page
    assert page.count("<!-- end -->") == len(TABLES)
    assert filled(page, found) == page
    assert (tmp_path / "worldweaver_along.png").is_file()
    with pytest.raises(UserError, match="the page has the tables"):
        filled(page.replace("<!-- table: arms -->", ""), found)
    with pytest.raises(UserError, match="has no arms"):
        read_runs(tmp_path)
    capsys.readouterr()


def test_intervals_are_paired_by_world_and_hold_the_seeds() -> None:
    base = torch.tensor([[1.0, 5.0, 9.0, float("nan")]], dtype=torch.float64)
    both = interval(base + 2, base)
    assert both == {"value": 2.0, "low": 2.0, "high": 2.0}, "the same worlds are drawn in both"
    ratio = interval(3 * base, base, ratio=True)
    assert ratio == {"value": 3.0, "low": 3.0, "high": 3.0}
    level = torch.tensor([[1.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    assert interval(level) == {"value": 2.5, "low": 1.0, "high": 4.0}, "seeds are drawn too"
    assert interval(base[:, 3:]) is None
    assert interval(base, -base, ratio=True) is None


def test_slopes_are_what_noise_does_not_explain() -> None:
    speed = {"rows": [{"model": "1.3b", "system": "worldweaver", "output": "latent", "time_slope": [-1.0, 0.1, 1.2],
                       "memory_slope": [0.0, 0.0, 0.0]}]}  # fmt: skip
    cpu = {"time_slope": [0.25, 0.5, 0.75], "memory_slope": [-5.0, 1.0, 6.0]}
    assert slopes(speed, cpu) == {"time_slope": 0.25, "memory_slope": 0.0}
    assert slopes(speed, {}) == {"time_slope": None, "memory_slope": None}
    assert all(row["value"] is None and not row["ok"] for row in gates_of({}, {}, {}, {}))


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    """A seed with fewer clips, seeds without clips, and a truncated file are refused."""
    for counts, said in (((3, 2), r"have \[2, 3\] clips"), ((0, 0), r"have \[0\] clips")):
        for seed, count in enumerate(counts):
            (tmp_path / f"e.{seed}.json").write_text(json.dumps({"settings": SETTINGS, "rows": [{}] * count}))
        with pytest.raises(UserError, match=said):
            read_runs(tmp_path)
    (tmp_path / "e.1.json").write_text('{"settings": {"fra')
    with pytest.raises(UserError, match=r"e\.1\.json is damaged"):
        read_runs(tmp_path)
