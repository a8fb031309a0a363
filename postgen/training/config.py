"""Settings of every run, under the names of `transformers.TrainingArguments` where the meaning is the same."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from postgen.errors import UserError, is_number, shown

from .nested import check_key, flat
from .updates import UpdatesConfig

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(kw_only=True)
class TrainingConfig(UpdatesConfig):
    """What every run has. A method's configuration inherits from it and from the other parts that it needs.

    All fields are keywords of one flat dataclass. A recipe, and `from_dict`, may nest those of a part under its name.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
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
    """Folder with safetensors weights to start from: an export, a diffusers folder or a checkpoint. Weights alone."""

    resume_from_checkpoint: str | None = None
    """A `checkpoint-N` folder; "latest" (in YAML also true): the newest one of `output_dir`, which must hold one;
    "auto": the newest one, or a new run where there is none."""

    allow_changed: list[str] = field(default_factory=list)
    """Settings that change what is learned and yet may differ from those of the checkpoint that is resumed; otherwise
    such a resume is refused. Those that change nothing of it (`Part.may_change`) need not be named."""

    max_seconds: float = 0.0
    """Stop after the first step that ends this many seconds after `train` began; 0 is no limit. The run then saves a
    checkpoint and exports, which takes more time; several processes agree on it every 10 steps."""

    per_device_train_batch_size: int = 1
    """Samples that one process draws for one micro-batch."""

    fully_shard: bool = False
    """Cut weights, gradients and moments over the processes with torch's `fully_shard` (FSDP2), on GPUs or CPUs."""

    torch_compile: bool = False
    """Compile the repeated blocks of the networks with `torch.compile`, each at its first call, for all shapes. The
    first steps take minutes; numbers differ by rounding."""

    torch_compile_backend: str = "inductor"
    """What compiles them, a name that `torch.compiler.list_backends` has."""

    eval_steps: int = 0
    """Evaluate every so many steps; 0 never."""

    eval_on_start: bool = False
    """Evaluate before the first step."""

    evaluate_only: bool = False
    """Evaluate the weights (of `init_from`, or of the checkpoint that is resumed) and end; nothing is trained."""

    save_steps: int = 500
    """Write a checkpoint every so many steps; 0 only at the end. One is always written at the end."""

    save_seconds: float = 0.0
    """Write a checkpoint and export also every so many seconds; 0 never."""

    save_total_limit: int | None = 2
    """Checkpoints to keep; none keeps all."""

    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers beside `metrics.jsonl`: tensorboard, trackio, wandb; "none" for no other."""

    def __post_init__(self) -> None:
        # Words that a recipe may use instead of a value; types and ranges are checked afterwards.
        self.report_to = _names(self.report_to)
        self.resume_from_checkpoint = _resume(self.resume_from_checkpoint)
        if is_number(self.save_total_limit) and self.save_total_limit == 0:
            self.save_total_limit = None
        super().__post_init__()
        self.require(self.per_device_train_batch_size >= 1, "per_device_train_batch_size", "at least 1")
        for name in ("max_seconds", "eval_steps", "save_steps", "save_seconds"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.save_total_limit is None or self.save_total_limit >= 1, "save_total_limit", "at least 1")
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
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration that a recipe with these values describes, flat or nested by part.

        Raises:
            UserError: no mapping, an unknown key, one that is given twice or is missing, or a value that does not fit.
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
