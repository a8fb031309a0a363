"""The image experiment of LiT at a tiny size: recipes of all arms, two runs, measurements, report and page."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import lit_image, lit_image_measure
from benchmarks.docs_tables import filled, of_result
from benchmarks.gates import gate, read_result
from benchmarks.job_queue import lock_of, wanted
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
from benchmarks.lit_image_folder import all_measured, check_folder
from benchmarks.lit_image_measure import classes_of, distances
from benchmarks.lit_image_report import PAGE, TABLES, section_of
from benchmarks.lit_sections import put_section
from benchmarks.lit_video_files import unpack
from postgen.errors import UserError
from postgen.lit import LitConfig, conversion_of, load
from postgen.lit.train_config import LitTrainingConfig
from postgen.pretrain.class_to_image import ClassToImageConfig
from postgen.tensor_files import read_tensors
from postgen.train import main as train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("size", [FULL, SHORT, TINY], ids=["full", "short", "tiny"])
def test_every_arm_is_a_recipe(size: Any, tmp_path: Path) -> None:
    """All recipes are valid, and students have a fifth of the teacher's steps."""
    steps, seen = {}, {}
    for name in [*TEACHERS, *ARMS]:
        given = settings_of(f"{name}.1", tmp_path, size)
        method = given.pop("method")
        config: Any = (ClassToImageConfig if method == "class_to_image" else LitTrainingConfig).from_dict(given)
        assert config.seed == 1
        steps[name] = config.max_steps
        if name in ARMS:
            LitConfig.from_json(config.conversion)
            seen[name] = (json.dumps(config.conversion), config.output_weight, config.variance_weight, config.model)
    assert {name: value for name, value in steps.items() if name != "teacher"} == dict.fromkeys(
        [name for name in steps if name != "teacher"], steps["teacher"] // 5
    )
    alike = [name for name in seen if name != "lit" and seen[name] == seen["lit"]]
    assert alike == ["inherit_none", "young"]  # these two differ only in their initial weights
    jobs = all_jobs([TRUTH, *names_of([*TEACHERS, *ARMS], [0, 1])], tmp_path, size)
    assert all(need in jobs for job in jobs.values() for need in job.needs)
    assert jobs["young.0"].needs == ("teacher.0", "young_alone.0")
    assert "heads_1.1" not in jobs
    assert "no_conv.1" in jobs


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny experiment whose commands all ran in this process."""
    folder = tmp_path_factory.mktemp("lit-image")
    words = ["--out", str(folder), "--size", "32", "--classes", "4", "--per_class", "1", "--draws", "5"]
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
    # The student was initialised at random: its weights are near their start, and far from the teacher's.
    key = "transformer_blocks.0.ff.net.2.weight"
    teacher = read_tensors(out / "runs" / "teacher.0" / "export" / "transformer" / WEIGHTS)[key]
    start, end = load(out / "starts" / "inherit_none.0").state_dict()[key], student.state_dict()[key]
    assert 0 < (end - start).abs().max() < 0.01 < (end - teacher).abs().max()


def test_another_machine_continues_from_the_results(out: Path, tmp_path: Path) -> None:
    """Restored measurements are not made again, and a run that is left has its teacher trained again."""
    lit_image.collect(out, tmp_path / "kept", {})
    there = tmp_path / "there"
    unpack(tmp_path / "kept", there)
    assert all_measured(there) == all_measured(out)
    lit_image.collect(there, tmp_path / "again", {})
    for name in ("measures.json", "sheet.webp"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    jobs = all_jobs(["inherit_none.0", "heads_1.0"], there, TINY)
    check_folder(there, tmp_path / "again", jobs, TINY)
    left = [job.name for job in wanted(jobs, ["measure inherit_none.0", "measure heads_1.0"])]
    assert left == ["teacher.0", "heads_1.0", "measure heads_1.0"]


def test_distances() -> None:
    """The distance of the reference to itself is 0, and all runs have the same draws."""
    torch.manual_seed(0)
    true = torch.randn(24, 5)
    value, draws = distances(true, true, 4, 6)
    assert value == pytest.approx(0, abs=1e-9)
    far, again = distances(true, true + 3, 4, 6)
    assert far == pytest.approx(45, rel=1e-6)
    assert all(b > a for a, b in zip(draws, again, strict=True))
    assert distances(true, true, 4, 6) == (value, draws)
    assert classes_of(4, 2, 2) == [0, 0, 144, 144, 288, 288, 432, 432]
    assert classes_of(4, 2, 1) == [0, 0, 12, 12, 24, 24, 36, 36]


@pytest.mark.parametrize(
    ("words", "said"), [("lit.7", "lit.7/export: train lit.7 first"), ("truth.0 --classes 49", "--classes must be")]
)
def test_what_cannot_be_measured(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_image_measure.main([*words.split(), "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def made(fd: float, right: list[int], **more: Any) -> dict[str, Any]:
    """Return a measurement of 4 pictures in the form that `lit_image_measure` writes."""
    aspects = ("all_right", "count", "colour", "shape", "event", "score")
    return {
        **{
            "settings": {"size": 32, "bodies": 1, "classes": 4, "per_class": 1, "draws": 5},
            "device": "x",
            "versions": {},
        },
        **{"fd": fd, "fd_draws": [fd + 1, fd + 1.1, fd + 0.9], "rows": dict.fromkeys(aspects, right), **more},
    }


def test_the_report(tmp_path: Path) -> None:
    """Guidelines are decided by their intervals, other parts of the file stay, and the page contains the tables."""
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
    assert "| 1, a convolution is enough | no convolution | +4.00 (" in page
    assert "LiT: 2 heads" in page
    assert "Not measured yet: `truth.0`, `no_distillation.0`, `inherit_none.0`, " in page
    assert section["missing"][-2:] == ["no_distillation.2", "inherit_none.2"]
    assert not any(math.isnan(arm["all_right"]["value"]) for arm in section["arms"].values())
    assert lit_image.main(["--report", "--results", str(tmp_path / "none")]) == 2


def test_a_report_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small tests are not written to the results or the page; damaged and missing files are errors of one line."""
    words = ["--report", "--results", str(tmp_path)]
    apart = [*words, "-o", str(tmp_path / "x.json")]
    place = tmp_path / "measures.json"
    told = {"measured": {"lit.0": made(5, [1, 1, 0, 1])}, "losses": {}, "judged": {}}
    whole = made(5, [1] * 2304, settings={"size": 64, "bodies": 1, "classes": 48, "per_class": 48, "draws": 200})
    for given, asked, said in (
        (json.dumps(told), words, "is from a small test (4 classes, pictures of each: 1)"),
        (json.dumps(told), [*apart, "--docs"], "is from a small test"),
        (json.dumps({**told, "measured": {"lit.0": whole}}), [*apart, "--docs"], "sheet.webp, which the page shows"),
        ('{"measured": ', apart, "cannot be read: remove it"),
        ("[]", apart, "must hold a JSON object, got []"),
        (json.dumps({"measured": {}}), apart, "is not a file of measurements"),
        (json.dumps({**told, "measured": {"lit.0": {}}}), apart, "is not a file of measurements"),
        (json.dumps({**told, "measured": {}}), apart, "no run was measured yet"),
    ):
        place.write_text(given)
        assert lit_image.main(asked) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert lit_image.main(["--docs"]) == 2
    assert not (tmp_path / "x.json").exists()


def test_a_folder_of_another_experiment(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs, measurements and references of another size are neither used nor overwritten."""
    everything = [*names_of([*TEACHERS, *ARMS], [0]), TRUTH]
    check_folder(out, out, everything, TINY)
    check_folder(out, out, everything, replace(TINY, teacher={**TINY.teacher, "cuda_graphs": True}))
    for size, said in (
        (SHORT, r"teacher\.0 with other settings \(bf16: False -> True"),
        (replace(TINY, student={**TINY.student, "max_steps": 3}), r"inherit_none\.0 with other settings \(max_steps"),
        (replace(TINY, draws=6), r"has measurements of inherit_none\.0"),
    ):
        with pytest.raises(UserError, match=said):
            check_folder(out, out, everything, size)
    reference = tmp_path / "one" / "reference.safetensors"
    reference.parent.mkdir()
    save_file({"features": torch.zeros(3, 320)}, reference)
    with pytest.raises(UserError, match="has features of 3 stills, but this size needs 4"):
        check_folder(reference.parent, tmp_path, [], TINY)
    shutil.copy(out / "measures.json", tmp_path)
    with pytest.raises(UserError, match=r"has inherit_none\.0, teacher\.0, truth\.0, which are not in"):
        check_folder(tmp_path / "two", tmp_path, [], TINY)
    (tmp_path / "two" / "measured").mkdir(parents=True)
    (tmp_path / "two" / "measured" / "lit.0.json").write_text("{}")
    with pytest.raises(UserError, match=r"lit\.0\.json is not a measurement: remove it"):
        check_folder(tmp_path / "two", tmp_path / "three", [], TINY)
    with lock_of(out):
        assert lit_image.main(["--out", str(out), "--tiny", "--gpus"]) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_nothing_of_other_arms_is_dropped(out: Path, tmp_path: Path) -> None:
    """A call for a few arms also collects the results of all other arms."""
    lit_image.collect(out, tmp_path, all_jobs([TRUTH, "teacher.0"], out, TINY))
    assert json.loads((tmp_path / "measures.json").read_text()) == json.loads((out / "measures.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--each 0", "--each must be at least 1"),
        ("--threads -1", "--threads must be at least 1"),
        ("--seconds nan", "--seconds must be at least 0"),
        ("--seeds -1", "--seeds must be at least 0"),
        ("--seeds 0 0", "--seeds must not repeat a value, got 0 0"),
        ("--arms lit lit", "--arms must not repeat a value"),
        ("--gpus 0,1", "separate the numbers by spaces"),
    ],
)
def test_options_that_mean_nothing(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_image.main(["--tiny", "--out", str(tmp_path / "out"), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_lists_the_arms() -> None:
    assert lit_image.table() in PAGE.read_text()
