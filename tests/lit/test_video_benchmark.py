"""`benchmarks.lit_video`: jobs and their order, every kind of job at a tiny size, numbers, gates and the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import docs_tables, lit_video, lit_video_report
from benchmarks.gates import read_result
from benchmarks.job_queue import lock_of, wanted
from benchmarks.lit_models import KINDS, PLANS
from benchmarks.lit_sections import put_section
from benchmarks.lit_video_arms import (
    SHARED,
    TYPES,
    Job,
    chosen_blocks,
    conversion,
    jobs_of,
    plan_density,
    read_results,
    table,
    timed_plan,
    winner_of,
)
from benchmarks.lit_video_files import LARGEST, pack, unpack
from benchmarks.lit_video_job import Work, whole
from benchmarks.lit_video_job import main as do
from postgen.errors import UserError
from postgen.families import Grid
from postgen.lit import CostTable, Scores, apply_adapter, convert, layers_of
from tests.families.tiny_models import tiny_model
from tests.lit.video_rows import put, row

GRID = Grid(frames=9, height=12, width=12)


def test_jobs_of_the_whole_experiment(tmp_path: Path) -> None:
    """There are at most 30 students, and all jobs that a job needs come before it in its group."""
    students = set()
    for group in ("types", "winner"):
        jobs = jobs_of(group, "delta_r0", tmp_path, [])
        names = [job.name for job in jobs]
        assert len({*names}) == len(names)
        for place, job in enumerate(jobs):
            assert {*job.needs} <= {*names[:place]}
            assert not job.done
        students |= {job.name for job in jobs if job.is_student}
    assert len(students) <= 30
    assert {f"{kind}.half.0" for kind in TYPES} <= students
    assert {f"delta_r0.{arm}.{seed}" for arm in ("quarter", "half", "three_quarters") for seed in range(3)} <= students
    with pytest.raises(UserError, match="unknown group 'winner' or layer type 'delta_r9'"):
        jobs_of("winner", "delta_r9", tmp_path, [])
    assert [job.name for job in jobs_of("embedded", "delta_r0", tmp_path, [])][-1] == f"{SHARED}.half.0"


def test_a_job_is_wanted_until_all_that_others_need_of_it_is_there(tmp_path: Path) -> None:
    jobs = {job.name: job for job in jobs_of("types", "", tmp_path, ["--tiny"])}
    queued = {name: job.queued() for name, job in jobs.items()}
    assert queued["lit.half.0"].command[1:] == ("-m", "benchmarks.lit_video_job", "lit.half.0", "--tiny")
    needed = ["teacher", "latents.0", "s1.lit.0", "lit.half.0"]
    (tmp_path / "jobs").mkdir()
    for place, name in enumerate(needed):
        assert [job.name for job in wanted(queued, ["lit.half.0"])] == needed[place:]
        jobs[name].result.write_text("{}")
        assert jobs[name].done == jobs[name].is_student  # other jobs also need their clips, latents or layers
        jobs[name].lasting.mkdir(parents=True)
        assert jobs[name].done
    assert "s1.mhla.0" in [job.name for job in wanted(queued, ["mhla.half.0"])]


def test_pairs_of_types_and_their_names() -> None:
    """Densities are shares of (query, key) pairs, and timed plans have the names of `lit_speed.json`."""
    wanted = {"lit": 0, "mhla": 0, "delta_r0": 1 / 9, "delta_r1": 25 / 81, "linear_r0": 1 / 9, "anchor": 0.25}
    wanted["chunk"] = (3 * 3 + 3 * 4 + 3 * 4) / 81
    for kind in TYPES:
        model: Any = tiny_model("Wan", layers=4).transformer
        convert(model, conversion(kind, ("softmax", KINDS[TYPES[kind]].kind, "softmax", "softmax"), GRID, 0))
        assert plan_density(layers_of(model), 4, GRID) == pytest.approx((wanted[kind] + 3) / 4)
    names = {plan.name for plan in PLANS}
    assert timed_plan("delta_r0", 0.75) == "window_delta radius 0, every 4th softmax"
    assert {timed_plan(kind, 0.75) for kind in ("lit", "mhla", "delta_r0", "linear_r0")} < names
    assert timed_plan("delta_r0", 0.25) is None
    assert conversion(SHARED, "all", GRID, 3).window.output == "shared"
    assert 0.75 / 9 + 0.25 <= 0.35


def test_blocks_with_least_errors_are_chosen() -> None:
    scores = Scores(transformer="W", errors={"lit": (0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.8, 0.7)}, calls=1)
    costs = CostTable(
        transformer="W", model=1, device="", unit="flops", shape=(5, 32, 32), base=7, attention=0.5,
        changes={"lit": (3,) * 8},
    )  # fmt: skip
    found = {share: chosen_blocks(scores, costs, share) for share in (0.25, 0.5, 0.75, 1)}
    assert [place for place, kind in enumerate(found[0.25]) if kind == "lit"] == [2, 4]
    assert [place for place, kind in enumerate(found[0.5]) if kind == "lit"] == [1, 2, 4, 5]
    assert found[0.75].count("lit") == 6
    assert found[0.75][0] == "softmax"
    assert found[1] == ("lit",) * 8


@pytest.fixture(scope="module")
def small(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a teacher with two blocks."""
    folder = tmp_path_factory.mktemp("small") / "teacher"
    shutil.copytree(tiny_wan, folder)
    facts = {"width": 32, "height": 32, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 2.0, "fps": 8}
    (folder / "postgen.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def done(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one job of every kind in this process, and return the output folder."""
    out = tmp_path_factory.mktemp("video") / "out"
    lit_video.write_prompts(out / "prompts.jsonl", 6, two=False)
    (out / "jobs").mkdir()
    options = lit_video.parser().parse_args(["--model", str(small), "--out", str(out), "--device", "cpu"])
    vars(options).update(lit_video.TINY)
    words = lit_video.job_words(options)
    for name in ("teacher", "latents.0", "s1.delta_r0.0", "delta_r0.half.0", "delta_r0.half-none.0"):
        assert do([name, *words]) == 0
    return out


def test_every_kind_of_job_runs(done: Path, small: Path) -> None:
    rows = {row["job"]: row for row in read_results(done)}
    assert {*rows} == {"delta_r0.half.0", "delta_r0.half-none.0"}
    row = rows["delta_r0.half.0"]
    assert row["layers"] == ["softmax", "window_delta"]
    assert row["one"]["prompts"] == len(row["right"]) == 3
    assert row["plan_density"] == pytest.approx((1 / 5 + 1) / 2)
    assert (row["training_seconds"] > 0, rows["delta_r0.half-none.0"]["training_seconds"] < 1) == (True, True)
    assert (done / "jobs" / "delta_r0.half.0.png").is_file()
    trained = json.loads((done / "jobs" / "s1.delta_r0.0.json").read_text())
    assert len(trained["scores"]["errors"]["window_delta"]) == 2
    for name in ("teacher", "latents.0", "s1.delta_r0.0"):
        assert Job(name=name, out=done).done
    # The written adapter reproduces the measured student.
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(small)
    report = apply_adapter(pipe, done / "work" / "delta_r0.half.0")
    assert report.types == ("softmax", "window_delta")
    assert row["adapter_bytes"] == (done / "work/delta_r0.half.0/adapter.safetensors").stat().st_size


def test_a_training_that_ends_early_gives_no_result(done: Path, small: Path, tmp_path: Path) -> None:
    """A trainer that stops early saves and returns normally. The job must then fail, and not measure the student."""
    options = lit_video.parser().parse_args(["--model", str(small), "--out", str(done), "--device", "cpu"])
    vars(options).update({**lit_video.TINY, "max_steps": 10**6})
    work = Work(Job(name="delta_r0.half.0", out=done), options)
    early = {"conversion": {"layers": "1:lit"}, "output_dir": str(tmp_path / "run"), "max_seconds": 1e-6}
    with pytest.raises(SystemExit, match="interrupted before its last step"):
        whole(work.training(**early))


def test_what_is_kept_fits_into_files_and_comes_back(done: Path, small: Path, tmp_path: Path) -> None:
    parts = pack(done, tmp_path / "back")
    assert all(part.stat().st_size < 16 * 2**20 for part in parts)
    unpack(tmp_path / "back", tmp_path / "again")
    for name in ("prompts.jsonl", "jobs/delta_r0.half.0.json", "work/s1.delta_r0.0/scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (done / name).read_bytes()
    assert Job(name="s1.delta_r0.0", out=tmp_path / "again").done
    # Packed results have no clips, so the job has to generate them again.
    assert not Job(name="teacher", out=tmp_path / "again").done
    pack(small, tmp_path / "model")
    unpack(tmp_path / "model", tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "vae" / "config.json").is_file()
    with pytest.raises(UserError, match=r"there is no part-\*\.tar\.gz"):
        unpack(tmp_path, tmp_path / "no")
    (small.parent / "large").mkdir()
    (small.parent / "large" / "model_index.json").write_bytes(b" " * (LARGEST + 1))
    with pytest.raises(UserError, match=r"model_index\.json \(15,728,641 bytes\) does not fit into 4 files"):
        pack(small.parent / "large", tmp_path / "no")


def test_what_does_not_fit_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is too large does not prevent that all others are saved, and parts of an earlier call go."""
    out, back = tmp_path / "out", tmp_path / "back"
    put(out, [row("lit.half.0", "1" * 8)])
    (out / "jobs" / "lit.half.0.png").write_bytes(bytes(LARGEST + 1))
    (out / "prompts.jsonl").write_text("{}\n")
    back.mkdir()
    (back / "part-1.tar.gz").write_bytes(b"old")
    assert pack(out, back) == [back / "part-0.tar.gz"] == [*back.iterdir()]
    assert "not saved: jobs/lit.half.0.png (15,728,641 bytes) does not fit into 4 files" in capsys.readouterr().out
    unpack(back, tmp_path / "again")
    assert read_results(tmp_path / "again") == read_results(out)
    assert not (tmp_path / "again" / "jobs" / "lit.half.0.png").exists()
    content = (back / "part-0.tar.gz").read_bytes()
    for damaged in (content[: len(content) // 2], content[:80] + bytes(20) + content[100:], b"no archive"):
        (back / "part-0.tar.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"part-0\.tar\.gz is damaged"):
            unpack(back, tmp_path / "no")


def test_gates_are_there_when_all_seeds_are_and_the_page_is_filled(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Radius 1 cannot win by the rule, because its plan for three quarters of the blocks computes too many pairs."""
    out, small_out = tmp_path / "out", tmp_path / "embedded"
    rows = [row("delta_r0.half.0", "1" * 64), row("delta_r1.half.0", "1" * 64, layer_density=25 / 81)]
    rows += [row("lit.half.0", "1" * 63 + "0"), row("lit.all.0", "0" * 64)]
    put(out, rows)
    assert winner_of(read_results(out), ["delta_r0", "delta_r1", "lit"]) == "delta_r0"
    with pytest.raises(UserError, match="mhla, linear_r0, chunk, anchor have not been measured at half"):
        winner_of(read_results(out))
    with pytest.raises(UserError, match=r"no measured type computes at most 0\.35 of all pairs"):
        winner_of(rows[1:2], ["delta_r1"])
    section = lit_video_report.section_of(out, None)
    assert lit_video_report.gates_of(section) == []
    put(out, [row(f"delta_r0.{arm}.{seed}", "1" * 64) for arm in ("half", "three_quarters") for seed in range(3)])
    new = row("delta_r0.half-new.0", "1" * 64, adapter_bytes=1_200_000)
    put(small_out, [new, row(f"{SHARED}.half.0", "1" * 62 + "00")])
    page = tmp_path / "page.md"
    shutil.copy(lit_video_report.PAGE, page)
    result = put_section("image", {"x": 1}, [{"name": "i", "value": 1, "op": ">=", "target": 0}], tmp_path / "r.json")
    lit_video_report.write(out, small_out, str(result), docs=False)
    found = read_result(result)
    assert found["image"] == {"x": 1}
    assert [gate["name"] for gate in found["gates"]] == [
        "i", "half_linear_drop", "three_quarters_drop", "motion_ratio", "motion_ratio", "density_of_shown_plan",
        "embedded_drop", "adapter_mb",
    ]  # fmt: skip
    assert all(gate.get("ok", True) for gate in found["gates"])
    assert found["gates"][-1]["value"] == 1.2
    lit_video_report.draw({"lit_video": done / "jobs" / "delta_r0.half.0.png", "no": tmp_path / "no.png"}, tmp_path)
    assert (tmp_path / "lit_video.webp").is_file()
    assert not (tmp_path / "no.webp").exists()
    monkeypatch.setattr(lit_video_report, "IMAGES", tmp_path)
    lit_video_report.write_page(found, page)
    text = page.read_text()
    assert "window_delta radius 0, every 4th softmax" in text
    assert "](images/lit_video.webp)" in text
    assert docs_tables.NOTHING not in text.partition("## Layer types")[2].partition("## When")[0]
    assert "Not measured yet: `mhla.half`, `linear_r0.half`, `chunk.half`, `anchor.half`, `mhla.all`." in text
    assert "Not measured yet: `delta_r0.quarter.0`" in text
    monkeypatch.undo()
    lit_video_report.write_page(None, page)
    assert page.read_text() == lit_video_report.PAGE.read_text() or (lit_video_report.RESULTS / "lit.json").is_file()
    page.write_text(text.replace("table: gates", "table: doors"))
    with pytest.raises(UserError, match="must have types, fractions"):
        lit_video_report.write_page(found, page)


def test_stopped_jobs_go_on(done: Path, small: Path) -> None:
    """A job that was killed after its work and before its result finishes, and has the same result."""
    options = lit_video.parser().parse_args(["--model", str(small), "--out", str(done), "--device", "cpu"])
    vars(options).update(lit_video.TINY)
    drawn, student = done / "drawn" / "latents.0", done / "jobs" / "delta_r0.half.0.json"
    for work in (lambda: drawn, lambda: drawn.rename(done / "work" / "latents.0" / "latents")):
        work()
        (done / "jobs" / "latents.0.json").unlink()
        assert do(["latents.0", *lit_video.job_words(options)]) == 0
        assert any(drawn.iterdir())
    before = json.loads(student.read_text())
    student.unlink()
    assert do(["delta_r0.half.0", *lit_video.job_words(options)]) == 0
    after = json.loads(student.read_text())
    assert all(after[key] == before[key] for key in ("measured", "layers", "adapter_bytes"))


def test_a_folder_of_other_settings(done: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--group", "types", "--types", "delta_r0", "--model", str(small), "--out", str(done), "--tiny", "--gpus"]
    for more, said in (
        (["--two"], "with other settings (two: False and True)"),
        (["--each", "0"], "--each must be at least 1"),
        (["--seconds", "-1"], "--seconds must be at least 0"),
        (["--gpus", "0,1"], "separate the numbers by spaces"),
        (["--gpus", "1", "1"], "--gpus must not repeat a value, got 1 1"),
        (["--model", "embedded"], "with other settings (model: 'another folder' and 'embedded')"),
    ):
        assert lit_video.main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    with lock_of(done):
        assert lit_video.main(words) == 2
    assert "is in use by process" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"prompts\.jsonl has 6 prompts, but --train_prompts is 7"):
        lit_video.write_prompts(done / "prompts.jsonl", 7, two=False)


def test_the_page_has_the_arms_and_wrong_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table() in lit_video_report.PAGE.read_text(encoding="utf-8")
    for words, text in (
        ([], "nothing to do: give one of"),
        (["--pack", str(tmp_path)], "--pack needs --back"),
        (["--pack", str(tmp_path / "no"), "--back", str(tmp_path / "b")], "has no files to pack"),
        (["--report", "--out", str(tmp_path)], "has no results of students"),
        (["--group", "winner", "--out", str(tmp_path), "--tiny", "--gpus"], "have not been measured at half"),
    ):
        assert lit_video.main(words) == 2
        assert text in capsys.readouterr().err
    assert torch.is_grad_enabled()
