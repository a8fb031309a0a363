"""The log of a run: means of metrics over all processes, for `metrics.jsonl`, trackers and progress bar."""

import time
from collections.abc import Mapping

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from postgen.files import replacing

from .config import TrainingConfig
from .logging import Averages, MetricsFile, Progress, StepTimer, Sums, merged_means


class RunLog:
    """Collects metrics without synchronising with the device, and writes their means.

    Args:
        args: the configuration; also written to `config.yaml` in the folder of the run.
        accelerator: its trackers receive every line as well.
    """

    def __init__(self, args: TrainingConfig, accelerator: Accelerator) -> None:
        self._args, self._accelerator = args, accelerator
        self._averages = Averages()
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=accelerator.device)
        self._seconds_before, self._began = 0.0, time.monotonic()
        self.newest: dict[str, float] = {}

    def restore(self, averages: Sums, seconds: float) -> None:
        """Restore the averages in progress and the seconds of the run so far, from a checkpoint."""
        self._averages.load(averages)
        self._seconds_before = seconds

    def open(self, step: int) -> None:
        """Open files, trackers and progress bar at `step`; lines of later steps are removed from `metrics.jsonl`."""
        args, main = self._args, self._accelerator.is_main_process
        self._timer = StepTimer()
        self._progress = Progress(step=step, max_steps=args.max_steps, shown=main and not args.disable_tqdm)
        if main:
            path = args.folder / "config.yaml"
            if not (args.evaluate_only and path.exists()):  # an evaluation keeps the configuration of the run
                # How this call resumes belongs to the call: `postgen train config.yaml` must not resume unasked.
                settings = {**args.to_dict(), "resume_from_checkpoint": None, "allow_changed": []}
                with replacing(path) as part:
                    part.write_text(yaml.safe_dump(settings, sort_keys=False))
            self._file = MetricsFile(args.folder / "metrics.jsonl", step)
        plain = {name: value for name, value in args.to_dict().items() if isinstance(value, int | float | str)}
        options = {"tensorboard": {"purge_step": step + 1}, "wandb": {"name": args.folder.name}}
        self._accelerator.init_trackers("postgen", config=plain, init_kwargs=options)

    def add(self, loss: Tensor, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Add the loss and metrics of a micro-batch of step `step`."""
        self._averages.add({"loss": loss, **metrics})
        # The first step with a loss that is not finite is kept on the device, and read with the next log line.
        # masked_fill_ is used because torch.where would copy `step` to the device and wait for it.
        fine = torch.isfinite(loss.detach()).reshape(()) | (self._first_bad >= 0)
        self._first_bad.masked_fill_(~fine, step)

    def step_done(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Count an optimiser step and add its metrics."""
        self._averages.add(metrics)
        self._timer.step()
        self._progress.step()

    def averages(self) -> Sums:
        """Return the averages in progress of this process."""
        return self._averages.state()

    def seconds(self) -> float:
        """Return the seconds of the run so far, including the time before a resume."""
        return self._seconds_before + time.monotonic() - self._began

    def check_finite(self) -> None:
        """Check that all losses so far were finite in all processes; every process must call this.

        Raises:
            FloatingPointError: a loss was not finite; the message names the step.
        """
        bad = max(gather_object([int(self._first_bad)]))
        if bad >= 0:
            raise FloatingPointError(
                f"the loss of step {bad} is not finite; lower learning_rate or max_grad_norm, or resume from an "
                f"earlier checkpoint in {self._args.folder}"
            )

    def forget(self) -> None:
        """Remove all values since the last log line, finite or not, after the weights were replaced."""
        self._averages.clear()
        self._first_bad.fill_(-1)

    def training_means(self, learning_rate: float) -> dict[str, float]:
        """Return the means over all processes since the last call, with learning rate, times and memory."""
        self.check_finite()
        means = merged_means(gather_object([self._averages.state()]))
        self._averages.clear()
        means |= {"learning_rate": learning_rate, "step_time": self._timer.read(), "seconds": self.seconds()}
        device = self._accelerator.device
        if device.type == "cuda":
            means["memory/peak_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        self._progress.show(means)
        return means

    def evaluation_means(self, own: Mapping[str, float]) -> dict[str, float]:
        """Return the means of evaluation metrics over all processes, under `eval_<name>`."""
        means = merged_means(gather_object([{"sums": dict(own), "counts": dict.fromkeys(own, 1)}]))
        return {f"eval_{name}": value for name, value in means.items()}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line to the file and the trackers."""
        self.newest.update(values)
        if self._accelerator.is_main_process:
            self._file.append(step, values)
        self._accelerator.log(dict(values), step=step)

    def pause(self) -> None:
        """Exclude the time since the last log line from the seconds per step, for example after an evaluation."""
        self._timer.read()

    def close(self) -> None:
        """Close the bar and the trackers."""
        if hasattr(self, "_progress"):
            self._progress.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()
