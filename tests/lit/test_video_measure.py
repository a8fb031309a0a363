"""Measurement of a teacher and a student for `benchmarks.lit_video` and `benchmarks.quant`: interrupted, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline

from benchmarks import lit_video_measure
from benchmarks.embedded_sampling import Defaults
from benchmarks.lit_video_measure import group_of, measure_student, measure_teacher
from tests.tiny_wan import wan_components

HOW = Defaults(size=32, frames=5, steps=2, guidance=2.0)


def test_an_interrupted_measurement_goes_on_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Any = WanPipeline(**wan_components(head_dim=16))
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(lit_video_measure, "AT_ONCE", 1)
    group, usual, seen = group_of("one", 2, HOW), lit_video_measure.generate, list[list[int]]()
    whole = measure_teacher(pipe, group, HOW, tmp_path / "whole").as_json()

    def generate(pipe: Any, job: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(job.seeds)
        return usual(pipe, job)

    def counted(pipe: Any, job: Any) -> Any:
        seen.append(job.seeds)
        return usual(pipe, job)

    monkeypatch.setattr(lit_video_measure, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        measure_teacher(pipe, group, HOW, tmp_path / "cut")
    monkeypatch.setattr(lit_video_measure, "generate", counted)
    assert measure_teacher(pipe, group, HOW, tmp_path / "cut").as_json() == whole
    assert seen == [group.seeds[:1], group.seeds[1:]]

    picture, work = tmp_path / "sheet.png", tmp_path / "work"
    student = measure_student(pipe, group, HOW, tmp_path / "cut", picture, work=work).as_json()
    assert min(student["psnr"]) > 60
    picture.unlink()  # the first batch is generated again, because the sheet needs its clips
    seen.clear()
    assert measure_student(pipe, group, HOW, tmp_path / "cut", picture, work=work).as_json() == student
    assert seen == [group.seeds[:1]]
    assert picture.is_file()
    # Another model, or another number of steps, uses nothing of it.
    seen.clear()
    pipe.transformer.proj_out.bias.data.add_(1)
    changed = measure_student(pipe, group, HOW, tmp_path / "cut", picture, work=work).as_json()
    assert len(seen) == 2
    assert changed["psnr"] != student["psnr"]
