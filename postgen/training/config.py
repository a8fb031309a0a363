"""Settings of every training run, named as in `transformers.TrainingArguments` where the meaning is the same."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from postgen.errors import UserError, is_number, shown

from .averages_config import MergeConfig, RescueConfig
from .nested import check_key, flat
from .updates import UpdatesConfig

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(kw_only=True)
class TrainingConfig(MergeConfig, RescueConfig, UpdatesConfig):
    """Settings that every run has. The configuration of a method inherits from it, and from the other parts it needs.

    The configuration is one flat dataclass with keyword-only fields. In a recipe and in `from_dict` the fields of a
    part may be nested under the name of the part.

    Raises:
        UserError: a value has the wrong type or is outside its range.
    """

    part: ClassVar[str] = "training"
    may_change: ClassVar[tuple[str, ...]] = (
        *("output_dir", "method", "init_from", "resume_from_checkpoint", "allow_changed", "evaluate_only"),
        *("max_steps", "max_seconds", "save_steps", "save_seconds", "save_total_limit"),
        *("report_to", "fully_shard", "torch_compile", "torch_compile_backend"),
    )
    share_out: ClassVar[tuple[str, ...]] = ("per_device_train_batch_size", "gradient_accumulation_steps")

    output_dir: str
    """Folder of the run: checkpoints, `metrics.jsonl`, `config.yaml`, `export/`."""

    method: str = ""
    """Name of the training method, a key of `postgen.training.METHODS` or `package.module:Class`."""

    init_from: str | None = None
    """Folder with safetensors weights to start from: an export, a diffusers folder or a checkpoint. Only the weights
    are loaded."""

    resume_from_checkpoint: str | None = None
    """Checkpoint to resume: a `checkpoint-N` folder; "latest" (in YAML also true) for the newest one in `output_dir`,
    an error if there is none; "auto" for the newest one, or a new run if there is none."""

    allow_changed: list[str] = field(default_factory=list)
    """Settings that may differ from the resumed checkpoint although they change what is learned; other differences of
    this kind are an error. Settings in `Part.may_change` may always differ."""

    max_seconds: float = 0.0
    """Stop after the first step that ends this many seconds after `train` began; 0 sets no limit. The run then saves a
    checkpoint and exports, which takes additional time. Several processes check the limit every 10 steps."""

    per_device_train_batch_size: int = 1
    """Number of samples in a micro-batch of one process."""

    fully_shard: bool = False
    """Shard weights, gradients and moments over the processes with torch's `fully_shard` (FSDP2), on GPUs or CPUs."""

    torch_compile: bool = False
    """Compile the repeated blocks of the networks with `torch.compile`, at their first call and with dynamic shapes.
    The first steps take minutes. Results differ by rounding."""

    torch_compile_backend: str = "inductor"
    """Backend of `torch_compile`, a name in `torch.compiler.list_backends`."""

    eval_steps: int = 0
    """Evaluate every `eval_steps` steps; 0 disables evaluation during training."""

    eval_on_start: bool = False
    """Evaluate before the first step."""

    evaluate_only: bool = False
    """Evaluate the weights of `init_from`, or of the resumed checkpoint, and exit without training."""

    save_steps: int = 500
    """Write a checkpoint every `save_steps` steps; with 0 only at the end. The end of a run always writes one."""

    save_seconds: float = 0.0
    """Additionally write a checkpoint and an export every `save_seconds` seconds; 0 disables this."""

    save_total_limit: int | None = 2
    """Number of checkpoints to keep; None (or 0) keeps all."""

    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers besides `metrics.jsonl`: tensorboard, trackio, wandb; an empty list or "none" for no tracker."""

    def __post_init__(self) -> None:
        # Replace the words that a recipe may use instead of a value, before types and ranges are checked.
        self.report_to = _names(self.report_to)
        self.resume_from_checkpoint = _resume(self.resume_from_checkpoint)
        if is_number(self.save_total_limit) and self.save_total_limit == 0:
            self.save_total_limit = None
        super().__post_init__()
        self.require(self.per_device_train_batch_size >= 1, "per_device_train_batch_size", "at least 1")
        for name in ("max_seconds", "eval_steps", "save_steps", "save_seconds"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.save_total_limit is None or self.save_total_limit >= 1, "save_total_limit", "at least 1")
        for name in ("merge_last", "rescue_spike"):
            saves = self.save_steps or self.save_seconds
            self.require(bool(saves or not getattr(self, name)), name, "0 without save_steps, which makes checkpoints")
        own = self.torch_compile or self.torch_compile_backend == "inductor"
        self.require(own, "torch_compile_backend", "left out without torch_compile: true")
        self.require(bool(self.output_dir), "output_dir", "the name of a folder")
        known = [item.name for item in dataclasses.fields(self)]
        for name in self.allow_changed:
            check_key(name, known, "allow_changed")
        for name in self.report_to:
            if name not in TRACKERS:
                raise UserError(f"report_to: unknown tracker {name!r}. Known: {', '.join(TRACKERS)}, or none.")

    @property
    def evaluates(self) -> bool:
        """Whether a setting asks for evaluations."""
        return bool(self.evaluate_only or self.eval_steps or self.eval_on_start or self.merge_metric)

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration with the values of a recipe, flat or nested by part.

        Raises:
            UserError: `values` is not a mapping, a key is unknown, given twice or missing, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"the settings are {shown(values)}, they must be a mapping of names to values.")
        given = flat(cls, values, "from_dict")
        needed = [item.name for item in dataclasses.fields(cls) if item.default is item.default_factory]
        if missing := [name for name in needed if name not in given]:
            raise UserError(f"{cls.__name__} needs {' and '.join(missing)}: give a value for each.")
        return cls(**given)


def _names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else [] if value is None else value
    return [] if names == ["none"] else names


def _resume(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in ("true", "latest", "auto"):
        return "auto" if value.lower() == "auto" else "latest"
    if value is False or value in ("", "false", "False"):
        return None
    return "latest" if value is True else value
