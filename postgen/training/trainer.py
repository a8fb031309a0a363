"""The one training loop of every method: accelerate, AdamW, averaged weights, checkpoints, logs, callbacks."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, gather_object, set_seed
from torch import Tensor, nn
from transformers import TrainerCallback, get_scheduler

from postgen.errors import UserError
from postgen.files import replacing

from . import checkpoint, rng, weights
from .callbacks import Callbacks
from .config import TrainingConfig
from .ema import Ema
from .logging import available_trackers, say
from .processes import check_equal, leave_group
from .run_log import RunLog
from .run_state import RunState, changed_settings, trained_parameters
from .sharding import check_launch, no_sync, prepare, whole
from .stop import Reason, Signals, TrainResult

C = TypeVar("C", bound=TrainingConfig)

_AGREE_EVERY = 10
"""Steps between two agreements of several processes about stopping; one process looks after every step."""


class Trainer(ABC, Generic[C]):
    """Base of all trainers: a subclass says what is trained, how a micro-batch is computed, what is exported.

    Hooks: `build`, `training_step`, `export`; optionally `parameter_groups`, `on_optimizer_step`, `evaluate`,
    `state_dict`, `load_state_dict`. Attributes for them: `args`, `accelerator`, `device`, `global_step`, `generator`
    (a generator on the device, seeded for this process, kept in checkpoints), `whole_weights` (in `export`, with
    sharded weights: all of them by model and name, of which the models hold only parts), `models` (prepared by
    accelerate; the forward passes that carry gradients go through these, so that several processes average them),
    `sharded` (whether they hold only parts).

    Args:
        args: the configuration, an instance of `config_class`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: the device is absent, or launched in a way that it cannot be (`check_launch`).
    """

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig

    def __init__(self, args: C, callbacks: Iterable[TrainerCallback] = ()) -> None:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no CUDA device. Use device: auto or cpu.")
        check_launch(args.device)
        self.args = args
        self.global_step = 0
        self.models: dict[str, nn.Module] = {}
        self.accelerator = Accelerator(
            mixed_precision="bf16" if args.bf16 else "no",
            # Accumulation is ours: accelerate counts micro-batches in a state that all trainers of a process share.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=args.device == "cpu",
            log_with=available_trackers(args.report_to) or None,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir),
        )
        self.sharded: bool = args.fully_shard or self.accelerator.is_fsdp2
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.generator = torch.Generator(self.device)
        self.callbacks = Callbacks(callbacks, args, is_main=self.accelerator.is_main_process)
        self._raw: dict[str, nn.Module] = {}
        self.log = RunLog(args, self.accelerator)
        self._saved_step = -1
        self.whole_weights: dict[str, dict[str, Tensor]] | None = None

    # Hooks of a method.

    @classmethod
    def from_config(cls, args: C) -> Self:
        """Return the trainer of a recipe, which has nothing but its configuration."""
        return cls(args)

    @abstractmethod
    def build(self) -> Mapping[str, nn.Module]:
        """Return the modules to train by name, on any device. Parameters without `requires_grad` stay frozen."""

    @abstractmethod
    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Draw one micro-batch with `self.generator`; return its mean loss and metrics (numbers or scalar tensors).

        Reading a tensor here (`item`, `float`) makes every step wait for the device: return it instead.
        A method with several backward passes calls `self.backward` inside `self.no_sync()` for all but the last,
        whose loss it returns.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the result of the run into the empty `folder`; called on the first process, average swapped in."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups. By default biases and gains (fewer than two dimensions) do not decay."""
        trained = list(self.trained().values())
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        rest = [parameter for parameter in trained if parameter.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def on_optimizer_step(self) -> None:
        """Do something after each optimiser step and update of the average; `global_step` counts the step already."""

    def evaluate(self) -> dict[str, float]:
        """Return numbers to log as `eval_<name>`; called on every process, averaged over them, average swapped in."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state (a data cursor, ...): tensors and JSON values under flat names."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned in this process; tensors come on the CPU."""

    # What a method may use.

    def unwrap(self, name: str) -> nn.Module:
        """Return the module that `build` gave for `name`."""
        return self._raw[name]

    def progress(self) -> float:
        """Return the share of `max_steps` that is done, in [0, 1]."""
        return min(1.0, self.global_step / self.args.max_steps)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by `<model>.<parameter>`."""
        return trained_parameters(self._raw)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch, or of a part of its loss."""
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward passes do not average gradients over processes: the next pass outside does, for all."""
        return no_sync(self.models, self.accelerator)

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Inside: averaged weights, eval mode, no gradients. Random states are as before afterwards."""
        modes = [(module, module.training) for raw in self._raw.values() for module in raw.modules()]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(rng.preserved(self.generator))
            if self._parts.ema is not None and self._parts.ema.steps:
                stack.enter_context(self._parts.ema.swapped_in())
            for module, _ in modes:
                module.training = False
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    # The run.

    def train(self) -> TrainResult:
        """Run until `max_steps`, the deadline, a callback or a signal; save a checkpoint and export at the end.

        Raises:
            UserError: weights or a checkpoint do not fit, or the output folder holds another run.
            FloatingPointError: the loss was not finite; nothing is saved after such a step.
        """
        self._began = time.monotonic()
        self._setup()
        try:
            with Signals() as self._signals:
                result = self._loop()
        finally:
            self.close()
        # Not after an error: the other processes would fail first, and their errors hide this one.
        self.models = dict(self._raw)
        leave_group(self.accelerator)
        return result

    def close(self) -> None:
        """Close trackers and the progress bar; a method may let go of more. Called at the end, after an error too."""
        self.log.close()

    def _setup(self) -> None:
        try:
            self.args.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.args.folder} cannot be made: {error}.") from error
        source = checkpoint.to_resume(self.args.folder, self.args.resume_from_checkpoint)
        # The same weights in every process; afterwards each process has its own streams.
        set_seed(self.args.seed)
        self._raw = dict(self.build())
        if not self.trained():
            raise UserError("Nothing to train: no parameter of the models requires a gradient.")
        if self.args.init_from and source is None:
            weights.initialise(self._raw, Path(self.args.init_from))
        for name, module in self._raw.items():
            self.models[name] = prepare(module.train(), self.accelerator, fully=self.args.fully_shard)
        self._parts = self._build_parts()
        set_seed(self.args.seed, device_specific=True)
        self.generator.manual_seed(rng.stream_seed(self.args.seed, self.accelerator.process_index))
        if source is not None:
            self._restore(source)
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.args.folder)
        self.log.open(self.global_step)
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def _build_parts(self) -> RunState:
        args = self.args
        # Fused needs a GPU; foreach is its equal elsewhere.
        kind = {"fused": True} if self.device.type == "cuda" else {"foreach": True}
        adamw = torch.optim.AdamW(
            self.parameter_groups(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            **kind,
        )
        self.optimizer = self.accelerator.prepare_optimizer(adamw)
        # Not prepared: accelerate would step it once per process.
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=adamw,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
        )
        ema = Ema(self.trained(), args.ema_decay, args.ema_warmup) if args.ema_decay else None
        return RunState(modules=self._raw, optimizer=adamw, scheduler=scheduler, ema=ema)

    def _loop(self) -> TrainResult:
        args = self.args
        if args.evaluate_only:
            self._evaluate()
            return TrainResult(global_step=self.global_step, reason=Reason.DONE, metrics=self.log.newest)
        self._event("on_train_begin")
        if args.eval_on_start and self.global_step == 0:
            self._evaluate()
        reason = Reason.DONE
        while self.global_step < args.max_steps:
            self._event("on_step_begin")
            self._step()
            self._event("on_step_end")
            self._after_step()
            # After the last step there is nothing to go on with.
            if self.global_step < args.max_steps and (stop := self._stop_reason()) is not None:
                reason = stop
                break
        if self._saved_step != self.global_step:
            self._save()
        self._export()
        self._event("on_train_end")
        return TrainResult(global_step=self.global_step, reason=reason, metrics=self.log.newest)

    def _step(self) -> None:
        """One optimiser step: forward and backward of each micro-batch, clipping, AdamW, schedule, average."""
        count = self.args.gradient_accumulation_steps
        for micro_batch in range(count):
            with self.no_sync() if micro_batch < count - 1 else nullcontext():
                loss, metrics = self.training_step()
                self.backward(loss)
            self.log.add(loss, metrics, self.global_step + 1)
        # An infinite limit leaves the gradients alone and still gives their norm.
        limit = self.args.max_grad_norm or float("inf")
        norm = whole(self.accelerator.clip_grad_norm_(self._parts.parameters, limit))
        self.optimizer.step()
        self._parts.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.global_step += 1
        if self._parts.ema is not None:
            self._parts.ema.update()
        self.on_optimizer_step()
        self.log.step_done({"grad_norm": norm})

    def _after_step(self) -> None:
        args, step, take = self.args, self.global_step, self.callbacks.take
        if take("should_log") or step % args.logging_steps == 0 or step == args.max_steps:
            self._log(self.log.training_means(float(self._parts.scheduler.get_last_lr()[0])))
        if take("should_evaluate") or _due(step, args.eval_steps):
            self._evaluate()
        if take("should_save") or _due(step, args.save_steps):
            self._save()
        elif args.save_seconds and self._agree(time.monotonic() - self._saved_at >= args.save_seconds):
            self._save()
            self._export()

    def _stop_reason(self) -> Reason | None:
        seconds = time.monotonic() - self._began
        if self.callbacks.control.should_training_stop:
            return Reason.CALLBACK
        if self._agree(self._signals.received):
            return Reason.INTERRUPTED
        if self.args.max_seconds and self._agree(seconds >= self.args.max_seconds):
            return Reason.DEADLINE
        return None

    def _agree(self, wish: bool) -> bool:
        """Return whether any process wishes it; several processes ask each other only now and then."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.global_step % _AGREE_EVERY:
            return False
        return any(gather_object([wish]))

    def _log(self, values: dict[str, float]) -> None:
        self.log.write(self.global_step, values)
        self.callbacks.state.log_history.append({"step": self.global_step, **values})
        self._event("on_log", logs=values)

    def _evaluate(self) -> None:
        with self.for_inference():
            own = self.evaluate()
        values = self.log.evaluation_means(own)
        if values:
            self._log(values)
        self._event("on_evaluate", metrics=values)
        self.log.pause()

    def _export(self) -> None:
        with self.for_inference():
            self.whole_weights = self._parts.whole_weights() if self.sharded else None
            if self.accelerator.is_main_process:
                with replacing(self.args.folder / "export") as part:
                    part.mkdir()
                    self.export(part)
        self.accelerator.wait_for_everyone()

    def _event(self, name: str, **extra: Any) -> None:
        self.callbacks.at(self.global_step)
        self.callbacks.call(name, model=next(iter(self.models.values())), **extra)

    # Checkpoints.

    def _save(self) -> None:
        self.log.check_finite()
        check_equal(self._parts.checksum())
        own = {
            **{f"rng.{name}": value for name, value in rng.capture(self.generator).items()},
            **{f"method.{name}": value for name, value in self.state_dict().items()},
            "averages": self.log.averages(),
        }
        ranks = gather_object([own])
        meta = {"config": self.args.to_dict(), "seconds": self.log.seconds(), "torch": torch.__version__}
        snapshot = self._parts.snapshot(self.global_step, ranks, meta)
        if self.accelerator.is_main_process:
            checkpoint.write(self.args.folder, snapshot)
            checkpoint.prune(self.args.folder, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._saved_step, self._saved_at = self.global_step, time.monotonic()
        self._event("on_save")

    def _restore(self, folder: Path) -> None:
        snapshot = checkpoint.read(folder)
        found, rank = len(snapshot.ranks), self.accelerator.process_index
        if found != self.accelerator.num_processes:
            raise UserError(
                f"{folder} was written by {found} processes, this run has "
                f"{self.accelerator.num_processes}. Start as many, or use init_from for the weights alone."
            )
        self._parts.restore(snapshot, str(folder))
        own = snapshot.ranks[rank]
        self.log.restore(own["averages"], float(snapshot.meta["seconds"]))
        self.load_state_dict(_section(own, "method."))
        rng.restore(_section(own, "rng."), self.generator)
        self.global_step = self._saved_step = snapshot.step
        if self.accelerator.is_main_process:
            changed = changed_settings(snapshot.meta["config"], self.args)
            say(f"resumed from {folder}" + (f"; changed since: {', '.join(changed)}" if changed else ""))
            if self.global_step >= self.args.max_steps:
                say(f"it is at step {self.global_step}: nothing is left to do up to max_steps {self.args.max_steps}")


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _section(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
