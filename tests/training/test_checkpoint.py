"""Checkpoints: exact resume, complete or absent files, and only for the model that wrote them."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.train import main
from postgen.training import checkpoint
from tests import children
from tests.training.tiny import TinyConfig, TinyTrainer

PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "rank-0.safetensors", "rank-0.json")
SETTINGS = {
    "max_steps": 14,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "save_steps": 5,
    "logging_steps": 4,
    "eval_steps": 7,
    "save_total_limit": None,
    "disable_tqdm": True,
    "report_to": [],
    "device": "cpu",
}


def make(folder, **settings):
    return TinyTrainer(TinyConfig(output_dir=str(folder), **{**SETTINGS, **settings}))


def parts(folder):
    return {name: (folder / name).read_bytes() for name in PARTS}


def metrics(folder):
    """Return the rows of the log without measured times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("step_time", "seconds")} for row in rows]


def recipe(folder, **settings):
    path = folder / "recipe.yaml"
    values = {"method": "tests.training.tiny:TinyTrainer", "output_dir": str(folder / "run"), **SETTINGS, **settings}
    path.write_text(yaml.safe_dump(values))
    return path


def test_killed_and_resumed_is_the_same_bit_by_bit(tmp_path):
    straight = make(tmp_path / "straight")
    straight.train()
    path = recipe(tmp_path, signal_at=8)
    code, said = children.run("postgen.train", path)
    assert code == -signal.SIGKILL, said
    run = tmp_path / "run"
    assert [found.name for found in checkpoint.find(run)] == ["checkpoint-5"]
    assert main([str(path), "--resume", "--signal_at", "0"]) == 0
    assert parts(run / "checkpoint-14") == parts(tmp_path / "straight" / "checkpoint-14")
    assert metrics(run) == metrics(tmp_path / "straight")
    exports = [folder / "export" / "net.safetensors" for folder in (run, tmp_path / "straight")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert straight.cursor == 28


def test_a_finished_run_resumes_to_nothing(tmp_path, capsys):
    make(tmp_path).train()
    assert f"step 14: the trained model is in {tmp_path / 'export'}\n" in capsys.readouterr().err
    before, lines = parts(tmp_path / "checkpoint-14"), metrics(tmp_path)
    result = make(tmp_path, resume_from_checkpoint="latest").train()
    assert result.global_step == 14
    assert parts(tmp_path / "checkpoint-14") == before
    assert metrics(tmp_path) == lines
    said = capsys.readouterr().err
    assert "resumed from" in said
    assert "at step 14 and max_steps is 14: nothing is left to train, raise max_steps to continue" in said
    assert f"step 14: the trained model is in {tmp_path / 'export'} (no step was trained in this call)" in said


def test_settings_of_the_resumed_run_count(tmp_path, capsys):
    make(tmp_path, max_steps=5).train()
    changed = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = make(tmp_path, resume_from_checkpoint=True, allow_changed=list(changed), save_steps=0, **changed)
    run.train()
    assert run.log.newest["learning_rate"] == 0.5
    said = capsys.readouterr().err
    assert "max_steps: 5 -> 14, learning_rate: 0.01 -> 0.5, lr_scheduler_type: cosine -> constant" in said
    assert "save_steps: 5 -> 0" in said


def test_settings_that_change_what_is_learned_are_refused_before_the_model_is_made(tmp_path, capsys):
    make(tmp_path, max_steps=5).train()
    before, lines = parts(tmp_path / "checkpoint-5"), metrics(tmp_path)
    run = make(
        tmp_path, resume_from_checkpoint="latest", seed=7, gradient_accumulation_steps=1, allow_changed=["seed"]
    )
    run.build = lambda: pytest.fail("a model was made")
    with pytest.raises(
        UserError, match=r"checkpoint-5 was written with other settings: gradient_accumulation_steps: 2 -> 1"
    ):
        run.train()
    with pytest.raises(UserError, match=r"allow the new ones with --allow_changed gradient_accumulation_steps seed$"):
        make(tmp_path, resume_from_checkpoint="latest", seed=7, gradient_accumulation_steps=1).train()
    with pytest.raises(UserError, match=r"Unknown key 'sead' in allow_changed. Did you mean 'seed'"):
        make(tmp_path, allow_changed=["sead"])
    assert (parts(tmp_path / "checkpoint-5"), metrics(tmp_path)) == (before, lines)
    make(tmp_path, resume_from_checkpoint="latest", seed=7, evaluate_only=True).train()
    capsys.readouterr()
    make(tmp_path, resume_from_checkpoint="latest", max_steps=6).train()
    assert "max_steps: 5 -> 6, the learning rate now follows the cosine schedule" in capsys.readouterr().err


def test_a_checkpoint_from_before_a_setting_had_its_default(tmp_path, capsys):
    make(tmp_path, max_steps=5).train()
    path = tmp_path / "checkpoint-5" / "state.json"
    head = json.loads(path.read_text())
    assert head["meta"]["config"].pop("adam_beta1") == 0.9
    path.write_text(json.dumps(head))
    make(tmp_path, resume_from_checkpoint="latest", max_steps=5).train()
    assert "changed settings" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"other settings: adam_beta1: 0.9 -> 0.5\. "):
        make(tmp_path, resume_from_checkpoint="latest", adam_beta1=0.5).train()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_resume_is_an_error_unless_it_may_begin(tmp_path, capsys, there):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(UserError, match=r"run holds no checkpoint to resume. Omit --resume"):
        make(folder, resume_from_checkpoint="latest", max_steps=2).train()
    assert folder.exists() == there
    run = make(folder, resume_from_checkpoint="auto", max_steps=2)
    run.train()
    assert len(run.history) == 2
    assert "run holds no checkpoint: a new run begins" in capsys.readouterr().err
    run = make(folder, resume_from_checkpoint="auto", max_steps=3)
    run.train()
    assert len(run.history) == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--resume"], "latest"),
        (["--resume", "--seed", "3"], "latest"),
        (["--resume", "auto", "--seed", "3"], "auto"),
        (["--resume=auto", "--seed", "3"], "auto"),
        (["--seed", "3", "--resume", "runs/x/checkpoint-5"], "runs/x/checkpoint-5"),
    ],
)
def test_resume_takes_the_newest_or_what_is_named(tmp_path, monkeypatch, words, wanted):
    found = []
    monkeypatch.setattr(TinyTrainer, "from_config", lambda config: found.append(config) or make(tmp_path / "other"))
    assert main([str(recipe(tmp_path, max_steps=1)), *words]) == 0
    assert found[0].resume_from_checkpoint == wanted


def test_an_old_run_is_not_overwritten(tmp_path):
    make(tmp_path, max_steps=2).train()
    with pytest.raises(UserError, match="holds the checkpoints of an earlier run"):
        make(tmp_path).train()


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    make(tmp_path, max_steps=10).train()
    earlier = str(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match="checkpoint-10 is newer than checkpoint-5"):
        make(tmp_path, resume_from_checkpoint=earlier).train()
    (tmp_path / "checkpoint-10").rename(tmp_path / "put-away")
    make(tmp_path, resume_from_checkpoint=earlier, max_steps=6).train()
    assert [line["step"] for line in metrics(tmp_path)] == [4, 6]


def test_only_the_newest_are_kept(tmp_path):
    make(tmp_path, save_steps=2, save_total_limit=3).train()
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-10", "checkpoint-12", "checkpoint-14"]
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]


def test_incomplete_folders_are_ignored_and_remains_swept(tmp_path):
    make(tmp_path, max_steps=10).train()
    (tmp_path / ".checkpoint-12.ab12.part").mkdir()
    (tmp_path / "export").rename(tmp_path / ".export.ab12.old")
    torn = tmp_path / "checkpoint-10" / "weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    (tmp_path / "checkpoint-12").mkdir()
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-5"]
    run = make(tmp_path, max_steps=7, resume_from_checkpoint="latest")
    checkpoint.sweep(tmp_path)
    assert (tmp_path / "export" / "net.safetensors").is_file()
    run.train()
    assert len(run.history) == 2
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]
    with pytest.raises(UserError, match=r"checkpoint-12\.damaged is not a complete checkpoint"):
        make(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-12.damaged")).train()


def test_a_failed_save_leaves_nothing(tmp_path):
    run = make(tmp_path)
    run.state_dict = lambda: {"broken": object()}
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        run.train()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_failed_export_leaves_the_old_one(tmp_path):
    make(tmp_path, max_steps=2).train()
    before = (tmp_path / "export" / "net.safetensors").read_bytes()
    run = make(tmp_path, max_steps=4, resume_from_checkpoint="latest")

    def export(folder, weights):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    run.export = export
    with pytest.raises(OSError, match="disk full"):
        run.train()
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["net.safetensors"]
    assert (tmp_path / "export" / "net.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 9}, r"does not fit this model: .*net.0.weight has shape \(8, 4\) instead of \(9, 4\)"),
        ({"frozen": True, "width": 9}, "does not fit this model"),
        ({"ema_decay": 0.0}, "has averaged weights: set ema_decay"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, settings, message):
    make(tmp_path, max_steps=2).train()
    with pytest.raises(UserError, match=message):
        make(tmp_path, resume_from_checkpoint="latest", allow_changed=list(settings), **settings).train()


def test_frozen_weights_are_not_in_a_checkpoint(tmp_path):
    make(tmp_path, frozen=True, max_steps=2).train()
    saved = checkpoint.read(tmp_path / "checkpoint-2")
    assert "net.3.weight" in saved.weights
    assert saved.ema.keys() == {"net.3.weight", "net.3.bias"}
    assert {name.partition("|")[0] for name in saved.optimizer} == saved.ema.keys()


@pytest.mark.parametrize("place", ["export", "", "checkpoint-6", "pipeline"])
def test_init_from_takes_weights_alone(tmp_path, place):
    make(tmp_path / "first", max_steps=6).train()
    exported = load_file(tmp_path / "first" / "export" / "net.safetensors")
    if place == "pipeline":
        (tmp_path / "first" / "pipeline").mkdir()
        (tmp_path / "first" / "export").rename(tmp_path / "first" / "pipeline" / "net")
    run = make(tmp_path / "second", init_from=str(tmp_path / "first" / place), max_steps=1, learning_rate=1e-12)
    run.train()
    assert run.cursor == 2
    # These are the EMA weights after one step with a negligible learning rate.
    for name, value in exported.items():
        torch.testing.assert_close(run.history[0][f"net.{name}"], value, rtol=0, atol=1e-6)


def test_init_from_that_does_not_fit(tmp_path):
    make(tmp_path / "first", max_steps=1).train()
    export = str(tmp_path / "first" / "export")
    with pytest.raises(UserError, match=r"does not fit: .*0.weight has shape \(8, 4\) instead of \(5, 4\)"):
        make(tmp_path / "second", init_from=export, width=5).train()
    with pytest.raises(UserError, match="is not a folder"):
        make(tmp_path / "third", init_from=str(tmp_path / "nowhere")).train()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*.safetensors in"):
        make(tmp_path / "fourth", init_from=str(tmp_path / "empty")).train()
    (tmp_path / "empty" / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"holds a LoRA and no whole network\. Continue from it with lora_path"):
        make(tmp_path / "fifth", init_from=str(tmp_path / "empty")).train()
