"""Train the student of one block, from its task to its finished folder, with checkpoints and resume."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import get_scheduler

from postgen.errors import UserError, cut
from postgen.families.recording import RecordedCall
from postgen.files import replacing
from postgen.sampling.seeds import Shuffled
from postgen.training import checkpoint, rng
from postgen.training.checkpoint_head import DamagedCheckpoint
from postgen.training.ema import Ema
from postgen.training.logging import Averages, MetricsFile, Progress, StepTimer, say
from postgen.training.modes import evaluating
from postgen.training.optimizers import optimizer_of
from postgen.training.resume import changed_settings, put_aside
from postgen.training.run_state import RunState
from postgen.training.stop import Signals
from postgen.training.updates import decay_groups

from .config import ReconstructConfig
from .loss import distance, error
from .records import Records
from .report import STUDENT, BlockResult, block_folder, finished, read_meta, write_result
from .task import Call, ReconstructTask

_STUDENT = "student"
"""Name of the student in checkpoints."""
_TOLD = 4
"""Largest number of differences that the message about another run names."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The parts of a run that all its blocks share."""

    records: Records
    config: ReconstructConfig
    device: torch.device
    shown: bool
    """Whether this process shows a progress bar."""

    def meta(self, task: ReconstructTask) -> dict[str, Any]:
        """Return the values that a resumed run must repeat, except the digest of the student's weights."""
        settings = json.loads(json.dumps(dict(task.settings)))  # same types as after reading a file
        return {"config": self.config.to_dict(), "records": self.records.identity, "task": settings}

    def check(self, place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Compare the values of an earlier run of a block with those of this run.

        Args:
            place: the checkpoint or finished folder of the earlier run, for the error message.
            before: values of the earlier run.
            now: values of this run.

        Raises:
            UserError: the values differ; the message names the differences.
        """
        changed = changed_settings(before["config"], self.config)
        told = [f"{name}: {said}" for name, said in changed.items() if name not in self.config.named_in("may_change")]
        told += [text for name in ("records", "task", _STUDENT) if name in before and name in now
                 for text in _differences(name, before[name], now[name])]  # fmt: skip
        if told:
            more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
            raise UserError(
                f"{place} is from a run with other settings, records or weights: {', '.join(told[:_TOLD])}{more}."
                " Resume with the earlier ones, or set another output_dir"
            )


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the values that differ, each with its place in nested mappings; `name` is the place of the outer ones."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{name}: {cut(str(before))} -> {cut(str(now))}"


class BlockRun:
    """The training run of one block.

    Args:
        task: the task of the block.
        bench: the parts that all blocks share.
        name: title of the progress bar.
    """

    def __init__(self, task: ReconstructTask, bench: Bench, name: str) -> None:
        self.task, self.bench, self.config, self.title = task, bench, bench.config, name
        self.folder = block_folder(self.config.folder, task.name)
        self.step, self._before, self._earlier = 0, {"l1": 0.0, "l2": 0.0}, 0.0
        self._averages, self._began = Averages(), time.monotonic()
        self._training = bench.records.calls(task.modules, held_out=False)
        self._held_out = bench.records.calls(task.modules, held_out=True)

    def train(self, stop: Signals) -> bool:
        """Train up to `max_steps` and write the finished folder.

        Returns:
            True if the block is finished; False if a signal stopped the training, after writing a checkpoint.

        Raises:
            UserError: no parameter to train, a checkpoint of other settings, or recorded outputs that are not finite.
            FloatingPointError: the loss is not finite.
        """
        self._build()
        self._resume()
        if not self.step:
            self._before = self._errors()
            if not all(map(math.isfinite, self._before.values())):
                self._check_targets()
        checkpoint.sweep(self.folder)
        self._metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
        self._timer, self._order = StepTimer(), Shuffled(len(self._training), self.config.seed)
        self._bar = Progress(step=self.step, max_steps=self.config.max_steps, shown=self.bench.shown, name=self.title)
        try:
            while self.step < self.config.max_steps:
                self._one_step()
                if self.step < self.config.max_steps and stop.received:
                    self._save()
                    return False
                if self.config.save_steps and self.step % self.config.save_steps == 0:
                    self._save()
        finally:
            self._bar.close()
        self._finish()
        return True

    # Set-up.

    def _build(self) -> None:
        # The seed depends on the task's name, so it is independent of the other blocks and of the process.
        seed = rng.stream_seed(self.config.seed, zlib.crc32(self.task.name.encode()))
        set_seed(seed % 2**32)
        self.student = _in_single(self.task.build()).to(self.bench.device)
        models = {_STUDENT: self.student}
        self._named = {name: each for name, each in self.student.named_parameters() if each.requires_grad}
        if not self._named:
            raise UserError(
                f"{self.task.name}: no parameter of the student requires a gradient, so there is nothing to train"
            )
        self.generator = torch.Generator(self.bench.device).manual_seed(seed)
        optimizer = optimizer_of(self._groups(), self.config, self.bench.device)
        scheduler = get_scheduler(
            self.config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.config.max_steps,
        )
        self.ema = Ema(models, self.config.ema_decay, self.config.ema_warmup) if self.config.ema_decay else None
        self.parts = RunState(modules=models, optimizer=optimizer, scheduler=scheduler, ema=self.ema)
        self.meta = {**self.bench.meta(self.task), _STUDENT: self._inherited_digest()}

    def _groups(self) -> list[dict[str, Any]]:
        new = [each for name, each in self._named.items() if self.task.is_new(name)]
        inherited = [each for name, each in self._named.items() if not self.task.is_new(name)]
        rate = self.config.learning_rate
        groups = decay_groups(inherited, lr=rate, rate="learning_rate")
        return groups + decay_groups(new, lr=self.config.learning_rate_new or rate, rate="learning_rate_new")

    def _inherited_digest(self) -> str:
        """Return a digest of the names and shapes of the student's tensors, and of its inherited values.

        Values of new parameters are left out: they may be computed, for example by a decomposition, and another
        machine may round differently.
        """
        said = hashlib.sha256()
        for name, tensor in self.student.state_dict().items():
            said.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for name, parameter in self.student.named_parameters():
            if not self.task.is_new(name):
                said.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return said.hexdigest()[:16]

    def _resume(self) -> None:
        """Resume from the newest intact checkpoint. Damaged checkpoints are renamed and skipped."""
        for folder in checkpoint.named(self.folder)[::-1]:
            try:
                snapshot = checkpoint.read(folder)
            except DamagedCheckpoint as found:
                if folder == checkpoint.named(self.folder)[0]:
                    raise UserError(f"{found}; remove {self.folder} to train the block from the start") from found
                put_aside({folder: str(found)})
                continue
            self.bench.check(folder, snapshot.meta, self.meta)
            self.parts.restore(snapshot, str(folder))
            own = snapshot.ranks[0]
            self._averages.load(own["averages"])
            self._before, self._earlier = snapshot.meta["before"], float(snapshot.meta["seconds"])
            rng.restore({name.removeprefix("rng."): value for name, value in own.items()}, self.generator)
            self.step = snapshot.step
            say(f"{self.task.name}: resuming from step {self.step}")
            return

    # Steps.

    def _one_step(self) -> None:
        count = self.config.gradient_accumulation_steps
        for micro_batch in range(count):
            calls = self._training[self._order.at(self.step * count + micro_batch)]
            outputs, targets = self._outputs(calls)
            loss = distance(self.config.loss, outputs, targets) + self._penalty(calls, outputs)
            if not loss.requires_grad:
                raise UserError(
                    f"{self.task.name}: the output of the student does not depend on any trained parameter: either no"
                    " used parameter requires a gradient, or inputs of this size do not use the new parameters"
                )
            (loss / count).backward()
            self._averages.add({"loss": loss})
        norm = nn.utils.clip_grad_norm_(self.parts.parameters, self.config.max_grad_norm or float("inf"))
        self.parts.optimizer.step()
        self.parts.scheduler.step()
        self.parts.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update()
        self._averages.add({"grad_norm": norm})
        self._timer.step()
        self._bar.step()
        if self.step % self.config.logging_steps == 0 or self.step == self.config.max_steps:
            self._log()

    def _outputs(self, recorded: Sequence[RecordedCall]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the outputs of the student and the recorded outputs of the teacher."""
        device, half = self.bench.device, self.config.bf16
        calls = [Call(each, device, widen=not half) for each in recorded]
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            outputs = self.task.run(self.student, calls)
        return outputs, self.task.target(calls)

    def _penalty(self, recorded: Sequence[RecordedCall], outputs: Sequence[Tensor]) -> Tensor | float:
        """Return the second term of the loss, which a task may have."""
        if self.task.penalty is None:
            return 0.0
        device, half = self.bench.device, self.config.bf16
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return self.task.penalty(self.student, [Call(each, device, widen=not half) for each in recorded], outputs)

    @torch.no_grad()
    def _errors(self) -> dict[str, float]:
        """Return the mean errors on held-out records, in evaluation mode. Random states do not change."""
        sums: dict[Literal["l1", "l2"], float] = {"l1": 0.0, "l2": 0.0}
        with evaluating([self.student]), rng.preserved(self.generator):
            for recorded in self._held_out:
                outputs, targets = self._outputs(recorded)
                distance(self.config.loss, outputs, targets)  # checks that the shapes match
                for kind in sums:
                    sums[kind] += float(error(kind, outputs, targets))
        return {str(kind): total / len(self._held_out) for kind, total in sums.items()}

    def _check_targets(self) -> None:
        """Refuse records with teacher outputs that are not finite, because no learning rate can help with them.

        Raises:
            UserError: there are such records; the message has their number.
        """
        records = [*self._training, *self._held_out]
        calls = ([Call(each, self.bench.device, widen=True) for each in recorded] for recorded in records)
        bad = sum(not all(bool(target.isfinite().all()) for target in self.task.target(each)) for each in calls)
        if bad:
            raise UserError(
                f"{bad} of {len(records)} records of {self.task.name} hold outputs of the teacher that are not finite:"
                " the teacher overflows in its dtype, or its weights are damaged. Load it in bfloat16 or float32, and"
                " collect into an empty folder"
            )

    def _check_finite(self) -> None:
        if not all(torch.isfinite(torch.tensor(total)) for total in self._averages.state()["sums"].values()):
            self._check_targets()
            raise FloatingPointError(
                f"the loss or gradient of {self.task.name} is not finite, up to step {self.step}: lower learning_rate"
                " or max_grad_norm, or set loss to mse if the teacher's output is the same for all tokens"
            )

    def _log(self) -> None:
        self._check_finite()
        state = self._averages.state()
        self._averages.clear()
        means = {name: total / state["counts"][name] for name, total in state["sums"].items()}
        means |= {
            **{group["rate"]: float(group["lr"]) for group in self.parts.optimizer.param_groups},
            "step_time": self._timer.read(),
            "seconds": self._seconds(),
        }
        if self.bench.device.type == "cuda":
            means["memory/peak_gb"] = torch.cuda.max_memory_allocated(self.bench.device) / 2**30
        self._metrics.append(self.step, {"block": self.task.name, **means})
        self._bar.show(means)

    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    # Checkpoints and results.

    def _save(self) -> None:
        self._check_finite()
        own = {
            **{f"rng.{name}": value for name, value in rng.capture(self.generator).items()},
            "averages": self._averages.state(),
        }
        meta = {**self.meta, "before": self._before, "seconds": self._seconds(), "torch": torch.__version__}
        checkpoint.write(self.folder, self.parts.snapshot(self.step, [own], meta, keep=True))
        checkpoint.prune(self.folder, 2)

    def _finish(self) -> None:
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.swapped_in())
            after = self._errors()
            tensors = {name: value.detach().cpu().clone() for name, value in self.student.state_dict().items()}
        result = BlockResult(
            name=self.task.name,
            error_before=self._before["l2"],
            error_after=after["l2"],
            l1_before=self._before["l1"],
            l1_after=after["l1"],
            steps=self.step,
            parameters=sum(each.numel() for each in self._named.values()),
            new=sum(each.numel() for name, each in self._named.items() if self.task.is_new(name)),
            seconds=self._seconds(),
        )
        with replacing(finished(self.config.folder, self.task.name)) as part:
            part.mkdir()
            save_file({name: value.contiguous() for name, value in tensors.items()}, part / STUDENT)
            write_result(part, result, self.meta)
        drop_checkpoints(self.folder)


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished block, including incomplete ones of a killed run."""
    for path in checkpoint.named(folder):
        shutil.rmtree(path)
    checkpoint.sweep(folder)


def is_finished(task: ReconstructTask, bench: Bench) -> bool:
    """Whether an earlier run finished this block with the same settings and records.

    Raises:
        UserError: an earlier run finished it with other settings or records.
    """
    place = finished(bench.config.folder, task.name)
    if not place.is_dir():
        return False
    bench.check(place, read_meta(place), bench.meta(task))
    return True


def _in_single(student: nn.Module) -> nn.Module:
    """Convert half-precision tensors of the student to float32; integers of quantised layers do not change."""
    for tensor in chain(student.parameters(), student.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return student
