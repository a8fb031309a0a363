"""The training loop of all methods: accelerate, optimiser, averaged weights, checkpoints, logs, callbacks."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers import TrainerCallback, get_scheduler

from postgen.errors import UserError, shown
from postgen.files import replacing

from . import averages, averages_checks, checkpoint, resume, rng, weights
from .callbacks import Callbacks
from .checkpoint_head import DamagedCheckpoint
from .compiling import compile_blocks, compiled
from .ema import Ema
from .hooks import C, TrainerHooks
from .launch import check_launch, make_accelerator
from .logging import say
from .modes import evaluating
from .precision import fast_matmul
from .processes import check_equal, check_group, check_same, counted, leave_group
from .rescue import Spikes
from .run_folder import own_folder, written
from .run_log import RunLog
from .run_state import RunState
from .sharding import no_sync, prepare, whole
from .stop import Reason, Signals, TrainResult, due
from .swap import trained_parameters
from .warning_log import kept_warnings

_AGREE_EVERY = 10
"""Steps between two checks of several processes whether to stop; a single process checks after every step."""


class Trainer(TrainerHooks[C]):
    """Base class of all trainers. A subclass defines the trained modules, the loss of a micro-batch, and the export.

    Required hooks: `build`, `training_step`, `export`. Optional hooks: `parameter_groups`, `build_optimizer`,
    `shard_blocks`, `compiled_blocks`, `on_models_ready`, `on_gradients`, `on_optimizer_step`, `evaluate`, `inputs`,
    `weight_copies`, `state_dict`, `load_state_dict`, `state_of_others`. Hooks may use the attributes `args`,
    `accelerator`, `device`, `global_step`, `generator`, `models`, `sharded` (see `TrainerHooks`). Several trainers in
    one process may have different precisions; several processes can train one run only.

    With several processes, gradients are averaged only for calls `self.models[name](...)`: DDP and FSDP wrap the
    `forward` of the modules that `build` returned, but neither their submodules nor other methods. If a loss needs
    several networks or more than one such call, compute it in the `forward` of a module that contains the networks.
    Frozen networks may be part of this module; `export` takes the trained networks out of it.

        class Distillation(nn.Module):
            def __init__(self, student, teacher):
                super().__init__()
                self.student, self.teacher = student, teacher.requires_grad_(False)

            def forward(self, x, sigma, condition):
                with torch.no_grad():
                    target = self.teacher(x, sigma, condition)
                return (self.student(x, sigma, condition) - target).square().mean()

        def build(self):
            return {"distillation": Distillation(student, teacher)}

        def training_step(self):
            return self.models["distillation"](*self.batch()), {}

    Such a module is sharded at the blocks of the networks inside it, see `shard_blocks`.

    Args:
        args: the configuration, an instance of `config_class`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: a configuration of another method, an absent device, or unsupported options of `accelerate launch`
            (`postgen.training.launch`).
    """

    def __init__(self, args: C, callbacks: Iterable[TrainerCallback] = ()) -> None:
        if not isinstance(args, self.config_class):
            raise UserError(f"{type(self).__name__} needs args, a {self.config_class.__name__}, got {shown(args)}")
        check_launch(args)
        self.args = args
        self.global_step = 0
        self.models: dict[str, nn.Module] = {}
        self.accelerator = make_accelerator(args)
        self.sharded: bool = args.fully_shard or self.accelerator.is_fsdp2
        self.device: torch.device = self.accelerator.device
        self.generator = torch.Generator(self.device)
        self.callbacks = Callbacks(callbacks, args, is_main=self.accelerator.is_main_process)
        self._raw: dict[str, nn.Module] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self.log = RunLog(args, self.accelerator)
        self._spikes = Spikes(args, self.accelerator)
        self._saved_step, self._checked = -1, False
        self._changed: dict[str, str] = {}

    @classmethod
    def from_config(cls, args: C) -> Self:
        """Return the trainer of a recipe, which has only its configuration."""
        return cls(args)

    # Helpers for `training_step`.

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch's loss, or of a part of it, and accumulate the gradients."""
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)

    def no_sync(self) -> AbstractContextManager[None]:
        """Skip gradient averaging in enclosed forward and backward passes; the next ones average all gradients."""
        return no_sync(self.models, self.accelerator)

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Use averaged weights, eval mode and no gradients in the enclosed code; restore random states on exit."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(rng.preserved(self.generator))
            stack.enter_context(self._parts.exported())
            stack.enter_context(evaluating(self._raw.values()))
            yield

    # The run.

    def train(self) -> TrainResult:
        """Train until `max_steps`, the deadline, a callback's stop or a signal; then save a checkpoint and export.

        Raises:
            UserError: weights or a checkpoint do not fit, the output folder holds another run, several
                processes differ in settings or data, or have already trained a run.
            FloatingPointError: a loss was not finite; nothing is saved after such a step.
        """
        check_group(self.accelerator)
        check_same(self.args, self.inputs())
        self._began = time.monotonic()
        main = self.accelerator.is_main_process
        warned = kept_warnings(self.args.folder, lambda: self.global_step, main=main)
        with (
            own_folder(self.args, self._first_error, main=main),
            written(self.args.folder),
            warned,
            compiled(self.args),
            fast_matmul(self.device),
        ):
            self._setup()
            try:
                with Signals() as self._signals:
                    result = self._loop()
            finally:
                self.close()
        # Skipped after an error: leaving the group would make the other processes fail, and hide the first error.
        self.models = {name: module.eval() for name, module in self._raw.items()}  # without dropout, as loaded
        leave_group(self.accelerator)
        return result

    def _first_error(self, text: str) -> str:
        """Return the first non-empty text of all processes, by rank; every process must call this."""
        return next(filter(None, gather_object([text])), "")

    def close(self) -> None:
        """Close trackers and progress bar; a method may free more resources. Called at the end and after errors."""
        self.log.close()

    def _setup(self) -> None:
        sources = checkpoint.to_resume(self.args.folder, self.args.resume_from_checkpoint)
        resume.check_first(sources, self.args, self.accelerator.num_processes)
        averages_checks.check_count(self.args, sources, more=bool(self.callbacks.callbacks))
        if self.args.resume_from_checkpoint == "auto" and not sources and self.accelerator.is_main_process:
            say(f"{self.args.folder} holds no checkpoint: a new run begins")
        # The same seed in every process gives the same initial weights. Each process gets its own streams below.
        set_seed(self.args.seed)
        self._raw = dict(self.build())
        if not trained_parameters(self._raw):
            raise UserError("Nothing to train: no parameter of the models requires a gradient.")
        if self.args.init_from and not sources:
            weights.initialise(self._raw, Path(self.args.init_from))
        # Compile, then move, wrap or shard the models.
        for name in self._raw if self.args.torch_compile else ():
            compile_blocks(self.compiled_blocks(name), self.args)
        for name, module in self._raw.items():
            blocks = partial(self.shard_blocks, name)
            self.models[name] = prepare(module.train(), self.accelerator, fully=self.args.fully_shard, blocks=blocks)
        self._trained = trained_parameters(self._raw)
        averages_checks.check_adapters(self.args, self._trained)
        self.on_models_ready()
        self._parts = self._build_parts()
        # Separate random streams per process from here on, or those of the checkpoint.
        set_seed(self.args.seed, device_specific=True)
        self.generator.manual_seed(rng.stream_seed(self.args.seed, self.accelerator.process_index))
        if sources:
            self._resume(sources)
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.args.folder)
        self.log.open(self.global_step)
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def _build_parts(self) -> RunState:
        args = self.args
        optimizer = self.build_optimizer(self.parameter_groups())
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        # accelerate does not prepare the scheduler, because it would step the scheduler once per process.
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
        )
        ema = Ema(self._raw, args.ema_decay, args.ema_warmup) if args.ema_decay else None
        copies = self.weight_copies()
        return RunState(modules=self._raw, optimizer=optimizer, scheduler=scheduler, ema=ema, copies=copies)

    def _loop(self) -> TrainResult:
        args = self.args
        if args.evaluate_only:
            self._evaluate()
            return TrainResult(global_step=self.global_step, reason=Reason.DONE, metrics=self.log.newest)
        self._event("on_train_begin")
        if self.global_step == 0 and (args.eval_on_start or args.merge_metric):
            averages_checks.check_metric(args, self._evaluate())
        elif averages_checks.asks_anew(args, self.global_step, self._changed):
            averages_checks.check_metric(args, self._measured(trial=True))
        reason, began_at = Reason.DONE, self.global_step
        while self.global_step < args.max_steps:
            self._event("on_step_begin")
            self._step()
            if rescued := self._spikes.rescue(self.global_step, self._parts, self.log, self.models):
                self._log(rescued)
            self._event("on_step_end")
            self._after_step()
            # After the last step the reason is DONE, even if a stop was requested.
            if self.global_step < args.max_steps and (stop := self._stop_reason()) is not None:
                reason = stop
                break
        if self._saved_step != self.global_step:
            self._save()
        if args.merge_last and reason is not Reason.INTERRUPTED:
            last = averages.LastCheckpoints(args, self._parts, self._measured, self.accelerator, self._spikes.spiked)
            if merged := last.merge():
                self._log(merged)
        self._export()
        if self.accelerator.is_main_process:
            new = "" if self.global_step > began_at else " (no step was trained in this call)"
            say(f"step {self.global_step}: the trained model is in {args.folder / 'export'}{new}")
        self._event("on_train_end")
        return TrainResult(
            global_step=self.global_step, reason=reason, metrics=self.log.newest, signal=self._signals.number
        )

    def _step(self) -> None:
        """Make one optimiser step: forward and backward passes, clipping, update, schedule, moving average."""
        count = self.args.gradient_accumulation_steps
        for micro_batch in range(count):
            with self.no_sync() if micro_batch < count - 1 else nullcontext():
                loss, metrics = self.training_step()
                self.backward(loss)
            self.log.add(loss, metrics, self.global_step + 1)
            self._spikes.add(loss)
        self.on_gradients()
        # With an infinite limit, gradients are not clipped, but their norm is still returned for the log.
        norm = whole(self.accelerator.clip_grad_norm_(self._parts.parameters, self.args.max_grad_norm or float("inf")))
        self.optimizer.step()
        if not self._checked:
            self._parts.optimizer_state.check()
            self._checked = True
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
        if take("should_evaluate") or due(step, args.eval_steps):
            self._evaluate()
        if take("should_save") or due(step, args.save_steps):
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
        """Return whether `wish` is true in any process; several processes check only every `_AGREE_EVERY` steps."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.global_step % _AGREE_EVERY:
            return False
        return any(gather_object([wish]))

    def _log(self, values: dict[str, float]) -> None:
        self.log.write(self.global_step, values)
        self.callbacks.remember(self.global_step, values)
        self._event("on_log", logs=values)

    def _measured(self, trial: bool = False) -> dict[str, float]:
        self.on_trial = trial or self._parts.merged is not None
        with self.for_inference():
            own = self.evaluate()
        return self.log.evaluation_means(own)

    def _evaluate(self) -> dict[str, float]:
        if values := self._measured():
            self._log(values)
        self._event("on_evaluate", metrics=values)
        self.log.pause()
        return values

    def _export(self) -> None:
        with self.for_inference():
            weights = self._parts.whole_weights(keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                with replacing(self.args.folder / "export") as part:
                    part.mkdir()
                    self.export(part, weights)
                    averages.write_report(part, self._parts)
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
            # Moved to the CPU, because gathered tensors would stay on the GPUs of the processes that sent them.
            **{f"method.{name}": resume.on_host(value) for name, value in self.state_dict().items()},
            "averages": self.log.averages(),
        }
        ranks = gather_object([own])
        meta = {"config": self.args.to_dict(), "seconds": self.log.seconds(), "torch": torch.__version__}
        meta["spikes"] = self._spikes.state()
        snapshot = self._parts.snapshot(self.global_step, ranks, meta, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            checkpoint.write(self.args.folder, snapshot)
            checkpoint.prune(self.args.folder, averages.kept(self.args))
        self.accelerator.wait_for_everyone()
        self._saved_step, self._saved_at = self.global_step, time.monotonic()
        self._event("on_save")

    def _resume(self, folders: list[Path]) -> None:
        """Resume the first undamaged checkpoint in the list, and rename the damaged ones before it."""
        damaged: dict[Path, str] = {}
        for folder in folders:
            problem = ""
            try:
                self._restore(folder)
            except DamagedCheckpoint as error:
                problem = str(error)
            if problem := self._first_error(problem):
                damaged[folder] = problem
                continue
            if self.accelerator.is_main_process and not self.args.evaluate_only:
                resume.put_aside(damaged)
            return
        raise UserError(resume.none_is_sound(damaged))

    def _restore(self, folder: Path) -> None:
        snapshot = checkpoint.read(folder)
        ranks, rank, count = snapshot.ranks, self.accelerator.process_index, self.accelerator.num_processes
        before = snapshot.meta["config"]
        self._changed = resume.check_settings(folder, before, self.args, shared_anew=len(ranks) != count)
        self._parts.restore(snapshot, str(folder))
        self.log.restore(resume.averages_in(ranks, rank, count), float(snapshot.meta["seconds"]))
        self._spikes.load(snapshot.meta.get("spikes", {}))
        states = [resume.section(each, "method.") for each in ranks]
        try:
            self.load_state_dict(states[rank] if len(ranks) == count else self.state_of_others(states, before))
        except UserError as error:
            if len(ranks) == count:
                raise
            raise UserError(f"{folder} was written by {counted(len(ranks))}, this run has {count}: {error}") from error
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise resume.not_of(folder, rank, type(self).__name__, error) from error
        if rank < len(ranks):  # additional processes keep their freshly seeded streams
            rng.restore(resume.section(ranks[rank], "rng."), self.generator)
        self.global_step = self._saved_step = snapshot.step
        if self.accelerator.is_main_process:
            resume.announce(folder, snapshot.step, self._changed, self.args)
