"""The training method `lit`: distil the stock transformer into a converted one (`postgen.lit.distillation`).

A run has three stages: an optional attention transfer, block by block (`postgen.lit.attention_transfer`); sampling of
the teacher's latents for all prompts, unless the user provides latents; and end-to-end training. To continue in a
later run, pass the export of this run as `student`.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.families import Condition, Denoiser
from postgen.families.exports import write_note
from postgen.lit.adapter import ADAPTER, save_adapter
from postgen.lit.attention_transfer import FOLDER, grid_of, the_network, train_layers, trained_tensors
from postgen.lit.config import LitConfig
from postgen.lit.convert import layers_of
from postgen.lit.distillation import Distillation, Terms, predicts_variance, with_network
from postgen.lit.drawn import Drawn, Given, stacked
from postgen.lit.saving import save
from postgen.lit.student import (
    bytes_of,
    export_state,
    is_new,
    lora_scales,
    make_student,
    named_parameters,
    read_student,
    shell_of,
)
from postgen.lit.train_config import VARIANCE_WEIGHT, LitTrainingConfig
from postgen.reconstruct import Share, read_report
from postgen.reconstruct.records import digest, weights_digest
from postgen.sampling.conditions import Embeddings, Row
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import Shuffled, normal, seed_of
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.latent_files import wait_until
from postgen.training.logging import say
from postgen.training.lora import add_adapters
from postgen.training.policy import frozen, load_model, park_text_encoders
from postgen.training.prompts import Prompts
from postgen.training.updates import decay_groups

_MODEL = "distillation"


class LitTrainer(Trainer[LitTrainingConfig]):
    """Trainer of a converted transformer, with the stock transformer as teacher.

    Args:
        args: the configuration.
        model: pipeline, folder or hub id of the teacher; None for `args.model`, or the embedded model if that is not
            set.
        train_dataset: prompts, in place of `args.train_dataset`.
        eval_dataset: held-out prompts, in place of `args.eval_dataset`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: no prompts, a model that cannot be converted, or settings that exclude each other.
    """

    config_class: ClassVar[type[TrainingConfig]] = LitTrainingConfig

    def __init__(
        self,
        args: LitTrainingConfig,
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
        if given is None and (args.eval_steps or args.eval_on_start or args.evaluate_only):
            raise UserError("eval_steps, eval_on_start and evaluate_only need held-out prompts: give eval_dataset")
        self.eval_rows = [] if given is None else Prompts(given, "eval_dataset", seed=args.seed, shuffle=False).rows
        self.share = Share(
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            local_rank=self.accelerator.local_process_index,
        )
        self._order = Shuffled(len(self.rows), args.seed)
        self._micro = 0

    @classmethod
    def from_config(cls, args: LitTrainingConfig) -> Self:
        """Create the trainer from the configuration of a recipe."""
        return cls(args)

    # Set-up.

    def build(self) -> Mapping[str, nn.Module]:
        """Load the teacher, run the attention transfer, create the student, and sample the teacher's latents."""
        args = self.args
        self.pipe, _ = load_model(self.source, args, self.device)
        self.denoiser: Denoiser = frozen(self.pipe, args)
        teacher = the_network(self.denoiser)
        kinds = {parameter.dtype for parameter in teacher.parameters()} & {torch.float16, torch.bfloat16}
        if kinds and not args.bf16:
            raise UserError(
                f"the teacher's weights are {', '.join(map(str, kinds))}, but trained weights are float32: set"
                " bf16: true to train under autocast, or dtype: float32"
            )
        shape = self.denoiser.latent_shape(**args.size)
        given = Given(args.latents, len(self.rows), shape) if args.latents else None
        terms = self._terms(teacher)
        grid = grid_of(self.denoiser, self.rows[0], args.size)
        config, tensors = read_student(args.student, teacher) if args.student else self._transferred()
        student = make_student(teacher, config, tensors, trained=args.train, shared=not self.sharded)
        layers = layers_of(student).values()
        if args.train == "new" and layers and all(layer.covers(grid) for layer in layers):
            raise UserError(
                f"all new layers equal softmax on {grid.frames} latent frames, so they have nothing to learn: use"
                " smaller windows or longer clips"
            )
        self._adapt(student, config)
        self._shell = shell_of(teacher, config)
        if args.gradient_checkpointing:
            student.enable_gradient_checkpointing()  # type: ignore[operator]
        self._draw(teacher, given)
        if self.accelerator.is_main_process:
            both, alone = (size / 1e9 for size in bytes_of(student, teacher))
            say(f"student and teacher share {both:.3g} GB of weights, the student has {alone:.3g} GB of its own")
        (name,) = self.denoiser.transformers
        return {_MODEL: Distillation(student, teacher, self.denoiser, name, terms)}

    def _terms(self, teacher: nn.Module) -> Terms:
        """Return the weights of the loss terms for this teacher."""
        args = self.args
        if args.variance_weight and not predicts_variance(teacher):
            raise UserError(
                f"variance_weight is {args.variance_weight:g}, but {type(teacher).__name__} predicts no variance:"
                " leave variance_weight out"
            )
        default = VARIANCE_WEIGHT if predicts_variance(teacher) else 0.0
        return Terms(
            task=args.task_weight,
            output=args.output_weight,
            variance=default if args.variance_weight is None else args.variance_weight,
            hidden=args.hidden_weight,
        )

    def _transferred(self) -> tuple[LitConfig, dict[str, Tensor]]:
        """Run the attention transfer if it is enabled; return the conversion and the trained tensors."""
        args = self.args
        if not args.transfer_steps:
            return args.lit, {}
        folder = args.folder / "transfer"
        report = train_layers(
            self.denoiser,
            args.lit,
            self.rows[: args.transfer_prompts],
            records=args.records(),
            train=args.transfer(),
            where=folder / "records",
            blocks_at_a_time=args.transfer_blocks,
            inherited=args.transfer_inherited,
            share=self.share,
        )
        if report.signal:
            signal.raise_signal(report.signal)  # `reconstruct` catches the signal; raise it now, the next run resumes
        names = (*report.blocks, *report.unfinished)
        wait_until(lambda: not read_report(report.folder, names).unfinished)
        return args.lit, trained_tensors(read_report(report.folder, names))

    def _adapt(self, student: nn.Module, config: LitConfig) -> None:
        """Add LoRA adapters to the student; the new layers are trained too."""
        if not self.args.use_peft:
            return
        if config.inherit == "output":
            raise UserError(
                "use_peft adapts the base model's projections, but inherit: output initialises them anew: use inherit:"
                " all, or leave use_peft out"
            )
        (name,) = self.denoiser.transformers
        add_adapters(self.pipe, with_network(self.denoiser, name, student), self.args)
        for parameter in named_parameters(student, "new").values():
            parameter.requires_grad_(True)

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
                drawn.make(told.table(rows.__getitem__), self.share, progress=not args.disable_tqdm)
                wait_until(drawn.complete)
            self.drawn[name] = drawn
        self._told = self._embeddings(guidance=False)
        if args.precompute_prompt_embeds:
            self._told.encode(text for row in (*self.rows, *self.eval_rows) for text in (row, _without_text(row)))
            park_text_encoders(self.pipe)

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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of inherited and of new weights, each with its learning rate."""
        args, trained = self.args, self.trained()
        new = [value for name, value in trained.items() if is_new(name)]
        rest = [value for name, value in trained.items() if not is_new(name)]
        groups = decay_groups(rest, lr=args.learning_rate)
        return groups + decay_groups(new, lr=args.learning_rate_new or args.learning_rate)

    # Steps.

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Noise the latents of some prompts, drop some captions, and compare the predictions of both networks.

        All random values depend on the position of a row in the whole run, so two processes use the same values as one
        process with twice the gradient accumulation.
        """
        args, batch = self.args, self.args.per_device_train_batch_size
        first = (self._micro * self.share.processes + self.share.rank) * batch
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
        loss, terms = self.models[_MODEL](*self._states("train", prompts, steps, noise, self._condition(rows)))
        return loss, {f"{name}_loss": value for name, value in terms.items()}

    def evaluate(self) -> dict[str, float]:
        """Return the means of the loss and its terms over the held-out prompts, each prompt at one noise level."""
        count, batch = len(self.eval_rows), self.args.per_device_train_batch_size
        shape, found = self.denoiser.latent_shape(**self.args.size), []
        # Every process makes the same number of forward passes, which sharded weights need.
        each = -(-count // self.share.processes)
        own = [(self.share.rank * each + place) % count for place in range(each)] if count else []
        for low in range(0, each, batch):
            prompts = own[low : low + batch]
            steps = torch.tensor([prompt % self.schedule.steps for prompt in prompts], device=self.device)
            noise = normal(shape, [seed_of(self.args.seed, "eval", prompt) for prompt in prompts], self.device)
            told = self._condition([self.eval_rows[prompt] for prompt in prompts])
            loss, terms = self.unaveraged(_MODEL)(*self._states("eval", prompts, steps, noise, told))
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

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the student in the format of `postgen.lit.load`, with LoRA merged, and a note of the base pipeline.

        If only converted attention modules were trained, also write the small adapter file of the student.
        """
        student = self.unwrap(_MODEL).student
        assert isinstance(student, nn.Module)
        own = {name.removeprefix("student."): value for name, value in weights[_MODEL].items() if name[0] == "s"}
        shell = copy.deepcopy(self._shell)
        wanted = shell.state_dict()
        state = export_state(own, lora_scales(student))
        shell.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()}, assign=True)
        save(shell, folder / FOLDER)
        if not self.sharded:  # with sharding, other processes hold parts of the teacher
            try:
                save_adapter(shell, folder / ADAPTER, base=self.unwrap(_MODEL).teacher)  # type: ignore[arg-type]
            except UserError as error:
                say(f"the export has no adapter file, only the whole transformer: {error}")
        write_note(folder, self.pipe, [FOLDER])


def chance(seed: int, place: int) -> float:
    """Return the random number in [0, 1) that decides whether the caption of a row is dropped."""
    return seed_of(seed, "forward", place, 1) % 2**20 / 2**20


def _without_text(row: Row) -> Row:
    return {**row, "prompt": ""}
