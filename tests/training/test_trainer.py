"""The training loop: steps, logging, EMA, export, and when it stops."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.training import Reason
from postgen.training.ema import Ema
from postgen.training.logging import Averages, available_trackers, merged_means
from postgen.training.stop import Signals
from tests.training.tiny import TinyConfig, TinyTrainer


@pytest.fixture
def trainer(tmp_path):
    def make(name="run", callbacks=(), **settings):
        settings = {"max_steps": 6, "learning_rate": 1e-2, "disable_tqdm": True, "report_to": [], **settings}
        return TinyTrainer(TinyConfig(output_dir=str(tmp_path / name), device="cpu", **settings), callbacks)

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(run):
    return {name: value.detach() for name, value in run.trained().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_it_learns(trainer):
    run = trainer(max_steps=150, per_device_train_batch_size=8, learning_rate=3e-2, logging_steps=50, dropout=0.0)
    result = run.train()
    losses = [line["loss"] for line in lines(run.args.folder)]
    assert result.reason is Reason.DONE
    assert result.global_step == 150
    assert losses[-1] < 0.1 * losses[0]


def test_accumulation_equals_a_big_batch(trainer):
    big = trainer("big", per_device_train_batch_size=8, dropout=0.0)
    small = trainer("small", per_device_train_batch_size=2, gradient_accumulation_steps=4, dropout=0.0)
    big.train()
    small.train()
    assert torch.equal(torch.cat(big.seen), torch.cat(small.seen))
    for name, value in big.trained().items():
        torch.testing.assert_close(small.trained()[name], value, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(trainer):
    free, tight = trainer("free", max_grad_norm=0.0), trainer("tight", max_grad_norm=1e-9, adam_epsilon=1e-3)
    free.train()
    tight.train()
    # The log has the norm before clipping. Clipped to a norm of 1e-9, with epsilon 1e-3, weights do not change.
    assert min(free.log.newest["grad_norm"], tight.log.newest["grad_norm"]) > 0.1
    first, last = tight.history[0], tight.history[-1]
    assert max(float((last[name] - first[name]).abs().max()) for name in first) < 1e-6


def test_small_parameters_do_not_decay(trainer):
    run = trainer(weight_decay=0.5, max_steps=1)
    run.train()
    decays = {
        parameter: group["weight_decay"] for group in run.optimizer.param_groups for parameter in group["params"]
    }
    assert {parameter.ndim: decay for parameter, decay in decays.items()} == {2: 0.5, 1: 0.0}


def test_average_follows_its_formula(trainer):
    run = trainer(ema_decay=0.2, max_steps=4, eval_steps=4)
    run.train()
    average = dict(run.history[0])
    for update, weights in enumerate(run.history[1:], start=1):
        decay = min(0.2, (1 + update) / (10 + update))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    exported = load_file(run.args.folder / "export" / "net.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(exported[name.removeprefix("net.")], value)
    assert run.log.newest["eval_bias"] == pytest.approx(float(average["net.3.bias"]))
    # After evaluation and export the EMA weights are swapped out again.
    assert same(weights_of(run), run.history[-1])


def test_warm_average_starts_faster():
    net = torch.nn.ParameterDict({"p": torch.zeros(1)})
    means = []
    for warmup in (False, True):
        ema = Ema({"net": net}, 0.9999, warmup)
        ema.update()
        net["p"].data.fill_(1.0)
        ema.update()
        means.append(float(ema.tensors()["net.p"]))
        net["p"].data.fill_(0.0)
    assert means == pytest.approx([1 - 2 / 11, 2 ** (-2 / 3)])


def test_evaluation_leaves_training_alone(trainer):
    often, never = trainer("often", eval_steps=1, eval_on_start=True, ema_decay=0.9), trainer("never", ema_decay=0.9)
    often.train()
    never.train()
    assert same(weights_of(often), weights_of(never))
    assert [line["step"] for line in lines(often.args.folder) if "eval_bias" in line] == [0, 1, 2, 3, 4, 5, 6]


def test_log_lines(trainer):
    run = trainer(max_steps=6, logging_steps=4, warmup_steps=2, lr_scheduler_type="linear")
    run.train()
    first, last = lines(run.args.folder)
    assert (first["step"], last["step"]) == (4, 6)
    assert {"loss", "root", "grad_norm", "learning_rate", "step_time", "seconds"} <= first.keys()
    assert first["size"] == 1
    assert first["learning_rate"] == pytest.approx(1e-2 * 0.5)
    assert last["learning_rate"] == 0
    assert "max_steps: 6" in (run.args.folder / "config.yaml").read_text()


def test_means_are_weighted_by_what_each_process_counted():
    one, two = Averages(), Averages()
    one.add({"loss": torch.tensor(1.0), "rare": 5.0})
    one.add({"loss": torch.tensor(2.0)})
    two.add({"loss": 6.0})
    assert merged_means([one.state(), two.state()]) == {"loss": 3.0, "rare": 5.0}


def test_progress_goes_on_after_a_resume(trainer):
    class Noting(TinyTrainer):
        def training_step(self):
            self.noted = [*getattr(self, "noted", []), self.progress()]
            return super().training_step()

    first = Noting(trainer(max_steps=4).args)
    first.train()
    assert first.noted == [0.0, 0.25, 0.5, 0.75]
    assert first.progress() == 1.0
    longer = Noting(trainer(max_steps=8, resume_from_checkpoint="latest").args)
    longer.train()
    assert longer.noted == [0.5, 0.625, 0.75, 0.875]
    shorter = Noting(trainer(max_steps=2, resume_from_checkpoint="latest").args)
    assert shorter.train().global_step == 8
    assert shorter.progress() == 1.0


def test_a_bad_loss_is_named_and_never_saved(trainer):
    run = trainer(nan_at=6, logging_steps=4, save_steps=1, max_steps=20)
    with pytest.raises(FloatingPointError, match="step 6 is not finite"):
        run.train()
    assert sorted(path.name for path in run.args.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    run = trainer("late", nan_at=6, logging_steps=4, save_steps=0, max_steps=20)
    with pytest.raises(FloatingPointError, match="step 6 is not finite"):
        run.train()
    assert run.global_step == 8
    assert not list(run.args.folder.glob("checkpoint-*"))


def test_deadline(trainer):
    run = trainer(max_steps=10**6, max_seconds=0.3, save_steps=0)
    result = run.train()
    assert result.reason is Reason.DEADLINE
    assert 0 < result.global_step < 10**6
    assert (run.args.folder / f"checkpoint-{result.global_step}").is_dir()
    assert (run.args.folder / "export" / "net.safetensors").is_file()


def test_saving_by_the_clock(trainer):
    run = trainer(save_seconds=1e-9, save_steps=0, save_total_limit=None)
    exports = []
    run.export = lambda folder, weights: exports.append(run.global_step)
    run.train()
    assert exports == [1, 2, 3, 4, 5, 6, 6]
    assert len(list(run.args.folder.glob("checkpoint-*"))) == 6


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_step_and_saves(trainer, name):
    before = signal.getsignal(signal.Signals[name])
    run = trainer(signal_at=3, signal_name=name)
    result = run.train()
    assert (result.reason, result.global_step) == (Reason.INTERRUPTED, 3)
    assert (run.args.folder / "checkpoint-3").is_dir()
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_signal_in_the_last_step_changes_nothing(trainer):
    result = trainer(signal_at=6, signal_name="SIGINT").train()
    assert (result.reason, result.global_step) == (Reason.DONE, 6)


def test_evaluation_alone_leaves_the_configuration_of_the_run(trainer):
    run = trainer()
    run.train()
    before = (run.args.folder / "config.yaml").read_bytes()
    trainer(evaluate_only=True, resume_from_checkpoint="latest").train()
    assert (run.args.folder / "config.yaml").read_bytes() == before


def test_a_second_signal_is_not_held_back():
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class Recorder(TrainerCallback):
    """Records all events with their step; requests a checkpoint after step 2, and the end after step 4."""

    def __init__(self):
        self.events = []
        self.logs = []

    def on_train_begin(self, args, state, control, **extra):
        self.events.append(("begin", state.global_step, state.max_steps))

    def on_step_end(self, args, state, control, **extra):
        control.should_save = state.global_step == 2
        control.should_training_stop = state.global_step == 4
        return control

    def on_log(self, args, state, control, logs=None, **extra):
        self.logs.append((state.global_step, "loss" in logs))

    def on_evaluate(self, args, state, control, metrics=None, **extra):
        self.events.append(("evaluate", state.global_step, sorted(metrics)))

    def on_save(self, args, state, control, **extra):
        self.events.append(("save", state.global_step, args.max_steps))

    def on_train_end(self, args, state, control, model=None, **extra):
        self.events.append(("end", state.global_step, len(list(model.parameters()))))


def test_callbacks(trainer):
    recorder = Recorder()
    result = trainer(callbacks=[recorder], eval_steps=3, logging_steps=3).train()
    assert result.reason is Reason.CALLBACK
    assert recorder.events == [
        ("begin", 0, 6),
        ("save", 2, 6),
        ("evaluate", 3, ["eval_bias"]),
        ("save", 4, 6),
        ("end", 4, 4),
    ]
    assert recorder.logs == [(3, True), (3, False)]


def test_tensorboard_is_written(trainer):
    pytest.importorskip("tensorboard")
    run = trainer(report_to=["tensorboard"])
    run.train()
    assert list(run.args.folder.rglob("events.out.tfevents.*"))


def test_a_missing_tracker_is_named_once():
    from accelerate.tracking import get_available_trackers

    if "wandb" in {str(getattr(name, "value", name)) for name in get_available_trackers()}:
        pytest.skip("needs wandb to be absent")
    with pytest.warns(UserWarning, match="not installed are skipped: wandb"):
        assert available_trackers(["wandb"]) == []


def test_absent_cuda_is_a_clear_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(UserError, match="device is cuda, but torch finds no CUDA device"):
        TinyTrainer(TinyConfig(output_dir=str(tmp_path), device="cuda"))


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir .*file/run cannot be created: .*file is a file, not a folder"):
        TinyTrainer(TinyConfig(output_dir=str(tmp_path / "file" / "run"), report_to=[], device="cpu")).train()


def test_nothing_to_train_is_a_clear_error(trainer):
    class Frozen(TinyTrainer):
        def build(self):
            return {name: module.requires_grad_(False) for name, module in super().build().items()}

    with pytest.raises(UserError, match="Nothing to train"):
        Frozen(trainer().args).train()
