"""Averages of checkpoints: the merge at the end of a run, greedy soups, LoRA adapters."""

import json
import math
import signal
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.train import main
from postgen.training import Reason
from postgen.training.averages import average, greedy, kept, sound
from postgen.training.averages_checks import check_adapters
from postgen.training.averages_config import MergeConfig
from postgen.training.checkpoint_head import DamagedCheckpoint
from postgen.training.curves import KINDS, weights_of
from tests import children
from tests.training.measured import MeasuredConfig, MeasuredTrainer


class LoraTrainer(MeasuredTrainer):
    """Trains LoRA adapters; `layers` are those of the network."""

    dora = False

    def build(self):
        from peft import LoraConfig, inject_adapter_in_model

        net = super().build()["net"].requires_grad_(False)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "3"], use_dora=self.dora)
        return {"net": inject_adapter_in_model(config, net)}


@pytest.fixture
def trainer(tmp_path):
    def make(name="run", kind=MeasuredTrainer, **settings):
        settings = {"max_steps": 12, "learning_rate": 3e-2, "disable_tqdm": True, "report_to": [], **settings}
        settings = {"save_steps": 3, "per_device_train_batch_size": 4, **settings}
        return kind(MeasuredConfig(output_dir=str(tmp_path / name), device="cpu", **settings))

    return make


MERGE = {"merge_last": 3, "merge_metric": "eval_loss"}


def lines(run):
    return [json.loads(line) for line in (run.args.folder / "metrics.jsonl").read_text().splitlines()]


def report(run):
    return json.loads((run.args.folder / "export" / "merge_last.json").read_text())


def exported(run):
    return load_file(run.args.folder / "export" / "net.safetensors")


def stored(run, step):
    return load_file(run.args.folder / f"checkpoint-{step}" / "weights.safetensors")


@pytest.mark.parametrize("kind", ["sma", "wma", "cosine"])
def test_the_last_checkpoints_are_merged(trainer, kind):
    run = trainer(**MERGE, merge_kind=kind, merge_keep="always", save_total_limit=1)
    run.train()
    weights = weights_of(kind, 3)
    files = [stored(run, step) for step in (6, 9, 12)]  # kept although save_total_limit is 1
    for name, value in exported(run).items():
        wanted = sum(weight * file[f"net.{name}"].double() for weight, file in zip(weights, files, strict=True))
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    found = report(run)
    assert found["steps"] == [6, 9, 12]
    assert found["weights"] == weights
    assert found["exported"] == "merged"
    row = lines(run)[-1]
    assert row["merge/last"] == found["last"]
    assert row["merge/merged"] == found["merged"]
    assert row["merge/exported"] == 1


def test_the_metric_decides(trainer, capsys):
    outcomes = []
    for metric in ("loss", "score"):
        for rises in (False, True):
            run = trainer(f"{metric}{rises}", merge_last=4, merge_metric=metric, merge_greater_is_better=rises)
            run.train()
            found = report(run)
            better = found["merged"] >= found["last"] if rises else found["merged"] <= found["last"]
            assert found["exported"] == ("merged" if better else "last")
            same = all(torch.equal(value, stored(run, 12)[f"net.{name}"]) for name, value in exported(run).items())
            assert same is not better
            assert f"{'not worse' if better else 'worse'}; the export has the" in capsys.readouterr().err
            outcomes.append(better)
    assert outcomes == [outcomes[0], not outcomes[0], not outcomes[0], outcomes[0]]


def test_smaller_losses_are_better_by_default():
    made = {"merge_last": 2, "merge_metric": "x"}
    assert MergeConfig(**made).metric_rises
    assert not MergeConfig(**{**made, "merge_metric": "eval_fm_loss"}).metric_rises
    assert MergeConfig(**{**made, "merge_metric": "eval_fm_loss"}, merge_greater_is_better=True).metric_rises


def test_the_merge_competes_with_the_moving_average(trainer):
    run = trainer(**MERGE, ema_decay=0.5)
    run.train()
    value = report(run)["last"]
    alone = trainer("alone", ema_decay=0.5, eval_steps=12)
    alone.train()
    assert value == pytest.approx(next(row["eval_loss"] for row in lines(alone) if "eval_loss" in row))


def test_a_killed_run_resumes_to_the_same_merge(trainer):
    whole = trainer("whole", **MERGE)
    whole.train()
    trainer("cut", **MERGE, max_steps=7).train()
    again = trainer("cut", **MERGE, resume_from_checkpoint="latest")
    again.train()
    # The first run ended with a checkpoint at step 7.
    assert report(again)["steps"] == [7, 9, 12]
    assert all(torch.equal(value, stored(whole, 12)[name]) for name, value in stored(again, 12).items())
    last = trainer("whole", **MERGE, resume_from_checkpoint="latest")
    before = exported(whole)
    last.train()
    assert all(torch.equal(value, before[name]) for name, value in exported(last).items())


def test_a_run_that_is_killed_while_it_merges_resumes_to_the_same_export(trainer, tmp_path):
    whole = trainer("whole", **MERGE)
    whole.train()
    path, settings = tmp_path / "recipe.yaml", whole.args.to_dict() | {"output_dir": str(tmp_path / "run")}
    settings |= {"method": "tests.training.measured:MeasuredTrainer", "kill_on_trial": True}
    path.write_text(yaml.safe_dump(settings))
    code, said = children.run("postgen.train", path)
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "run" / "export").exists()
    assert main([str(path), "--resume", "--kill_on_trial", "false"]) == 0
    for name in ("net.safetensors", "merge_last.json"):
        assert (tmp_path / "run/export" / name).read_bytes() == (whole.args.folder / "export" / name).read_bytes()


def test_an_interrupted_run_exports_its_last_weights(trainer):
    run = trainer(**MERGE, signal_at=10, signal_name="SIGTERM")
    assert run.train().reason is Reason.INTERRUPTED
    assert not (run.args.folder / "export" / "merge_last.json").exists()
    assert all(torch.equal(value, stored(run, 10)[f"net.{name}"]) for name, value in exported(run).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MERGE, "merge_last 3 needs two checkpoints or more, but save_steps 100 and max_steps 12 give one"),
        (
            {"rescue_spike": 9.0},
            "save_steps 100 and max_steps 12 give none before the last step: set save_steps below",
        ),
    ],
)
def test_settings_with_too_few_checkpoints_are_refused_before_the_model_is_built(trainer, settings, message):
    class Unbuilt(MeasuredTrainer):
        def build(self):
            raise AssertionError

    with pytest.raises(UserError, match=message) as caught:
        trainer(kind=Unbuilt, **settings, save_steps=100).train()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"max_steps 1 .*train more steps, or leave"):
        trainer(kind=Unbuilt, **settings, save_steps=1, max_steps=1).train()
    # Checkpoints of the folder count, and callbacks or save_seconds may save more.
    trainer("cut", max_steps=4, save_steps=4).train()
    allowed = [name for name in settings if name == "rescue_spike"]
    trainer("cut", **settings, save_steps=100, resume_from_checkpoint="latest", allow_changed=allowed).train()
    for name, more in {"steps": {"save_steps": 11}, "seconds": {"save_seconds": 99.0}}.items():
        trainer(name, **{**settings, "save_steps": 100, **more}).train()


def test_one_checkpoint_is_no_merge(trainer, capsys):
    run = trainer(**MERGE, save_steps=0, save_seconds=99.0)
    run.train()
    assert "holds 1 checkpoint: nothing is merged" in capsys.readouterr().err
    assert not (run.args.folder / "export" / "merge_last.json").exists()


def test_a_damaged_checkpoint_is_left_out(trainer, capsys):
    run = trainer(**MERGE)
    run.train()
    (run.args.folder / "checkpoint-9" / "weights.safetensors").write_bytes(b"")
    assert [path.name for path in sound(run.args.folder, 3)] == ["checkpoint-3", "checkpoint-6", "checkpoint-12"][-2:]
    assert "is left out of the average" in capsys.readouterr().err


def test_an_unknown_metric_is_named_before_the_first_step(trainer):
    wrong = {**MERGE, "merge_metric": "eval_los"}
    run = trainer(**wrong)
    with pytest.raises(UserError, match=r"it has eval_loss, eval_score\)\. Did you mean 'eval_loss'") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert run.global_step == 0
    trainer(**MERGE).train()  # the folder is free
    assert report(run)["metric"] == "eval_loss"


def test_an_evaluation_without_metrics_cannot_judge(trainer):
    class Silent(MeasuredTrainer):
        def evaluate(self):
            return {}

    run = trainer(kind=Silent, **MERGE)
    with pytest.raises(UserError, match="this run has no evaluation: give held-out data"):
        run.train()
    assert run.global_step == 0


def test_the_metric_is_measured_once_before_the_first_step(trainer):
    run = trainer(**MERGE, max_steps=6)
    run.train()
    assert [row["step"] for row in lines(run) if "eval_loss" in row] == [0]
    again = trainer(**MERGE, resume_from_checkpoint="latest")
    again.train()
    assert [row["step"] for row in lines(again) if "eval_loss" in row] == [0]
    plain = trainer("plain")
    plain.train()  # the evaluation changes nothing
    assert all(torch.equal(value, stored(plain, 12)[name]) for name, value in stored(again, 12).items())


def test_a_metric_that_changes_is_checked_when_a_run_resumes(trainer):
    trainer(**MERGE, max_steps=6).train()
    wrong = {**MERGE, "merge_metric": "reward", "resume_from_checkpoint": "latest"}
    run = trainer(**wrong)
    with pytest.raises(UserError, match="which the evaluation lacks"):
        run.train()
    assert run.global_step == 6
    done = trainer(**wrong, max_steps=6)  # a finished run evaluates at once
    with pytest.raises(UserError, match="The last checkpoint is complete: correct merge_metric"):
        done.train()
    trainer(**MERGE, resume_from_checkpoint="latest").train()


def product(tensors, layer):
    up, down = (tensors[f"net.{layer}.lora_{half}.default.weight"].double() for half in "BA")
    return up @ down


def test_adapters_are_merged_by_their_products(trainer):
    run = trainer(kind=LoraTrainer, **MERGE, merge_keep="always")
    run.train()
    found = {f"net.{name}": value for name, value in exported(run).items()}
    files = [stored(run, step) for step in (6, 9, 12)]
    for layer in ("0", "3"):
        mean = sum(product(file, layer) for file in files) / 3
        left, sigma, right = torch.linalg.svd(mean, full_matrices=False)
        best = (left[:, :2] * sigma[:2]) @ right[:2]
        assert (product(found, layer) - best).norm() <= 1e-5 * best.norm()
    assert 0.5 < report(run)["retained"] <= 1
    assert not any(value.isnan().any() for value in found.values())


def test_one_checkpoint_is_the_identity(trainer):
    run = trainer(kind=LoraTrainer)
    run.train()
    newest = sound(run.args.folder, 1)
    found = average(newest, [1.0], run.trained())
    assert all(torch.equal(value, stored(run, 12)[name]) for name, value in found.tensors.items())
    again = average(newest * 3, weights_of("wma", 3), run.trained())
    assert all(
        (product(again.tensors, layer) - product(found.tensors, layer)).norm()
        < 1e-6 * product(found.tensors, layer).norm()
        for layer in ("0", "3")
    )
    assert again.retained == pytest.approx(1)


def test_dora_is_refused_before_the_first_step(trainer):
    class Dora(LoraTrainer):
        dora = True

    for settings in (MERGE, {"rescue_spike": 5.0}):
        with pytest.raises(UserError, match=r"DoRA, of an embedding"):
            trainer(kind=Dora, **settings).train()


def test_branches_of_quantised_layers_are_refused(tmp_path):
    config = MeasuredConfig(output_dir=str(tmp_path), device="cpu", **MERGE)
    check_adapters(config, ["net.0.weight", "net.0.lora_A.default.weight"])
    with pytest.raises(UserError, match=r"merge_last averages checkpoints, but net\.0\.aux_up is part of"):
        check_adapters(config, ["net.0.weight", "net.0.aux_up"])


def test_nan_in_a_checkpoint_is_damage(trainer, capsys):
    run = trainer()
    run.train()
    folder = run.args.folder / "checkpoint-12"
    tensors = stored(run, 12)
    tensors["net.0.weight"][0, 0] = math.nan
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"net\.0\.weight in weights\.safetensors holds NaN"):
        average([folder], [1.0], run.trained())
    assert [path.name for path in sound(run.args.folder, 1)] == ["checkpoint-9"]
    assert "checkpoint-12 is damaged" in capsys.readouterr().err


def test_infinite_weights_are_damage_and_infinite_buffers_are_not(trainer, capsys):
    run = trainer()
    run.train()
    tensors = stored(run, 12)
    tensors["net.0.weight"][0, 0] = math.inf
    save_file(tensors, run.args.folder / "checkpoint-12" / "weights.safetensors")
    names = run.trained()
    assert [path.name for path in sound(run.args.folder, 1)] == ["checkpoint-12"]  # could be a buffer
    assert [path.name for path in sound(run.args.folder, 1, trained=names)] == ["checkpoint-9"]
    assert "net.0.weight in weights.safetensors holds infinite values" in capsys.readouterr().err


@pytest.mark.parametrize("rises", [False, True])
def test_a_greedy_merge_is_at_least_as_good_as_the_best_checkpoint(trainer, rises):
    metric = "score" if rises else "loss"
    run = trainer(merge_last=4, merge_metric=metric, merge_kind="greedy", merge_keep="always")
    run.train()
    found = report(run)
    assert set(found["steps"]) <= {3, 6, 9, 12}
    sign = 1 if rises else -1
    assert sign * found["merged"] >= sign * found["last"]


def test_greedy_takes_what_does_not_harm():
    values = {"a": 1.0, "b": 3.0, "c": math.nan, "d": -4.0, "e": 3.5}
    asked = []

    def score(members):
        asked.append(list(members))
        return -abs(sum(values[member] for member in members) / len(members))

    chosen, best = greedy(["a", "b", "c", "d", "e"], score)
    assert chosen == ["a"] or best > -1
    assert best == score(chosen)
    assert "c" not in chosen
    assert greedy([7], lambda members: math.nan) == ([7], -math.inf)
    with pytest.raises(UserError, match="at least one candidate"):
        greedy([], score)


def test_settings(tmp_path):
    made = {"output_dir": str(tmp_path), "device": "cpu"}
    for given, text in (
        ({"merge_last": 1}, "merge_last is 1"),
        ({"merge_last": 3}, "merge_metric is '', it must be a metric of the evaluation"),
        ({"merge_kind": "wma"}, "merge_kind is 'wma', it must be left out without merge_last"),
        ({"merge_kind": "mean"}, "merge_kind is 'mean'. Allowed: sma"),
        ({**MERGE, "merge_alpha": 0.1}, "merge_alpha is 0.1, it must be left out without merge_kind: ema"),
        ({**MERGE, "merge_kind": "ema", "merge_alpha": 0.0}, "above 0 and at most 1"),
        ({**MERGE, "save_steps": 0}, "merge_last is 3, it must be 0 without save_steps"),
        ({"merge_last": 2, "merge_keep": "always", "merge_greater_is_better": True}, "left out without merge_metric"),
        ({"merge_last": 2, "merge_keep": "always", "merge_kind": "greedy"}, "greedy needs it"),
    ):
        with pytest.raises(UserError) as caught:
            MeasuredConfig(**made, **given)
        assert text in str(caught.value)
    nested = MeasuredConfig.from_dict({**made, "merge": {"last": 3, "metric": "loss", "kind": "ema", "alpha": 0.1}})
    assert (nested.merge_last, nested.merge_alpha) == (3, 0.1)
    assert kept(nested) == 3
    assert kept(MeasuredConfig(**made, rescue_spike=5.0, rescue_last=4)) == 5
    assert kept(MeasuredConfig(**made, rescue_spike=5.0, rescue_last=4, save_steps=2)) == 6
    assert kept(MeasuredConfig(**made)) == 2
    assert kept(MeasuredConfig(**made, save_total_limit=0)) is None
    assert set(get_args(get_type_hints(MergeConfig)["merge_kind"])) == {*KINDS, "greedy"}
