"""`benchmarks.quant` and `benchmarks.quant_law`: jobs, measures, gates, claims, the page, a tiny run of the law."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from benchmarks import quant, quant_law, quant_law_run, quant_page, quant_report
from benchmarks.job_queue import wanted
from benchmarks.lit_video_files import pack_files, unpack
from benchmarks.quant_arms import (
    CHECKS,
    CONTROLS,
    FORMATS,
    GROUPS,
    MODEL_FILES,
    RECIPES,
    Arm,
    Place,
    arms_of,
    goals_of,
    table,
)
from benchmarks.quant_figure import curves, draw
from benchmarks.quant_files import OWN, kept_files, restore, weights_of, write_own
from benchmarks.quant_law_run import GROUPS as GROUP_SIZES
from benchmarks.quant_law_run import SIZES, STEPS, Run, do, row_of, runs_of
from benchmarks.quant_measure import Calls, recorded, sizes_of, velocity_error
from postgen.errors import UserError
from postgen.quant import QuantSpec, format_of
from postgen.quant.law import fit_law
from postgen.quant.model import quantize_weights
from postgen.quant.solvers import check_solver
from postgen.quant.stages import recipe_of
from postgen.quant.trained_scales import check_trainable
from postgen.tensor_files import read_tensors
from tests.tiny_wan import wan_components

PROMPTS = 6


def test_every_arm_has_a_name_and_its_jobs_come_after_those_it_needs(tmp_path: Path) -> None:
    place, names = Place(out=tmp_path), set()
    for group in GROUPS:
        arms, goals = goals_of(group)
        jobs = place.jobs(arms)
        assert {*goals} <= {*jobs}
        for number, job in enumerate(jobs.values()):
            assert {*job.needs} <= {*list(jobs)[:number]}
        assert [Arm.named(arm.name) for arm in arms] == arms
        names |= {arm.name for arm in arms}
        assert all(recipe in table() for recipe in GROUPS[group])
    assert len(names) == sum(len(arms_of(group)) for group in GROUPS)
    assert {*CHECKS} <= {*goals_of("plain")[1]}
    with pytest.raises(UserError, match=r"gptq-w9\.0"):
        Arm.named("gptq-w9.0")
    with pytest.raises(UserError, match="--only sos is no arm of the group plain"):
        goals_of("plain", only=["sos"])


def test_a_measured_arm_is_not_made_again_and_e2e_makes_what_it_begins_with(tmp_path: Path) -> None:
    place = Place(out=tmp_path)
    arms, goals = goals_of("e2e", [0], ["e2e_qp-w2"])
    names = ["exact", "make block_ap-w2.0", "latents 0", "make e2e_qp-w2.0", "measure e2e_qp-w2.0"]
    assert [job.name for job in wanted(place.jobs(arms), goals)] == names
    begins = Arm(recipe="block_ap", format="w2")
    for name in MODEL_FILES:
        assert not place.has_model(begins)  # a folder with some of the files is not complete
        (place.model(begins) / name).parent.mkdir(parents=True, exist_ok=True)
        (place.model(begins) / name).touch()
    assert [job.name for job in wanted(place.jobs(arms), goals)] == [names[0], *names[2:]]
    place.row(arms[0].name).parent.mkdir()
    place.row(arms[0].name).write_text("{}")
    assert wanted(place.jobs(arms), goals) == []


def test_every_recipe_can_find_weights_in_its_formats() -> None:
    """Planes have a control with at least as many bits, and every format fits the embedded model's layers."""
    for recipe, formats in RECIPES.items():
        for name in formats:
            weight = format_of(FORMATS[name]["weight"])
            for channels in (256, 544):
                QuantSpec(**FORMATS[name])
                assert weight.bits(256, channels) < 10
            if recipe == "e2e_qp":
                check_trainable(weight, name)
            elif not recipe_of(recipe).stages:
                check_solver(recipe_of(recipe).solver, weight, recipe_of(recipe).options, hessian=False)
    for planes, control in CONTROLS.items():
        ours, theirs = (format_of(FORMATS[name]["weight"]).bits(256, 256) for name in (planes, control))
        assert theirs >= ours


@torch.no_grad()
def test_the_velocity_error_is_measured_on_the_exact_calls(tmp_path: Path) -> None:
    pipe: Any = WanPipeline(**wan_components(head_dim=16))
    pipe.set_progress_bar_config(disable=True)
    with Calls(pipe.transformer) as calls:
        for seed in range(2):
            draws = torch.Generator().manual_seed(seed)
            size = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
            pipe(["a ball", "a cube"], **size, output_type="latent", generator=draws)
    path = tmp_path / "calls.safetensors"
    calls.save(path)
    assert len(list(recorded(path, "cpu"))) == 2 * 3 * 2
    exact = velocity_error(pipe.transformer, path, "cpu")
    assert exact["velocity"] < 1e-6
    assert len(exact["velocity_by_step"]) == 3
    before = sizes_of(pipe.transformer)
    assert before["bits"] is None
    errors = {}
    for weight in ("int8", "int2"):
        pipe.transformer = WanPipeline(**wan_components(head_dim=16)).transformer
        report = quantize_weights(pipe.transformer, QuantSpec(weight=weight))
        errors[weight] = velocity_error(pipe.transformer, path, "cpu")["velocity"]
        after = sizes_of(pipe.transformer)
        assert after["bits"] == pytest.approx(report.bits)
        assert after["bytes"] == report.bytes_after < before["bytes"]
    assert 1e-4 < errors["int8"] < errors["int2"] / 10


def row_for(name: str, psnr: float, **more: Any) -> dict[str, Any]:
    right = "1" * PROMPTS
    each = [psnr + 0.01 * number for number in range(PROMPTS)]
    part = {"right": right, "score": [1.0] * PROMPTS, "motion": [1.0 + 0.1 * i for i in range(PROMPTS)], "psnr": each}
    return {"name": name, "settings": {"prompts": 12, "device": "cpu"}, "device": "cpu", "bytes": 10**7} | {
        "measured": {"one": part, "two": part}, **more
    }  # fmt: skip


def write_rows(out: Path) -> None:
    (out / "rows").mkdir(parents=True)
    decibels = {"rtn": 20.0, "ls": 20.5, "gptq": 22.0, "bpdq": 23.5, "fdda": 20.2, "omniquant": 23.0}
    decibels |= {"omniquant+fdda": 22.9, "sos": 21.0, "block_ap": 25.0, "e2e_qp": 25.5}
    rows = [row_for("exact", 100.0, bits=None)]
    for group in GROUPS:
        for arm in arms_of(group):
            more = {"recipe": arm.recipe, "format": arm.format, "seed": arm.seed, "bits": 4.25, "modes": ["dequant"]}
            more |= {"seconds": 3.0, "velocity": 0.1, "velocity_by_step": {"1.0": 0.1}, "steps": []}
            rows.append(row_for(arm.name, decibels[arm.recipe] + arm.seed / 100, **more))
    trips = {"w8a8, float32": True}
    rows.append({"name": "checks", "settings": rows[0]["settings"], "vectors": 9, "wrong_vectors": [], "folds": {}} | {
        "let_identity": 5e-7, "round_trips": trips, "roundtrip_bitwise": 1
    })  # fmt: skip
    fit = {f"mxint4.{size}": [2.5, 17.0] for size in (0, 32)}
    layer = {"layer": "blocks.0.attn1.to_q", "weight": fit, "inputs": fit, "choice": ["mxfp4", 0, 17.0]}
    pair = {"of": "inputs", "pair": ["mxint4", "mxfp4"], "rotate": 0, "predicted": 2.04, "measured": "integers"}
    pair |= {"crest_quartiles": [2.0, 2.5, 3.0], "integers_db": 17.0, "floating_db": 18.0}
    pair |= {"layers_where_integers_win": 0.2}
    advice = {"layers": [layer | {"choice_without_rotation": ["mxfp4", 0, 17.0]}], "pairs": [pair]}
    rows.append({"name": "advice", "settings": rows[0]["settings"], **advice})
    for row in rows:
        (out / "rows" / f"{row['name']}.json").write_text(json.dumps(row))


def test_report_gates_claims_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    monkeypatch.setattr(quant_report, "other", lambda name: None)
    page = tmp_path / "page.md"
    shutil.copyfile(quant_page.PAGE, page)
    rows = quant_report.read_rows(tmp_path)
    arms = quant_report.arms_of(rows)
    section = quant_report.section_of(rows, arms)
    found = {row["name"]: row for row in quant_report.gates_of(section, arms)}
    assert found["omniquant_w4a4_gain_db"]["value"] == pytest.approx(3.01)
    assert found["block_ap_w2_gain_db"]["value"] == pytest.approx(5.01)
    assert found["bpdq_vs_gptq_w2_db"]["value"] == pytest.approx(1.5)
    assert found["e2e_qp_gain_db"]["value"] == pytest.approx(0.5)  # w3 and w2; the other two gain 2.5 dB
    assert found["w4a8_judge_drop"]["value"] == 0
    assert found["w3_judge"]["value"] == 1
    assert found["vectors_exact"]["value"] == found["roundtrip_bitwise"]["value"] == 1
    unknown = {"fp8_linear_speedup", "w4_fp8_linear_vs_fp8", "wan14b_memory_ratio_w4", "law_heldout_error"}
    assert {name for name, row in found.items() if not row["ok"]} == unknown
    told = {each["claim"]: each["verdict"] for each in section["claims"] if each["paper"] == "FDDA"}
    assert sorted(told.values()) == ["refuted", "refuted", "reproduced", "reproduced"]
    quant_page.write({**section, "gates": [*found.values()]}, None, page, tmp_path)
    text = page.read_text()
    assert "| `e2e_qp_gain_db` | 0.5 | above 0 | yes |" in text
    assert (tmp_path / "quant_figure.png").is_file()
    assert curves(section["arms"])["bpdq"][0][0] == 4.25
    assert not draw({"arms": {}, "advice": None}, tmp_path / "empty.png")


def test_rows_of_two_settings_and_a_folder_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run --group plain first"):
        quant_report.read_rows(tmp_path)
    write_rows(tmp_path)
    for output, docs in (("quant", False), (str(tmp_path / "quant.json"), True)):
        with pytest.raises(UserError, match="from a small test \\(12 prompts, not 512\\)"):
            quant_report.write(tmp_path, output, docs=docs)
    path = tmp_path / "rows" / "rtn-w3.0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": {"prompts": 4, "device": "cpu"}}))
    with pytest.raises(UserError, match=r"rtn-w3\.0\.json has other settings than exact\.json \(prompts\)"):
        quant_report.read_rows(tmp_path)


def test_models_and_trainings_come_back_whole(tmp_path: Path) -> None:
    """Of a model that is needed again only its own tensors come back, and the restored file has the same tensors."""
    out, exact = tmp_path / "out", WanPipeline(**wan_components(head_dim=16)).transformer
    exact.to(torch.float16).save_pretrained(tmp_path / "exact" / "transformer")
    base = weights_of(tmp_path / "exact")
    exact.float()
    quantize_weights(exact, QuantSpec(weight="int2"))
    for name in ("block_ap-w2.0", "rtn-w2.0", "rtn-w3.0"):
        exact.save_pretrained(out / "models" / name / "transformer")
        (out / "models" / name / "made.json").write_text("{}")
        write_own(out / "models" / name, base)
    write_rows(out)
    (out / "rows" / "rtn-w3.0.json").unlink()  # made, but not measured
    begun = out / "work" / "sos-w4a4.0" / "blocks"
    for name in ("0/finished/student.safetensors", "1/checkpoint-9/state.json", "2/.run.lock", "3/latents/train"):
        (begun / name).parent.mkdir(parents=True)
        (begun / name).write_text("x")
    pack_files(kept_files(Place(out=out)), out, tmp_path / "back")
    unpack(tmp_path / "back", tmp_path / "there")
    restore(tmp_path / "there", base)
    there = Place(out=tmp_path / "there")
    assert {path.parent.name for path in there.out.glob("models/*/made.json")} == {"block_ap-w2.0", "rtn-w3.0"}
    assert there.has_model(Arm(recipe="block_ap", format="w2"))
    ours, theirs = (read_tensors(weights_of(each / "models" / "block_ap-w2.0")) for each in (out, there.out))
    assert ours.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items())
    own = out / "models" / "block_ap-w2.0" / OWN
    assert own.stat().st_size < weights_of(own.parent).stat().st_size / 2
    kept = {path.relative_to(there.out).as_posix() for path in there.out.rglob("work/**/*") if path.is_file()}
    assert kept == {f"work/sos-w4a4.0/blocks/{name}" for name in ("0/finished/student.safetensors",
                                                                 "1/checkpoint-9/state.json")}  # fmt: skip


def test_results_with_other_settings_are_refused_before_any_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path)
    assert quant.main(["--group", "plain", "--only", "rtn-w3", "--gpus", "--out", str(tmp_path)]) == 2
    assert "with other settings (prompts: 12 and 512)" in capsys.readouterr().err
    assert not (tmp_path / "prompts.jsonl").exists()
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "256x3.0.16.json").write_text(json.dumps({"settings": {"batch": 2, "max_steps": None}}))
    assert quant_law.main(["--gpus", "--out", str(tmp_path / "law")]) == 2
    assert "256x3.0.16 with other settings (batch: 2 and 64)" in capsys.readouterr().err


def test_wrong_commands_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert quant.main([]) == 2
    assert quant.main(["--report", "--out", str(tmp_path)]) == 2
    assert quant_law.main(["--report", "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    assert quant.main(["--table"]) == 0


def test_eight_runs_of_the_law_are_held_out_and_the_fit_predicts_them(tmp_path: Path) -> None:
    rows = []
    for size in range(len(SIZES)):
        for budget in range(len(STEPS)):
            for run in runs_of(size, budget)[1:]:
                parameters, tokens = 10.0 ** (6 + size), 10.0 ** (6 + budget / 2)
                delta = 0.3 * tokens**0.1 * torch.tensor(run.group).log2().item() ** 0.5 / parameters**0.2
                rows.append({"name": run.name, "parameters": parameters, "tokens": tokens, "group": run.group} | {
                    "delta": delta, "held_out": run.held_out, "device": "cpu", "settings": {}
                })  # fmt: skip
    assert sum(row["held_out"] for row in rows) == 8
    assert len(rows) == 27
    found = quant_law.payload_of(rows)
    assert found["heldout_error"] < 1e-6
    assert found["exponents"]["tokens"]["value"] == pytest.approx(0.1, abs=1e-6)
    assert [each["verdict"] for each in quant_report.law_claims(found)] == ["reproduced"] * 3
    fit = fit_law(quant_law.law_runs(rows[:9]), draws=10)
    next(row for row in rows if row["held_out"])["delta"] = 0.0
    assert quant_law.heldout_error(fit, rows) is None


def test_a_run_of_the_law_trains_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = torch.Generator().manual_seed(0)
    data = {"latents": torch.randn(6, 16, 2, 4, 4, generator=draws), "text": torch.randn(6, 3, 192, generator=draws)}
    save_file(data, tmp_path / "data.safetensors")
    options = argparse.Namespace(device="cpu", batch=2, clips=6, max_steps=2)
    losses = {}
    for group in (0, GROUP_SIZES[0]):
        run = Run(size=0, budget=0, group=group)
        do(run, tmp_path, options)
        row = json.loads(row_of(tmp_path, run).read_text())
        losses[group] = row["loss"]
        assert row["tokens"] == 2 * 2 * 8
    assert losses[0] != losses[GROUP_SIZES[0]]
    with pytest.raises(UserError, match=r"has no run 128x2\.0\.32"):
        quant_law.read_runs(tmp_path)
    # A run that a signal ends after its first step goes on later, to the same loss.
    row_of(tmp_path, run).unlink()
    usual = quant_law_run.loss_of

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(*given)

    monkeypatch.setattr(quant_law_run, "loss_of", interrupted)
    with pytest.raises(SystemExit, match=r"128x2\.0\.16 was interrupted"):
        do(run, tmp_path, options)
    assert [path.name for path in (tmp_path / "work" / run.name).iterdir()] == ["checkpoint-1"]
    monkeypatch.setattr(quant_law_run, "loss_of", usual)
    do(run, tmp_path, options)
    assert "128x2.0.16: continues at step 1" in capsys.readouterr().out
    assert json.loads(row_of(tmp_path, run).read_text())["loss"] == losses[GROUP_SIZES[0]]
    assert not (tmp_path / "work" / run.name).exists()
