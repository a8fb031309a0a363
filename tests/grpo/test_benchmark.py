"""The benchmark of training with rewards: arms, choice of checkpoints, intervals, guards, gates, report."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import (
    dancegrpo,
    dancegrpo_arms,
    dancegrpo_exact,
    dancegrpo_job,
    dancegrpo_measure,
    dancegrpo_report,
    dancegrpo_tables,
)
from benchmarks.dancegrpo_arms import Arm, Run, check_arms, named_arms
from benchmarks.dancegrpo_clips import Bench, Sizes, within
from benchmarks.dancegrpo_measure import chosen, log_means, motion_ratio
from benchmarks.dancegrpo_stats import Bootstrap, change, cost_to, fired, floor_ratio, gap_closed, ratio
from benchmarks.lit_video_files import pack_files, unpack
from postgen.errors import UserError
from postgen.training import load_recipe

# Synthetic measurements.

PROMPTS = 8
SETTINGS = {"protocol": dancegrpo_measure.PROTOCOL, "sizes": {"copies": 2}, "weights": {}}
MEASURES = ("world", "judge", "visual", "moves", "clip", "quality")


def rows(right, *, world=0.5, motion=0.01, floor="01230123"):
    found = {name: [world + 0.01 * number for number in range(PROMPTS)] for name in MEASURES}
    found |= {name: [motion] * PROMPTS for name in ("motion", "speed", "sharp", "bright")}
    return found | {"right": right, "floor": floor}


def point(step, right, **how):
    test = rows(right, **how)
    found = {"step": float(step), "forward_equivalents": 100.0 * step, "transformer_seconds": 2.0 * step}
    found |= dict.fromkeys(("test", "valid", "guided"), test)
    return found | {
        "many": {"diversity": [0.5] * 4, "floor": "01230123"},
        "clean": {"loss": [0.2] * 3, "norm": [1.5] * 3},
    }


def write(path, found):
    dancegrpo_measure.write_file(path, {"complete": True, "settings": SETTINGS, **found})


def write_base(out):
    base = point(0, "00001111") | {"best": {"right": "01111111", "world": [0.9] * PROMPTS}}
    exact = {name: rows("1" * PROMPTS, motion=0.02) for name in ("test", "valid")}
    write(out / "measured" / "base.json", {"points": {"base": base}, "exact": exact})


def write_run(out, name, last, *, steps=(10, 20)):
    arm, seed = name.split(".")
    points = {"01": point(steps[0], "00001111", world=0.55), "02": point(steps[1], **last)}
    log = {"steps": steps[1], "means": {"motion/advantage_corr": [0.25] * 8}, "onpolicy_ratio_error": 1e-7}
    found = {"arm": arm, "seed": int(seed), "points": points, "chosen": "02", "last": "02", "log": log}
    write(out / "measured" / f"{name}.json", found | {"training": {"device": "a GPU"}})


# Arms.


def test_arms_are_named_by_group_and_checked_before_anything_runs(monkeypatch):
    assert named_arms(["shipped", "nft", "shuffled"]) == ["faithful", "fast", "nft", "shuffled"]
    with pytest.raises(UserError, match=r"unknown arm 'nfd'. Did you mean 'nft'\?"):
        named_arms(["nfd"])
    check_arms(["faithful", "fast", "nft"])
    check_arms(["faithful", "fast", "nft", *dancegrpo_arms.HACK], tiny=True)
    monkeypatch.setitem(dancegrpo_arms.ARMS, "odd", Arm(what="", recipe="nft-tiny", settings={"not_there": 1}))
    with pytest.raises(UserError, match="arm odd: DiffusionNFTConfig has no setting not_there"):
        check_arms(["odd"])
    monkeypatch.setitem(dancegrpo_arms.ARMS, "odd", Arm(what="", recipe="nft-tiny", settings={"beta": "much"}))
    with pytest.raises(UserError, match=r"arm odd: .*beta"):
        check_arms(["odd"])
    monkeypatch.setitem(dancegrpo_arms.ARMS, "odd", Arm(what="", recipe="nft-tiny", settings={"reward_funcs": "wrld"}))
    with pytest.raises(UserError, match=r"arm odd: .*wrld"):
        check_arms(["odd"])


def test_every_arm_has_words_marks_and_a_reference():
    for name, arm in dancegrpo_arms.ARMS.items():
        run = Run(arm=name, seed=1, out=Path("out"))
        assert arm.reference in ("", *dancegrpo_arms.SHIPPED)
        assert run.marks[-1] == arm.budget
        assert len(run.marks) == arm.points
        assert run.words()[run.words().index("--seed") + 1] == "1"
        assert Run.named(run.name, run.out) == run
    shipped = dancegrpo_arms.SHIPPED
    assert shipped["fast"].budget <= shipped["faithful"].budget / 3
    assert len(dancegrpo_arms.table().splitlines()) == len(dancegrpo_arms.ARMS) + 2


# Measurements.


def test_the_checkpoint_is_chosen_by_score_among_those_in_the_band():
    base = point(0, "0" * PROMPTS, world=0.5)
    points = {
        "01": point(10, "0" * PROMPTS, world=0.6),
        "02": point(20, "0" * PROMPTS, world=0.7, motion=0.0109),
        "03": point(30, "0" * PROMPTS, world=0.9, motion=0.0112),
        "raw": point(30, "0" * PROMPTS, world=0.95),
    }
    assert chosen(points, base) == "02"
    del points["01"], points["02"]
    assert chosen(points, base) == "base"


def test_motion_ratio_is_the_geometric_mean_of_paired_ratios():
    assert motion_ratio([0.02, 0.01, None], [0.01, 0.02, 0.5]) == pytest.approx(1)
    assert motion_ratio([0.04, 0.01], [0.01, 0.01]) == pytest.approx(2)
    assert motion_ratio([0.0, 0.01], [1e-4, 0.01]) == pytest.approx(1)  # a frozen clip has a logarithm


def test_the_training_log_becomes_means_in_equal_parts():
    log = [{"step": step, "reward": float(step), "logp_diff/max": 1e-7 * step} for step in range(1, 17)]
    found = log_means(log, parts=4)
    assert found == {
        "steps": 16,
        "means": {"reward": [2.5, 6.5, 10.5, 14.5], "logp_diff/max": [2.5e-7, 6.5e-7, 1.05e-6, 1.45e-6]},
        "onpolicy_ratio_error": pytest.approx(1.6e-6),
    }
    # The log has null for NaN, which must not count as 0.
    assert log_means([{"step": 1, "logp_diff/max": None}])["onpolicy_ratio_error"] is None


def test_diversity_within_prompts_is_the_mean_distance_of_two_samples():
    latents = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert within(latents, 2)["diversity"] == [pytest.approx(5 / math.sqrt(2), rel=1e-3), 0.0]


# Statistics.


def test_intervals_are_paired_over_prompts():
    torch.manual_seed(0)
    base = torch.rand(1, 200, dtype=torch.float64)
    boot = Bootstrap(200, draws=500)
    # Both seeds are above the base model by the same amount on every prompt, so nothing is left to chance.
    found = change("a", (base + 0.1).repeat(2, 1), base, boot)
    assert found["change"] == {key: pytest.approx(0.1) for key in ("value", "low", "high")}
    assert found["mean"]["low"] < found["mean"]["value"] - 0.02
    # Seeds that differ widen the interval.
    wide = change("a", torch.cat([base, base + 0.2]), base, boot)["change"]
    assert (wide["low"], wide["value"], wide["high"]) == (pytest.approx(0), pytest.approx(0.1), pytest.approx(0.2))


def test_a_measure_that_a_clip_lacks_leaves_out_its_prompt_in_both_arms():
    ours = torch.tensor([[1.0, 3.0, math.nan]], dtype=torch.float64)
    theirs = torch.tensor([[1.0, 1.0, 9.0]], dtype=torch.float64)
    found = change("a", ours, theirs, Bootstrap(3, draws=200))
    assert (found["before"], found["change"]["value"], found["by_seed"]) == (1.0, 1.0, [2.0])
    none = change("a", ours * math.nan, theirs, Bootstrap(3, draws=200))
    assert math.isnan(none["change"]["value"])
    assert dancegrpo_report.without_nan(none)["change"] == {"value": None, "low": None, "high": None}


def test_gap_ratio_and_floors_by_hand():
    boot = Bootstrap(4, draws=200)
    base, tuned = (torch.tensor([row], dtype=torch.float64) for row in ([0, 0, 1, 1], [1, 0, 1, 1]))
    assert gap_closed("a", tuned, base, boot)["value"] == 0.5
    with pytest.raises(UserError, match="no gap is left"):
        gap_closed("a", tuned, torch.ones(1, 4, dtype=torch.float64), boot)
    assert ratio("a", tuned + 1, base + 1, boot)["value"] == pytest.approx(2**0.25, rel=1e-4)
    floors, one = (torch.tensor([row], dtype=torch.float64) for row in ([0, 1, 2, 3], [2, 2, 2, 2]))
    assert floor_ratio("a", one, floors, boot)["value"] == pytest.approx(0.25)


def test_cost_to_a_score_is_interpolated():
    assert cost_to([(0, 0.4), (20, 0.7), (40, 0.9)], 0.8) == pytest.approx(30)
    assert cost_to([(0, 0.4)], 0.4) == 0
    assert cost_to([(0, 0.4), (10, 0.5)], 0.8) is None


def test_guards_fire_at_the_checkpoint_at_which_they_see_it(monkeypatch):
    monkeypatch.setitem(dancegrpo_arms.ARMS, "hack_judge", Arm(what="", recipe="nft-tiny", reward=("judge",)))
    start = point(0, "1" * PROMPTS)
    base = {"points": {"base": start}}

    def hacked(step, reward, world, motion):
        found = point(step, "1" * PROMPTS, motion=motion)
        return found | {"test": found["test"] | {"judge": [reward] * PROMPTS, "world": [world] * PROMPTS}}

    points = {
        "01": hacked(10, 0.9, 0.6, 0.010),
        "02": hacked(20, 1.0, 0.55, 0.011),
        "03": hacked(30, 1.1, 0.4, 0.012),
    }
    found = fired("hack_judge", {"points": points}, base)
    assert found["parted"] == 30
    assert found["motion"] == 30
    # The score falls below its best at step 20, and in two evaluations in a row at step 30.
    assert (found["gold_falls"], found["patience"]) == (20, 30)
    assert found["diversity"] is None
    assert found["loss"] is None


def test_the_recipe_of_the_exact_comparison_can_be_read_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe(dancegrpo_exact.small_recipe(tmp_path / "a", gradient_accumulation_steps=2))[1]
    assert Path(config.train_dataset).is_file()
    assert Path(config.eval_dataset).is_file()
    assert (config.max_steps, config.gradient_accumulation_steps) == (3, 2)


# The report.


def whole_folder(out):
    write_base(out)
    lasts = {"faithful": 100, "fast": 30, "nft": 20}
    for name, steps in lasts.items():
        for seed in range(3):
            right = "0111" + "1111" if seed else "00111111"
            last = {"right": right, "world": 0.8, "motion": 0.0105}
            write_run(out, f"{name}.{seed}", last, steps=(steps // 2, steps))
    write_run(out, "residual.0", {"right": "0" * 4 + "1" * 4, "world": 0.7})
    write_run(out, "hack_judge.0", {"right": "0" * 8, "world": 0.2, "motion": 0.02})
    (out / "exact.json").write_text('{"resume_identical": 1, "ranks_max_abs": 0.0}')


def test_the_report_has_all_gates_tables_and_pictures(tmp_path, capsys):
    whole_folder(tmp_path / "run")
    target = tmp_path / "out.json"
    assert dancegrpo.main(["report", "--out", str(tmp_path / "run"), "-o", str(target)]) == 0
    result = json.loads(target.read_text())
    gates = {row["name"]: row for row in result["gates"]}
    assert gates["gap_closed_nft"]["value"] == pytest.approx((0.75 + 0.75 + 0.5) / 3, abs=1e-4)
    motion = [row for row in result["gates"] if row["name"] == "motion_ratio"]
    assert [(row["op"], row["value"], row["ok"]) for row in motion] == [(">=", 1.05, True), ("<=", 1.05, True)]
    assert gates["fast_cost_ratio"]["value"] == pytest.approx(0.3)
    assert gates["diversity_ratio"]["value"] == 1
    assert gates["heldout_judge_drop"]["value"] < 0
    assert gates["world_gain"]["value"] == pytest.approx(5 / 3, rel=1e-3)
    assert gates["resume_identical"]["ok"]
    assert gates["onpolicy_ratio_error"]["value"] == 1e-7
    # Both recipes reach the score at the end of their runs.
    assert gates["forward_equivalents_ratio"]["value"] == pytest.approx(0.2)
    assert result["arms"]["residual"]["against"]["last"]["reference"] == "nft"
    assert result["arms"]["nft"]["chosen"]["motion_to_exact"]["value"] == pytest.approx(0.525)
    assert result["hacking"]["hack_judge"]["0"]["fired"]["motion"] == 20
    assert result["next"] == ["residual"]
    assert any(line.startswith("shuffled: ") for line in result["missing"])
    assert "missing: shuffled" in capsys.readouterr().out
    assert (tmp_path / "out.png").is_file()
    assert (tmp_path / "out_hack.png").is_file()
    # The tables of the pages.
    for page in dancegrpo_tables.PAGES:
        shutil.copyfile(dancegrpo_tables.DOCS / page, tmp_path / page)
    dancegrpo_tables.write_pages(str(target), tmp_path)
    text = (tmp_path / "dancegrpo_results.md").read_text()
    assert "| `nft-tiny` | 3 | 20, 20, 20 | 0.50 | 0.83 [" in text
    assert "| `motion_residual: 1` | 0.25 |" in text
    assert "| 20 |" in (tmp_path / "reward_hacking.md").read_text()


def test_a_gate_without_enough_seeds_is_missed(tmp_path):
    write_base(tmp_path)
    write_run(tmp_path, "nft.0", {"right": "1" * 8})
    gates = dancegrpo_report.payload_of(tmp_path)["gates"]
    assert not any(row["ok"] for row in gates if row["name"] not in ("ddp_2gpu_speedup", "two_gpu_max_abs"))
    assert {row["value"] for row in gates if "motion" in row["name"] or "gap" in row["name"]} == {None}


def test_the_report_refuses_to_mix(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text('{"gates": []}')
    whole_folder(tmp_path / "run")
    words = ["report", "--out", str(tmp_path / "run"), "-o", str(old)]
    assert dancegrpo.main(words) == 2
    assert "was measured in an earlier way" in capsys.readouterr().err
    (tmp_path / "old_nft-tiny_before.png").touch()
    assert dancegrpo.main([*words, "--replace"]) == 0
    assert not (tmp_path / "old_nft-tiny_before.png").exists()
    # A run with other sizes.
    path = tmp_path / "run" / "measured" / "nft.1.json"
    path.write_text(path.read_text().replace('"copies": 2', '"copies": 3'))
    assert dancegrpo.main([*words, "--replace"]) == 2
    assert "nft.1.json was measured with other settings" in capsys.readouterr().err
    # Pages take no numbers from an old result.
    old.write_text('{"gates": []}')
    for page in dancegrpo_tables.PAGES:
        shutil.copyfile(dancegrpo_tables.DOCS / page, tmp_path / page)
    dancegrpo_tables.write_pages(str(old), tmp_path)
    assert "<!-- table: shipped -->\n\nNot measured yet.\n" in (tmp_path / "dancegrpo_results.md").read_text()


def test_missing_gpus_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert dancegrpo.main(["train", "--arms", "nft", "--seeds", "0", "--gpus", "99", "--out", str(tmp_path)]) == 2
    assert "--gpus has 99, but torch finds" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_nothing_measured_is_one_line(tmp_path, capsys):
    assert dancegrpo.main(["report", "--out", str(tmp_path), "-o", str(tmp_path / "x.json")]) == 2
    assert "has no measurement of the base model" in capsys.readouterr().err


# From training to the report, tiny, on the CPU.


def test_training_measuring_and_reporting(tmp_path, monkeypatch):
    run = Run(arm="nft", seed=0, out=tmp_path, tiny=True)
    dancegrpo_job.train(run, "cpu")
    heads = [dancegrpo_job.head_of(dancegrpo_job.snapshot(run, number)) for number in (1, 2)]
    assert all(head["forward_equivalents"] >= mark for head, mark in zip(heads, run.marks, strict=True))
    assert heads[-1]["step"] == json.loads(run.done.read_text())["steps"]
    assert not run.jobs([])["measure"].done

    sizes = Sizes.of(tiny=True)
    settings = dancegrpo_measure.settings_of(sizes)
    bench = Bench(sizes, "cpu")
    with pytest.raises(UserError, match="measure base first"):
        dancegrpo_measure.Measuring(bench, run, settings)
    check_measuring_the_base_model_goes_on(bench, tmp_path, settings, monkeypatch)
    monkeypatch.setitem(dancegrpo_arms.ARMS, "nft", Arm(what="`nft-tiny`", recipe="nft-tiny", parted=True))
    monkeypatch.setattr(dancegrpo_measure, "SHARES", (0.5,))
    dancegrpo_measure.Measuring(bench, run, settings)()
    found = json.loads(run.measured.read_text())
    assert run.jobs([])["measure"].done
    assert set(found["points"]) == {"01", "02", "raw", "mix0.5"}
    assert len(found["points"]["02"]["test"]["world"]) == sizes.test

    # Share 0 of the way to the tuned weights is the base model, and it has the same clips as before.
    bench.use(dancegrpo_job.snapshot(run, 2), 0.0)
    base = json.loads((tmp_path / "measured" / "base.json").read_text())["points"]["base"]
    assert bench.group("valid")[0] == base["valid"]

    assert dancegrpo.main(["report", "--out", str(tmp_path), "-o", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["arms"]["nft"]["seeds"] == [0]
    assert len(result["arms"]["nft"]["curve"]) == 3
    assert (tmp_path / "out_nft-tiny_after.png").is_file()
    assert [*dancegrpo.progress([run])] == []
    check_another_machine(run, tmp_path)
    run.measured.write_text(run.measured.read_text().replace('"complete": true', '"complete": false'))
    assert [*dancegrpo.progress([run])] == ["  nft.0: trained, 2 of 2 checkpoints measured"]
    # Half of its measurements would be mixed with those of another training.
    assert "nft.0.json" not in [path.name for path in dancegrpo.kept_files(tmp_path)]


def check_measuring_the_base_model_goes_on(bench, out, settings, monkeypatch):
    """A call that is interrupted continues after the groups that are in the file."""
    drawn = []

    def cut_after_two(name, group=bench.group):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(name)
        return group(name)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "group", cut_after_two)
        with pytest.raises(KeyboardInterrupt):
            dancegrpo_measure.measure_base(bench, out, settings)
    place = out / "measured" / "base.json"
    first = json.loads(place.read_text())
    assert not first["complete"]
    assert [*first["points"]["base"]] == ["test", "valid"]
    dancegrpo_measure.measure_base(bench, out, settings)
    whole = json.loads(place.read_text())
    assert whole["complete"]
    assert whole["points"]["base"]["test"] == first["points"]["base"]["test"]
    assert {*whole["points"]["base"]} == {"test", "valid", "many", "guided", "clean", "best"}


def check_another_machine(run, place):
    """What --back keeps is enough: a measured run is not trained again, and the next run has its contact sheet."""
    kept = [path.relative_to(run.out).as_posix() for path in dancegrpo.kept_files(run.out)]
    assert kept[:3] == ["measured/base.json", "measured/nft.0.json", "measured/base-clips.safetensors"]
    assert "measured/nft.0.02.png" in kept
    pack_files([run.out / name for name in kept], run.out, place / "back")
    unpack(place / "back", place / "other")
    runs = [Run(arm=arm, seed=0, out=place / "other", tiny=True) for arm in ("nft", "fast")]
    whole = dancegrpo.jobs_of(runs, [], train=True, measure=True)
    assert [job.name for job in whole] == ["fast.0", "measure.fast.0"]
    # --later asks for the weights, which stayed on the first machine.
    assert [job.name for job in dancegrpo.jobs_of(runs, [], train=True, measure=False)] == ["nft.0", "fast.0"]
