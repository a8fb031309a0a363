"""Numbers and reports of `benchmarks.lit_video` from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import docs_tables, lit_video, lit_video_report
from benchmarks.gates import read_result
from benchmarks.lit_video_measure import Measured, compared
from tests.lit.video_rows import measured, put, row


def test_numbers_are_paired_and_seeds_are_averaged_by_prompt() -> None:
    teacher = measured("1110")
    found = compared([measured("1101", 1.5), measured("1100", 0.5)], [teacher, teacher])
    assert found["by_seed"] == [0.75, 0.5]
    assert found["drop"]["value"] == pytest.approx(0.75 - 0.625)
    assert found["motion_ratio"]["value"] == pytest.approx(1)
    assert found["psnr"]["value"] == 30
    assert compared([teacher], [measured("1110", 0.0)])["motion_ratio"] is None
    assert Measured.from_json(teacher.as_json()) == teacher


def test_the_interval_of_a_drop() -> None:
    """For rare errors, it is about 1.96 standard errors of the mean, with the seeds averaged for each prompt."""
    count = 1024
    students = [measured("".join("01"[i % 64 >= lost] for i in range(count))) for lost in (1, 2, 3)]
    drop = compared(students, [measured("1" * count)] * 3)["drop"]
    assert drop["value"] == pytest.approx(2 / 64)
    wide = 1.96 * (((1 + 4 / 9 + 1 / 9) / 64 - (2 / 64) ** 2) / count) ** 0.5
    assert drop["high"] - drop["value"] == pytest.approx(wide, rel=0.1)
    assert drop["value"] - drop["low"] == pytest.approx(wide, rel=0.1)


def test_a_report_of_incomplete_results(tmp_path: Path) -> None:
    """Missing arms and seeds are named, the seeds are those that ran, and an unmeasured part keeps its numbers."""
    first, last, small, target = (tmp_path / name for name in ("first", "last", "small", "r.json"))
    put(first, [row("delta_r1.half.0", "1" * 64, layer_density=25 / 81), row("lit.all.0", "1" * 64)])
    put(small, [row("delta_r0.half-new.0", "1" * 64)])
    write, words = lit_video_report.write, str(target)
    write(first, small, words, docs=False)
    section = read_result(target)["video"]
    assert section["winner"] is None  # no measured type may win
    assert [*lit_video_report.fractions(section)] == [docs_tables.NOTHING]
    assert "Not measured yet: `half`." in [*lit_video_report.embedded(section)]
    # Later results of the fine teacher's students replace only their part.
    put(last, [row(f"delta_r0.{arm}.{seed}", "1" * 64) for arm in ("half", "three_quarters") for seed in (0, 2)])
    put(last, [row("delta_r0.three_quarters.1", "1" * 64)])
    write(last, None, words, docs=False)
    found = read_result(target)
    assert found["video"]["embedded"] == section["embedded"]
    assert "lit.all" not in found["video"]["arms"]
    assert {each["name"] for each in found["gates"]} == {*lit_video_report.GATES} - {"half_linear_drop"}
    assert "| `delta_r0.half` | 2 | 1 |" in [*lit_video_report.blocks(found["video"])]
    assert (
        "Not measured yet: `delta_r0.half.1`, `delta_r0.quarter.0`"
        in [*lit_video_report.fractions(found["video"])][-1]
    )
    # Gates without a value any more are removed.
    write(first, None, words, docs=False)
    assert {each["name"] for each in read_result(target)["gates"]} == {"embedded_drop", "adapter_mb"}


def test_reports_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small tests go to a separate file; an empty folder, a damaged file and mixed settings are errors of one line."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    put(out, [row("lit.half.0", "1" * 64, settings={"model": "a/export", "max_steps": 400, "device": "cuda"})])
    words = ["--report", "--out", str(out)]
    apart = [*words, "-o", str(tmp_path / "r.json")]
    assert lit_video.main(apart) == 0
    other = {"model": "b/export", "max_steps": 400, "device": "cpu"}
    put(out, [row("mhla.half.0", "1" * 64, settings=other)])
    assert lit_video.main(apart) == 0
    place = out / "jobs" / "mhla.half.0.json"
    for content, asked, said in (
        (place.read_text(), words, "from a small test (64 prompts, not 1,024)"),
        (place.read_text(), [*apart, "--docs"], "from a small test"),
        (
            place.read_text(),
            [*apart, "--embedded", str(empty)],
            "empty has no results of students: run --group embedded",
        ),
        (json.dumps(row("mhla.half.0", "1", settings={**other, "max_steps": 2})), apart, "(max_steps: 2 and 400)"),
        (
            json.dumps(row("mhla.half.0", "1", settings={**other, "model": "embedded"})),
            apart,
            "(model: 'embedded' and",
        ),
        ('{"job": ', apart, "cannot be read: remove it"),
        ("[]", apart, "is not the result of the job mhla.half.0"),
    ):
        place.write_text(content)
        capsys.readouterr()
        assert lit_video.main(asked) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    whole, embedded = tmp_path / "whole", {"model": "embedded"}
    for each, more, said in (
        (embedded, ["--out", str(whole)], "--out has students of the embedded model"),
        (other, ["--out", str(empty), "--embedded", str(whole)], "--embedded has students of another model"),
    ):
        put(whole, [row("lit.half.0", "1" * 1024, settings=each)])
        assert lit_video.main(["--report", "-o", str(tmp_path / "w.json"), "--docs", *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "w.json").exists()
