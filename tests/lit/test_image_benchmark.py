"""The image experiment of LiT at a tiny size: recipes of all arms, two runs, what is measured, report and page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lit_image, lit_image_measure
from benchmarks.docs_tables import filled, of_result
from benchmarks.gates import gate, read_result
from benchmarks.lit_image_arms import (
    ARMS,
    FULL,
    SHORT,
    TEACHERS,
    TINY,
    TRUTH,
    all_jobs,
    names_of,
    prepare,
    settings_of,
)
from benchmarks.lit_image_measure import classes_of, distances
from benchmarks.lit_image_report import PAGE, TABLES, section_of
from benchmarks.lit_sections import put_section
from postgen.errors import UserError
from postgen.lit import LiTConfig, conversion_of, load
from postgen.lit.train_config import LitTrainingConfig
from postgen.pretrain.class_to_image import ClassToImageConfig
from postgen.tensor_files import read_tensors
from postgen.train import main as train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("size", [FULL, SHORT, TINY], ids=["full", "short", "tiny"])
def test_every_arm_is_a_recipe(size: Any, tmp_path: Path) -> None:
    """All of them are read; students have a fifth of the teacher's steps and differ in what the table says."""
    steps, seen = {}, {}
    for name in [*TEACHERS, *ARMS]:
        given = settings_of(f"{name}.1", tmp_path, size)
        method = given.pop("method")
        config: Any = (ClassToImageConfig if method == "class_to_image" else LitTrainingConfig).from_dict(given)
        assert config.seed == 1
        steps[name] = config.max_steps
        if name in ARMS:
            LiTConfig.from_json(config.conversion)
            seen[name] = (json.dumps(config.conversion), config.output_weight, config.variance_weight, config.model)
    assert {name: value for name, value in steps.items() if name != "teacher"} == dict.fromkeys(
        [name for name in steps if name != "teacher"], steps["teacher"] // 5
    )
    alike = [name for name in seen if name != "lit" and seen[name] == seen["lit"]]
    assert alike == ["inherit_none", "young"]  # they begin with other weights
    jobs = all_jobs([TRUTH, *names_of([*TEACHERS, *ARMS], [0, 1])], tmp_path, size)
    assert all(need in jobs for job in jobs.values() for need in job.needs)
    assert jobs["young.0"].needs == ("teacher.0", "young_alone.0")
    assert "heads_1.1" not in jobs
    assert "no_conv.1" in jobs


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment, every command in this process."""
    folder = tmp_path_factory.mktemp("lit-image")
    words = ["--out", str(folder), "--size", "32", "--classes", "4", "--per_class", "1", "--draws", "4"]
    assert lit_image_measure.main(["reference", *words]) == 0
    for name in ("teacher.0", "inherit_none.0"):
        prepare(name, folder, TINY)
        assert train([str(folder / "recipes" / f"{name}.yaml"), "--resume_from_checkpoint", "auto"]) == 0
        assert lit_image_measure.main([name, *words]) == 0
    assert lit_image_measure.main([TRUTH, *words]) == 0
    jobs = all_jobs([TRUTH, "teacher.0", "inherit_none.0"], folder, TINY)
    lit_image.collect(folder, folder, jobs)
    return folder


def test_what_is_measured(out: Path) -> None:
    found = json.loads((out / "measures.json").read_text())
    assert [*found["measured"]] == ["inherit_none.0", "teacher.0", "truth.0"]
    assert found["measured"]["truth.0"]["rows"]["colour"] == [1, 1, 1, 1]
    student = load(out / "runs" / "inherit_none.0" / "export" / "transformer")
    assert found["measured"]["inherit_none.0"]["converted"] == conversion_of(student).describe()
    assert found["losses"]["teacher.0"]["step"] == 10
    assert (out / "sheet.webp").stat().st_size > 100
    # It began with weights of its own: two steps from there, and far from its teacher.
    key = "transformer_blocks.0.ff.net.2.weight"
    teacher = read_tensors(out / "runs" / "teacher.0" / "export" / "transformer" / WEIGHTS)[key]
    start, end = load(out / "starts" / "inherit_none.0").state_dict()[key], student.state_dict()[key]
    assert 0 < (end - start).abs().max() < 0.01 < (end - teacher).abs().max()


def test_distances() -> None:
    """Of the reference itself 0; farther pictures are farther; draws are the same for every run."""
    torch.manual_seed(0)
    true = torch.randn(24, 5)
    value, draws = distances(true, true, 4, 6)
    assert value == pytest.approx(0, abs=1e-9)
    far, again = distances(true, true + 3, 4, 6)
    assert far == pytest.approx(45, rel=1e-6)
    assert all(b > a for a, b in zip(draws, again, strict=True))
    assert distances(true, true, 4, 6) == (value, draws)
    assert classes_of(4, 2) == [0, 0, 144, 144, 288, 288, 432, 432]


def made(fd: float, right: list[int], **more: Any) -> dict[str, Any]:
    """A run of 4 pictures as `lit_image_measure` writes it."""
    aspects = ("all_right", "count", "colour", "shape", "event", "score")
    return {
        **{"settings": {"size": 32, "classes": 4, "per_class": 1}, "device": "x", "versions": {}},
        **{"fd": fd, "fd_draws": [fd + 1, fd + 1.1, fd + 0.9], "rows": dict.fromkeys(aspects, right), **more},
    }


def test_the_report(tmp_path: Path) -> None:
    """Guidelines by their intervals; the part of others in the file stays; the page takes the tables."""
    runs = {f"lit.{seed}": made(5.0 + seed, [1, 1, 0, 1]) for seed in range(3)}
    runs |= {f"no_conv.{seed}": made(9.0 + seed, [1, 0, 0, 1]) for seed in range(3)}
    runs |= {
        "teacher.0": made(2, [1, 1, 1, 1]),
        "heads_8.0": made(4, [1, 1, 0, 1]),
        "young.0": made(6.05, [1, 1, 0, 1]),
    }
    section = section_of({"measured": runs, "losses": {}, "judged": {}})
    held = {row["arm"]: row["holds"] for row in section["guidelines"]}
    assert held == {"no_conv": "holds", "heads_8": "does not hold", "young": "no difference seen"}
    assert section["arms"]["lit"]["fd"]["value"] == pytest.approx(6)
    assert section["against"]["teacher"]["lit"]["all_right"]["value"] == pytest.approx(-0.25)
    with pytest.raises(UserError, match=r"no_conv\.1 were measured with other settings"):
        section_of({"measured": {**runs, "no_conv.1": made(1, [1], settings={})}, "losses": {}, "judged": {}})
    target = tmp_path / "lit.json"
    put_section("video", {"rows": [1]}, [gate("half_linear_drop", 0.01, "<=", 0.02)], target)
    put_section("image", {"old": True}, path=target)
    (tmp_path / "measures.json").write_text(json.dumps({"measured": runs, "losses": {}, "judged": {}}))
    assert lit_image.main(["--report", "--results", str(tmp_path), "-o", str(target)]) == 0
    result = read_result(target)
    assert result["video"] == {"rows": [1]}
    assert "old" not in result["image"]
    assert [each["name"] for each in result["gates"]] == ["half_linear_drop"]
    page = filled(PAGE.read_text(), of_result(result, TABLES))
    assert "| 1, a convolution is enough | without it | +4.00 (" in page
    assert "LiT: 2 heads" in page
    assert not any(math.isnan(arm["all_right"]["value"]) for arm in section["arms"].values())
    assert lit_image.main(["--report", "--results", str(tmp_path / "none")]) == 2


def test_the_page_lists_the_arms() -> None:
    assert lit_image.table() in PAGE.read_text()
