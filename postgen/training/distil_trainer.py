"""The trainer of a student that learns from the exact network of a model: prompts, latents of the teacher, steps.

A run has two stages. The teacher samples latents for all prompts, unless the user provides latents. Then each step
noises some of them, and compares the predictions of both networks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.families import Condition, Denoiser
from postgen.sampling.conditions import Embeddings, Row
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import Shuffled, normal, seed_of

from .config import TrainingConfig
from .digests import digest, weights_digest
from .distillation import Distillation
from .drawn import Drawn, DrawnConfig, Given, stacked
from .latent_files import wait_until
from .modes import checkpoint_gradients
from .policy import ModelConfig, frozen, load_model, park_text_encoders
from .prompts import Prompts, PromptsConfig
from .trainer import Trainer

MODEL = "distillation"
"""Name of the trained module, a `Distillation`."""


@dataclass(kw_only=True)
class DistillationConfig(TrainingConfig, PromptsConfig, ModelConfig, DrawnConfig):
    """Settings of `DistillationTrainer`.

    The settings from `num_frames` to `negative_prompt` determine how the teacher samples the latents, and `batch_size`
    is the number of prompts that it samples together.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    files: ClassVar[tuple[str, ...]] = ("latents",)

    latents: str | None = None
    """Safetensors file with your own final latents as the tensor `latents`, (N, ...): one row for each prompt of
    `train_dataset`, in the same order, in the format of the denoiser (`encode_video`). They are kept in memory. None:
    the teacher samples the latents."""

    task_weight: float = 1.0
    """Weight of the task loss, the model's own training loss on noised latents."""

    output_weight: float = 0.5
    """Weight of the difference between the predictions of student and teacher."""

    states: Literal["noised", "trajectory"] = "noised"
    """Inputs of both networks. noised: final latents with fresh noise; trajectory: latents from the teacher's sampling
    trajectories, which needs `task_weight: 0`."""

    caption_dropout: float = 0.1
    """Share of rows with an empty prompt, the same rows for student and teacher; 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_weight", "output_weight"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(0 <= self.caption_dropout <= 1, "caption_dropout", "from 0 to 1")
        self.require(self.states == "noised" or not self.task_weight, "task_weight", "0 with states: trajectory")
        self.require(self.states == "noised" or not self.latents, "states", "noised with latents, which are finished")


C = TypeVar("C", bound=DistillationConfig)


class DistillationTrainer(Trainer[C]):
    """Trainer of a student with the exact network as teacher.

    A method defines `make_student`, `distillation` and `export`.

    Args:
        args: the configuration.
        model: pipeline, folder or hub id of the teacher; None for `args.model`, or the embedded model if that is not
            set.
        train_dataset: prompts, in place of `args.train_dataset`.
        eval_dataset: held-out prompts, in place of `args.eval_dataset`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: no prompts, or settings that exclude each other.
    """

    config_class: ClassVar[type[TrainingConfig]] = DistillationConfig

    def __init__(
        self,
        args: C,
        model: Any = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        super().__init__(args, callbacks)
        self.source = args.model if model is None else model
        given = args.train_dataset if train_dataset is None else train_dataset
        if given is None:
            raise UserError("there are no prompts to train on: give train_dataset")
        self.rows = Prompts(given, "train_dataset", seed=args.seed, shuffle=False).rows
        given = args.eval_dataset if eval_dataset is None else eval_dataset
        if given is None and args.evaluates:
            raise UserError(
                "eval_steps, merge_metric, eval_on_start and evaluate_only need held-out prompts: give eval_dataset"
            )
        self.eval_rows = [] if given is None else Prompts(given, "eval_dataset", seed=args.seed, shuffle=False).rows
        self._order = Shuffled(len(self.rows), args.seed)
        self._micro = 0

    @classmethod
    def from_config(cls, args: C) -> Self:
        """Create the trainer from the configuration of a recipe."""
        return cls(args)

    @abstractmethod
    def make_student(self, teacher: nn.Module, name: str) -> nn.Module:
        """Return the student of a teacher, a network of the same class; both may share untrained weights.

        Args:
            teacher: the exact network, frozen, on its device.
            name: name of the network in the denoiser.
        """

    @abstractmethod
    def distillation(self, student: nn.Module, teacher: nn.Module, name: str) -> Distillation:
        """Return the module that compares the networks.

        Args:
            student: the student.
            teacher: the teacher.
            name: name of the network in the denoiser.
        """

    # Set-up.

    def build(self) -> Mapping[str, nn.Module]:
        """Load the teacher, create the student, and sample the teacher's latents."""
        args = self.args
        self.pipe, _ = load_model(self.source, args, self.device)
        self.denoiser: Denoiser = frozen(self.pipe, args)
        (name, teacher), *others = self.denoiser.transformers.items()
        if others:
            raise UserError(
                f"{type(self.pipe).__name__} has the networks {', '.join(self.denoiser.transformers)}, and one run"
                " trains one network: give a pipeline with one of them"
            )
        kinds = {parameter.dtype for parameter in teacher.parameters()} & {torch.float16, torch.bfloat16}
        if kinds and not args.bf16:
            raise UserError(
                f"the teacher's weights are {', '.join(map(str, kinds))}, but trained weights are float32: set"
                " bf16: true to train under autocast, or dtype: float32"
            )
        shape = self.denoiser.latent_shape(**args.size)
        given = Given(args.latents, len(self.rows), shape) if args.latents else None
        student = self.make_student(teacher, name)
        made = self.distillation(student, teacher, name)
        if args.gradient_checkpointing:
            checkpoint_gradients(student)
        self._draw(teacher, given)
        return {MODEL: made}

    def _draw(self, teacher: nn.Module, given: Given | None) -> None:
        """Sample the latents of all prompts, or use the given ones, and encode the prompts."""
        args, size = self.args, self.args.size
        schedule = schedule_of(self.denoiser, args.num_inference_steps, self.denoiser.latent_shape(**size))
        self.schedule = schedule
        sampler = Sampler(
            self.denoiser, schedule, Sampling(guidance=args.guidance_scale, size=size), device=self.device
        )
        said = {"teacher": weights_digest(teacher), "size": size, "guidance": args.guidance_scale}
        told = self._embeddings(guidance=args.guidance_scale > 1)
        self.drawn: dict[str, Drawn | Given] = {}
        for name, rows in (("train", self.rows), ("eval", self.eval_rows)):
            if name == "train" and given is not None:
                self.drawn[name] = given
                continue
            drawn = Drawn(
                args.folder / "latents" / name,
                sampler,
                len(rows),
                batch=args.batch_size,
                seed=args.seed + (name == "eval"),
                steps=args.states == "trajectory",
                said={**said, "texts": digest([[row["prompt"], row.get("negative_prompt")] for row in rows])},
            )
            if rows:
                own = drawn.files.chunks[self._rank :: self._processes]
                drawn.make(told.table(rows.__getitem__), own, progress=not args.disable_tqdm)
                wait_until(drawn.complete)
            self.drawn[name] = drawn
        self._told = self._embeddings(guidance=False)
        if args.precompute_prompt_embeds:
            self._told.encode(text for row in (*self.rows, *self.eval_rows) for text in (row, _without_text(row)))
            park_text_encoders(self.pipe)

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def _processes(self) -> int:
        return int(self.accelerator.num_processes)

    def _embeddings(self, *, guidance: bool) -> Embeddings:
        args = self.args
        return Embeddings(
            self.denoiser,
            size=args.size,
            guidance=guidance,
            negative_prompt=args.negative_prompt,
            keep_all=args.precompute_prompt_embeds,
            device=self.device,
        )

    # Steps.

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Noise the latents of some prompts, drop some captions, and compare the predictions of both networks.

        All random values depend on the position of a row in the whole run, so two processes use the same values as one
        process with twice the gradient accumulation.
        """
        args, batch = self.args, self.args.per_device_train_batch_size
        first = (self._micro * self._processes + self._rank) * batch
        self._micro += 1
        places = range(first, first + batch)
        prompts = [self._order.at(place) if args.shuffle_dataset else place % len(self.rows) for place in places]
        seeds = [seed_of(args.seed, "forward", place) for place in places]
        rows = [
            _without_text(self.rows[prompt]) if chance(args.seed, place) < args.caption_dropout else self.rows[prompt]
            for prompt, place in zip(prompts, places, strict=True)
        ]
        steps = torch.tensor([seed % self.schedule.steps for seed in seeds], device=self.device)
        noise = normal(self.denoiser.latent_shape(**args.size), seeds, self.device)
        loss, terms = self.models[MODEL](*self._states("train", prompts, steps, noise, self._condition(rows)))
        return loss, {f"{name}_loss": value for name, value in terms.items()}

    def evaluate(self) -> dict[str, float]:
        """Return the means of the loss and its terms over the held-out prompts, each prompt at one noise level."""
        count, batch = len(self.eval_rows), self.args.per_device_train_batch_size
        shape, found = self.denoiser.latent_shape(**self.args.size), []
        # Every process makes the same number of forward passes, which sharded weights need.
        each = -(-count // self._processes)
        own = [(self._rank * each + place) % count for place in range(each)] if count else []
        for low in range(0, each, batch):
            prompts = own[low : low + batch]
            steps = torch.tensor([prompt % self.schedule.steps for prompt in prompts], device=self.device)
            noise = normal(shape, [seed_of(self.args.seed, "eval", prompt) for prompt in prompts], self.device)
            told = self._condition([self.eval_rows[prompt] for prompt in prompts])
            loss, terms = self.unaveraged(MODEL)(*self._states("eval", prompts, steps, noise, told))
            found += [{"loss": loss, **{f"{name}_loss": value for name, value in terms.items()}}] * len(prompts)
        return {name: float(torch.stack([row[name] for row in found]).mean()) for name in (found[0] if found else ())}

    def _states(
        self, kind: str, prompts: Sequence[int], steps: Tensor, noise: Tensor, told: Condition
    ) -> tuple[Tensor, Tensor, Condition, Tensor | None]:
        """Return the arguments of `Distillation.forward`: latents, noise levels, condition and target of the task."""
        levels = self.schedule.levels(steps, steps + 1)
        sigma = self.schedule.received(steps)
        if self.args.states == "trajectory":
            drawn = self.drawn[kind]
            assert isinstance(drawn, Drawn)
            return stacked(drawn, prompts, steps.tolist(), self.device), sigma, told, None
        clean = self.drawn[kind].finished(prompts, self.device)
        wanted = None
        if self.args.task_weight:
            wanted = wanted_of(clean, noise, levels, self.schedule.prediction_type)
        return noised(clean, noise, levels), sigma, told, wanted

    def _condition(self, rows: Iterable[Row]) -> Condition:
        found = [self._told.of(row) for row in rows]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: the number of micro-batches so far."""
        return {"micro": self._micro}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._micro = int(state["micro"])


def chance(seed: int, place: int) -> float:
    """Return the random number in [0, 1) that decides whether the caption of a row is dropped."""
    return seed_of(seed, "forward", place, 1) % 2**20 / 2**20


def _without_text(row: Row) -> Row:
    return {**row, "prompt": ""}
