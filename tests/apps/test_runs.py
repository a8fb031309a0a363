"""Training runs in the app: written by the logger of the trainers, followed while they grow, only in their folder."""

import json
import os
import warnings

import pytest
import yaml

from postgen.apps.run_plots import COLOURS, GROUPS, PIECES, group_lines, metric_lines, others, table
from postgen.apps.runs import Runs
from postgen.apps.settings import AppSettings
from postgen.errors import UserError
from postgen.training.logging import MetricsFile
from postgen.training.warning_log import kept_warnings
from tests.grpo.toy import grpo, near
from tests.training.tiny import TinyConfig, TinyTrainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two real runs: one with rewards, evaluations and samples, and one of another trainer in a subfolder."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": "a"}, {"prompt": "bb"}]
    grpo(
        folder / "dance",
        eval_dataset=rows,
        eval_reward_funcs=near,
        eval_steps=1,
        eval_grid=2,
        eval_prompts=2,
        num_generations_eval=1,
        max_steps=3,
        save_steps=2,
    ).train()
    TinyTrainer(
        TinyConfig(output_dir=str(folder / "more" / "tiny"), max_steps=4, logging_steps=1, device="cpu", report_to=[])
    ).train()
    return folder


def metrics(folder):
    """Create a run that has only the metrics file of the logger."""
    folder.mkdir()
    return MetricsFile(folder / "metrics.jsonl", 0)


def titled(title):
    return next(group for group in GROUPS if group.title == title)


def test_runs_are_found_by_name_and_never_by_path(root, tmp_path):
    assert sorted(Runs(root).names()) == ["dance", "more/tiny"]
    assert Runs(None).names() == []
    for wrong in ("../dance", str(root / "dance"), "more", ".", "", "dance/samples", None, 3, ["dance"], "dance\0"):
        with pytest.raises(UserError, match="no such run"):
            Runs(root).get(wrong)


def test_what_leads_out_of_the_folder_is_refused(root, tmp_path):
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    metrics(outside).append(1, {"reward": 1.0})
    (outside / "secret.png").write_bytes(next((root / "dance" / "samples").glob("*.png")).read_bytes())
    runs.mkdir()
    (runs / "linked").symlink_to(outside)
    inside = runs / "own"
    inside.mkdir()
    (inside / "config.yaml").write_text("max_steps: 5\n")
    (inside / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    (inside / "warnings.jsonl").symlink_to(outside / "metrics.jsonl")
    (inside / "samples").symlink_to(outside)
    assert Runs(runs).names() == ["own"]
    run = Runs(runs).get("own")
    assert (run.curves(), run.newest(), run.samples(), run.warnings()) == ({}, {}, [], [])
    assert run.standing().age is None
    (inside / "samples").unlink()
    (inside / "samples").mkdir()
    (inside / "samples" / "step-000001.png").symlink_to(outside / "secret.png")
    assert run.samples() == []
    (inside / "metrics.jsonl").unlink()
    (inside / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 2.0}) + "\n")
    assert run.curves() == {"reward": [(1, 2.0)]}  # a regular file in the folder itself is read


def test_a_run_of_rewards_has_every_group_it_should(root):
    run = Runs(root).get("dance")
    curves = {run.name: run.curves()}
    lines = {group.title: [label for label, _ in group_lines(group, curves)] for group in GROUPS}
    assert lines["Reward"] == ["training", "held-out prompts"]
    assert lines["Each reward"] == ["near", "near, held out"]
    assert lines["Held-out judge"] == ["near"]
    assert lines["KL"] == ["to the rollout"]
    assert sorted(lines["Ratio"]) == ["max", "mean", "min"]
    for title in ("Spread of the reward", "Motion", "Loss", "Learning rate", "Seconds per step"):
        assert lines[title], title
    named = {metric for metric in curves["dance"] if any(group.label(metric) for group in GROUPS)}
    assert {*others(curves["dance"]), *named} == {*curves["dance"]}
    assert "grad_norm" in others(curves["dance"])
    assert "diversity/latent_pairwise" in others(curves["dance"])


def test_it_says_how_far_it_is_and_what_stands_beside_the_curves(root):
    run = Runs(root).get("dance")
    standing = run.standing()
    assert (standing.step, standing.total, standing.done, standing.writes) == (3, 3, True, False)
    assert [sample.step for sample in run.samples()] == [1, 2, 3]
    assert [(one.step, one.sound) for one in run.checkpoints()] == [(3, True), (2, True)]
    recipe = yaml.safe_load(run.recipe())
    assert (recipe["max_steps"], recipe["output_dir"]) == (3, "dance")
    assert str(root) not in run.recipe()
    (root / "dance" / "checkpoint-2" / "weights.safetensors").write_bytes(b"")
    assert [(one.step, one.sound) for one in run.checkpoints()] == [(3, True), (2, False)]


def test_a_run_that_writes_is_followed(tmp_path):
    file = metrics(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("max_steps: 100\n")
    run = Runs(tmp_path).get("run")
    assert run.standing().age is None
    file.append(1, {"reward": 0.5, "step_time": 2.0})
    before = run.mark()
    assert run.curves()["reward"] == [(1, 0.5)]
    assert run.mark() == before
    with file.path.open("a") as half:
        half.write('{"step": 2, "rew')
    assert run.curves()["reward"] == [(1, 0.5)]
    with file.path.open("a") as half:
        half.write('ard": 0.75, "step_time": 4.0}\n')
    assert run.curves()["reward"] == [(1, 0.5), (2, 0.75)]
    assert run.mark() != before
    file.append(3, {"loss": float("nan")})
    assert run.newest()["loss"] is None
    standing = run.standing()
    assert (standing.step, standing.writes) == (3, True)
    assert 97 * 4.0 - 60 < standing.seconds_left <= 97 * 4.0
    os.utime(file.path, (0, 0))
    assert (run.standing().writes, run.standing().seconds_left) == (False, None)
    MetricsFile(file.path, 1)  # a resume from step 1 drops later lines
    assert run.curves()["reward"] == [(1, 0.5)]


def test_a_long_run_is_thinned_and_only_new_lines_are_read(tmp_path, monkeypatch):
    file = metrics(tmp_path / "run")
    with file.path.open("a") as lines:
        for step in range(1, 20_001):
            lines.write(json.dumps({"step": step, "reward": 9.0 if step == 777 else step % 7 / 7}) + "\n")
    run = Runs(tmp_path).get("run")
    lines = group_lines(titled("Reward"), {"run": run.curves()})
    rows = table(lines)["data"]
    assert sorted({row[2] for row in rows}) == sorted(COLOURS)
    data = [row for row in rows if row[1] is not None]
    assert len(data) <= 2 * PIECES + 2
    assert [777, 9.0, "0"] in data
    assert (data[0][0], data[-1][0]) == (1, 20_000)

    from postgen.training import run_curves as curves

    read = []
    monkeypatch.setattr(curves, "metrics_row", lambda line: read.append(line) or json.loads(line))
    run.curves()
    assert read == []
    file.append(20_001, {"reward": 1.0})
    assert run.curves()["reward"][-1] == (20_001, 1.0)
    assert len(read) == 1


def test_several_runs_stand_in_one_plot(root):
    runs = Runs(root)
    curves = {name: runs.get(name).curves() for name in ("dance", "more/tiny")}
    assert [label for label, _ in group_lines(titled("Loss"), curves)] == ["dance: loss", "dance: policy", "more/tiny"]
    assert [label for label, _ in metric_lines("grad_norm", curves)] == ["dance", "more/tiny"]
    assert [label for label, _ in metric_lines("root", curves)] == ["more/tiny"]
    assert [label for label, _ in metric_lines("root", {"more/tiny": curves["more/tiny"]})] == ["root"]


def test_warnings_of_a_run_are_kept_where_the_app_finds_them(tmp_path):
    class Warning_(TinyTrainer):
        def training_step(self):
            warnings.warn(f"step {self.global_step} looks odd\nvery", stacklevel=1)
            return super().training_step()

    before = warnings.showwarning
    with pytest.warns(UserWarning, match="looks odd"):
        Warning_(TinyConfig(output_dir=str(tmp_path / "run"), max_steps=3, device="cpu", report_to=[])).train()
    assert warnings.showwarning is before
    found = Runs(tmp_path).get("run").warnings()
    texts = [(row["step"], row["text"], row["times"]) for row in found if "odd" in row["text"]]
    assert texts == [(k, f"step {k} looks odd very", 1) for k in (2, 1, 0)]


def test_equal_warnings_are_one_and_a_damaged_line_is_none(tmp_path):
    metrics(tmp_path / "run")
    for _ in range(3):
        with pytest.warns(UserWarning, match="failed"), kept_warnings(tmp_path / "run", lambda: 4, main=True):
            warnings.warn("a reward failed", stacklevel=1)
    with (tmp_path / "run" / "warnings.jsonl").open("a") as file:
        file.write('[]\n{"text": 3}\n{"step"\n{"text": "half wri')
    rows = Runs(tmp_path).get("run").warnings()
    assert [(row["step"], row["text"], row["times"]) for row in rows] == [(4, "a reward failed", 3)]
    with pytest.warns(UserWarning, match="other"), kept_warnings(tmp_path / "other", lambda: 0, main=False):
        warnings.warn("of another process", stacklevel=1)
    assert not (tmp_path / "other").exists()


def test_a_broken_configuration_is_no_error(tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("max_steps: [", "- a\n- b", "max_steps: many", "\x00", "a: &a [*a]", "x" * 2**19):
        (tmp_path / "run" / "config.yaml").write_text(text)
        run = Runs(tmp_path).get("run")
        assert run.standing().total == 0
        assert isinstance(run.recipe(), str)


def test_settings_refuse_a_folder_of_runs_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no folder of training runs"):
        AppSettings(runs=tmp_path / "none")


def test_the_toy_draws_pictures(root):
    from postgen.video import read_picture

    sample = Runs(root).get("dance").samples()[0]
    assert sample.video is None
    assert read_picture(sample.sheet).size[0] > 1
