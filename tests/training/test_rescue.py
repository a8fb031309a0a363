"""Rescue of a run from spikes of its loss."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.train import main
from tests import children
from tests.training.spiking import SpikingConfig, SpikingTrainer

SETTINGS = {
    **{"max_steps": 13, "save_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4},
    **{"rescue_spike": 20.0, "rescue_window": 5, "rescue_patience": 2, "rescue_last": 2, "save_total_limit": 1},
    **{"ema_decay": 0.5, "disable_tqdm": True, "report_to": [], "device": "cpu"},
}

OFF = {"rescue_spike": 0.0, "rescue_window": 50, "rescue_patience": 3, "rescue_last": 3}


def make(folder, **settings):
    return SpikingTrainer(SpikingConfig(output_dir=str(folder), **{**SETTINGS, **settings}))


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("step_time", "seconds")} for row in found]


def stored(folder, step, group="weights"):
    return load_file(folder / f"checkpoint-{step}" / f"{group}.safetensors")


def check_mean(run, folders):
    for name, value in run.trained().items():
        mean = sum(folder[name].double() for folder in folders) / len(folders)
        torch.testing.assert_close(value.detach().double(), mean, rtol=1e-6, atol=1e-7)


def test_the_run_goes_on_from_the_mean_of_earlier_checkpoints(tmp_path, capsys):
    run = make(tmp_path, save_total_limit=None)
    run.train()
    # The checkpoint of step 12 was written after the first spike, so it is not in the mean.
    assert (tmp_path / "checkpoint-12").exists()
    check_mean(run, [stored(tmp_path, step) for step in (6, 9)])
    said = capsys.readouterr().err
    assert "step 13: the loss has spiked since step 12" in said
    assert "from the mean of checkpoint-6, checkpoint-9 with new moments" in said
    assert stored(tmp_path, 13, "optimizer") == {}
    kept = stored(tmp_path, 13, "ema")
    assert all(torch.equal(value, kept[name]) for name, value in stored(tmp_path, 9, "ema").items())
    found = [row for row in rows(tmp_path) if "rescue/count" in row]
    assert [(row["step"], row["rescue/first_spike"], row["rescue/count"]) for row in found] == [(13, 12, 1)]
    assert run.global_step == 13
    assert run.cursor == 13 * 4  # the data goes on


def test_a_loss_that_is_not_finite_is_a_spike_at_once(tmp_path):
    run = make(tmp_path, nan_at=8, spike_at=99, max_steps=8, save_total_limit=None)
    run.train()
    check_mean(run, [stored(tmp_path, step) for step in (3, 6)])
    again = make(tmp_path / "on", nan_at=8, spike_at=99, max_steps=20)
    again.train()
    assert all(torch.isfinite(value).all() for value in again.trained().values())
    losses = [row["loss"] for row in rows(tmp_path / "on") if "loss" in row]
    assert len(losses) == 19  # that of step 8 is gone
    assert all(loss is not None for loss in losses)
    with pytest.raises(FloatingPointError, match="the loss of step 8 is not finite"):
        make(tmp_path / "off", nan_at=8, spike_at=99, **OFF).train()


def test_weights_that_are_not_finite_are_rescued_before_they_are_saved(tmp_path, capsys):
    """The gradient of step 9 is NaN and its loss is finite."""
    broken = {"nan_gradient_at": 9, "spike_at": 99, "max_steps": 9}
    run = make(tmp_path, **broken, save_total_limit=None)
    run.train()
    check_mean(run, [stored(tmp_path, step) for step in (3, 6)])
    assert "the weights of step 9 are not finite: the run goes on from the mean of checkpoint-3, checkpoint-6" in (
        capsys.readouterr().err
    )
    again = make(tmp_path / "every", **broken, save_steps=1)
    again.train()
    check_mean(again, [stored(tmp_path / "every", step) for step in (7, 8)])
    for name, settings in (("none", {"save_steps": 12, "max_steps": 13}), ("off", OFF)):
        with pytest.raises(FloatingPointError, match=r"the (trained weights are|loss of step 10 is) not finite"):
            make(tmp_path / name, **{**broken, **settings}).train()
    assert "there is no earlier checkpoint" in capsys.readouterr().err


def test_checkpoints_of_a_spike_are_not_used_later(tmp_path):
    settings = {"save_steps": 1, "second_spike_at": 15, "max_steps": 17, "save_total_limit": None, "rescue_last": 4}
    last = {"merge_last": 9, "merge_keep": "always"}
    run = make(tmp_path, **settings, **last)
    run.train()
    # The first rescue, after step 13, leaves out the checkpoints 11 and 12; the second one 14 and 15.
    found = [row for row in rows(tmp_path) if "rescue/count" in row]
    assert [(row["step"], row["rescue/first_spike"]) for row in found] == [(13, 12), (16, 15)]
    report = json.loads((tmp_path / "export" / "merge_last.json").read_text())
    assert report["steps"] == [5, 6, 7, 8, 9, 10, 13, 16, 17]
    kept = [stored(tmp_path, step) for step in (8, 9, 10, 13)]
    found = stored(tmp_path, 16)
    for name, value in found.items():
        mean = sum(folder[name].double() for folder in kept) / 4
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
    again = make(tmp_path, **settings, **{**last, "merge_last": 3}, resume_from_checkpoint="latest")
    again.train()
    assert json.loads((tmp_path / "export" / "merge_last.json").read_text())["steps"] == [13, 16, 17]


def test_one_bad_batch_is_no_spike_and_off_changes_nothing(tmp_path):
    make(tmp_path / "on", spike_steps=1, rescue_window=9).train()
    assert not [row for row in rows(tmp_path / "on") if "rescue/count" in row]
    make(tmp_path / "off", spike_steps=1, **OFF).train()
    kept = stored(tmp_path / "off", 13)
    assert all(torch.equal(value, kept[name]) for name, value in stored(tmp_path / "on", 13).items())
    assert rows(tmp_path / "on") == rows(tmp_path / "off")


def test_the_number_of_rescues_is_limited(tmp_path, capsys):
    run = make(tmp_path, spike_at=8, spike_steps=9, max_steps=16, rescue_limit=2)
    run.train()
    assert len([row for row in rows(tmp_path) if "rescue/count" in row]) == 2
    assert "rescue_limit is 2, so the run goes on" in capsys.readouterr().err


def test_without_an_earlier_checkpoint_the_run_goes_on(tmp_path, capsys):
    make(tmp_path, save_steps=12).train()
    assert "there is no earlier checkpoint, so the run goes on" in capsys.readouterr().err


@pytest.mark.parametrize("killed", [11, 12, 14])
def test_a_killed_run_is_rescued_alike(tmp_path, killed):
    """Killed before the spike, in the middle of it, and after the rescue."""
    make(tmp_path / "straight", max_steps=17).train()
    path = tmp_path / "recipe.yaml"
    values = {**SETTINGS, "max_steps": 17, "method": "tests.training.spiking:SpikingTrainer", "signal_at": killed}
    path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}))
    code, said = children.run("postgen.train", path)
    assert code == -signal.SIGKILL, said
    assert main([str(path), "--resume", "--signal_at", "0"]) == 0
    for group in ("weights", "ema", "optimizer"):
        kept = stored(tmp_path / "straight", 17, group)
        found = stored(tmp_path / "run", 17, group)
        assert found.keys() == kept.keys()
        assert all(torch.equal(value, kept[name]) for name, value in found.items())
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_settings(tmp_path, capsys):
    made = {"output_dir": str(tmp_path), "device": "cpu"}
    for given, text in (
        ({"rescue_last": 2}, "rescue_last is 2, it must be left out without rescue_spike"),
        ({"rescue_spike": -1}, "rescue_spike is -1.0, it must be at least 0"),
        ({"rescue_spike": 5.0, "rescue_window": 4}, "rescue_window is 4, it must be from 5 to"),
        ({"rescue_spike": 5.0, "save_steps": 0}, "rescue_spike is 5.0, it must be 0 without save_steps"),
    ):
        with pytest.raises(UserError) as caught:
            SpikingConfig(**made, **given)
        assert text in str(caught.value)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"method": "tests.training.spiking:SpikingTrainer", **made, "rescue": {"last": 1}}))
    assert main([str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
