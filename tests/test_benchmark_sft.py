"""The benchmarks of fine-tuning, merging and prompts run at tiny sizes, and their reports compute what they say."""

import json
import math

import pytest
import torch

from benchmarks import (
    merging_hacked,
    merging_lora,
    merging_report,
    prompt,
    prompt_report,
    sft_clips,
    sft_measure,
    sft_report,
)
from benchmarks.docs_tables import of_result
from benchmarks.embedded_sampling import load
from benchmarks.lit_video_files import pack_files, unpack
from benchmarks.prompt_inputs import FORMS, hard_prompts, long_prompts, short_prompts
from benchmarks.sft import jobs_of, kept_files
from benchmarks.sft_arms import MERGED, Run, named_arms
from benchmarks.sft_clips import PALETTE, check_autoencoder, rendered, scenes, write_folder
from benchmarks.sft_job import TINY_CLIPS, train
from benchmarks.sft_measure import Measuring, SftBench
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.video import read_video
from postgen.world import Palette
from postgen.world.check import check_batch


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with tiny runs of all kinds, measured."""
    folder = tmp_path_factory.mktemp("sft")
    write_folder(folder / "data", device="cpu", **TINY_CLIPS)
    runs = [Run(arm=arm, seed=0, out=folder, tiny=True) for arm in ("lora_replay", "constant", "annealed")]
    for run in runs:
        run.prepare()
        train(run, "cpu")
    bench = SftBench("cpu", tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_measure, "MERGES", ("linear", "1-sqrt"))
        for name in ("base", *(run.name for run in runs)):
            Measuring(bench, name, folder, tiny=True)()
    return folder


def test_runs_and_measurements_are_done(out):
    runs = [Run(arm=arm, seed=0, out=out, tiny=True) for arm in ("lora_replay", *MERGED)]
    assert jobs_of(runs, []) == []
    annealed = (out / "runs" / "annealed.0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(annealed[-1])["step"] == 3


def test_another_machine_goes_on_with_what_is_kept(out, tmp_path):
    kept = [path.relative_to(out).as_posix() for path in kept_files(out)]
    assert {"measured/base-new.safetensors", "measured/base-old.safetensors"} < {*kept}
    pack_files([out / name for name in kept], out, tmp_path / "back")
    unpack(tmp_path / "back", tmp_path / "other")
    done, new = (Run(arm=arm, seed=0, out=tmp_path / "other", tiny=True) for arm in ("lora_replay", "full"))
    assert jobs_of([done], []) == []
    # The weights of a measured run stay on its machine; the training clips are written again.
    assert [job.name for job in jobs_of([done, new], [])] == ["data", "full.0", "measure.full.0"]
    # Half of its measurements would be mixed with those of another training.
    done.measured.write_text(done.measured.read_text().replace('"complete": true', '"complete": false'))
    assert done.measured not in [*kept_files(done.out)]
    assert [job.name for job in jobs_of([done], [])] == ["data", "lora_replay.0", "measure.lora_replay.0"]


def test_an_earlier_way_of_measuring_is_refused(out, tmp_path):
    base = json.loads((out / "measured" / "base.json").read_text())
    del base["autoencoded"]
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "base.json").write_text(json.dumps(base))
    with pytest.raises(UserError, match="was measured in an earlier way: run 'train' with another --out"):
        sft_report.payload(tmp_path)


def test_report_of_fine_tuning(out):
    found = sft_report.payload(out)
    row = found["rows"]["lora_replay"]
    assert row["old"]["drop"]["value"] == pytest.approx(found["base"]["old"] - row["old"]["right"]["value"])
    assert 0 <= found["ceiling"] <= 1
    assert found["exact_right"] <= 1
    # The arm of the gates is not measured: it says so and misses them.
    values = {gate["name"]: gate["value"] for gate in found["gates"]}
    assert values["sft_new_world_right"] is None
    assert values["resume_identical"] is None
    text = "\n".join(line for lines in of_result(found, sft_report.TABLES).values() for line in lines)
    assert "not measured" in text
    assert "missed" in text


def test_report_of_merging(out):
    found = merging_report.payload(out)
    rows = found["averages"]["rows"]
    assert set(rows) >= {"annealed", "last checkpoint", "best single checkpoint", "linear", "1-sqrt"}
    # Averages differ from the last checkpoint, and the runs from each other.
    assert len({row["loss"] for row in rows.values()}) >= 4
    # One seed is not three.
    assert found["gates"][0] == {**found["gates"][0], "name": "merge_vs_annealed", "value": None, "ok": False}


def test_lora_errors(out):
    found = merging_lora.measure(out, tiny=True)
    assert max(row["error"] for row in found["cases"]) < 1e-5
    assert min(row["factor_average_error"] for row in found["cases"]) > 0.01
    for row in found["equal"]:
        assert row["exact"] == pytest.approx(1)
        assert row["peft_linear"] == pytest.approx(row["copies"])
    gates = {gate["name"]: gate["ok"] for gate in merging_report.payload(out)["gates"]}
    assert gates["lora_merge_error"]


def test_written_clips_are_judged_right(tmp_path):
    write_folder(tmp_path, count=3, held_out=1, size=96, frames=17, device="cpu")
    wanted = scenes("train", 3, 17, new=True)
    clips = torch.stack([read_video(tmp_path / "new" / f"{number:05d}.mp4") for number in range(3)])
    reports = check_batch(PALETTE.unpaint(clips.float()), [scene.plain for scene in wanted])
    assert sum(report.all_right for report in reports) == 3
    assert all("sage" in scene.prompt or "slate" in scene.prompt for scene in wanted)
    assert not {scene.spec for scene in wanted} & {scene.spec for scene in scenes("test", 6, 17, new=True)}
    assert rendered(wanted[:2], 32, 5).shape == (2, 5, 3, 32, 32)


def test_a_world_that_the_autoencoder_cannot_show_is_refused(monkeypatch):
    model = denoiser_for(load(embedded_model(), "cpu"))
    check_autoencoder(model, count=2)
    # New hues come out as those of the old world.
    monkeypatch.setattr(sft_clips, "PALETTE", Palette())
    with pytest.raises(UserError, match="shows 0 of 2 exact clips of the new world wholly right"):
        check_autoencoder(model, count=2)


def test_clips_are_rendered_in_parts(monkeypatch):
    wanted = scenes("test", 3, 5, new=True)
    whole = rendered(wanted, 16, 5)
    monkeypatch.setattr(sft_clips, "_AT_ONCE", 2)
    assert torch.equal(rendered(wanted, 16, 5), whole)


def test_recovered_share_of_a_hacked_run():
    def point(world, clip, bright):
        row = {"world": [world], "clip": [clip], "bright": [bright], "motion": [0.1]}
        return {"valid": row, "test": row}

    points = {
        "0": point(0.8, 0.5, 0.4),
        "0.25": point(0.75, 0.6, 0.5),
        "0.5": point(0.6, 0.4, 0.6),
        "0.75": point(0.4, 0.3, 0.7),
        "1": point(0.3, 0.2, 0.8),
    }
    row = merging_hacked.row_of({"arm": "hack_bright", "seed": 0, "points": points})
    assert row["eta"] == 0.25
    assert row["recovered"] == pytest.approx((0.75 - 0.3) / (0.8 - 0.3))
    assert row["reward_kept"] == pytest.approx(0.25)
    points["1"] = point(0.79, 0.2, 0.8)
    assert merging_hacked.row_of({"arm": "hack_bright", "seed": 0, "points": points})["recovered"] is None


def test_prompts_and_their_words():
    short = short_prompts(2)
    assert [each.kind for each in short] == [*FORMS, *FORMS]
    assert all(prompt.kept(each, each.text) for each in (*short, *hard_prompts(), *long_prompts(4)))
    number = next(each for each in hard_prompts() if each.text == "3 dogs")
    assert not prompt.kept(number, "30 dogs run")
    quoted = next(each for each in hard_prompts() if '"' in each.text)
    assert not prompt.kept(quoted, quoted.text.replace("OPEN", "Open"))


def test_tiny_run_of_prompts(tmp_path):
    assert prompt.main(["run", "--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = prompt.read_rows(tmp_path)
    assert len(rows) == len(FORMS) + 2
    for row in rows:
        if row["text"] == row["prompt"]:
            assert row["raw"] == row["enhanced"]
    found = prompt_report.payload(rows, list(prompt.hard_rows()), {})
    assert found["entities"]["lost"] == []
    gain = found["short"]["score"]["gain"]
    mean = sum(row["enhanced"]["score"] - row["raw"]["score"] for row in rows if row["kind"] != "long") / len(FORMS)
    assert gain["value"] == pytest.approx(mean, rel=1e-3, abs=1e-9)
    assert math.isfinite(found["short"]["motion_ratio"])


def test_wrong_names(tmp_path):
    with pytest.raises(UserError, match="unknown arm"):
        named_arms(["fulll"])
    with pytest.raises(UserError, match="unknown run"):
        Run.named("full", tmp_path)
    for report in (sft_report, merging_report):
        with pytest.raises(UserError, match="no measurements"):
            report.payload(tmp_path)
    with pytest.raises(UserError, match="not complete"):
        prompt.read_rows(tmp_path)
