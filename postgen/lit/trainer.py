"""The training method `lit`: distil the stock transformer into a converted one (`postgen.lit.distillation`).

A run has three stages: an optional attention transfer, block by block (`postgen.lit.attention_transfer`); sampling of
the teacher's latents for all prompts, unless the user provides latents; and end-to-end training. To continue in a
later run, pass the export of this run as `student`.
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.exports import write_note
from postgen.lit.adapter import ADAPTER, save_adapter
from postgen.lit.attention_transfer import FOLDER, grid_of, the_network, train_layers, trained_tensors
from postgen.lit.config import LitConfig
from postgen.lit.convert import layers_of
from postgen.lit.distillation import Distillation, Terms, predicts_variance
from postgen.lit.saving import save
from postgen.lit.student import (
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
from postgen.training import TrainingConfig, Weights
from postgen.training.distil_trainer import MODEL, DistillationTrainer
from postgen.training.distillation import with_network
from postgen.training.latent_files import wait_until
from postgen.training.logging import say
from postgen.training.lora import add_adapters
from postgen.training.twins import bytes_of
from postgen.training.updates import decay_groups


class LitTrainer(DistillationTrainer[LitTrainingConfig]):
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

    def make_student(self, teacher: nn.Module, name: str) -> nn.Module:
        """Run the attention transfer, and return the student."""
        args = self.args
        the_network(self.denoiser)  # refuses a converted teacher
        self._weights = self._terms(teacher)
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
        if self.accelerator.is_main_process:
            both, alone = (size / 1e9 for size in bytes_of(student, teacher))
            say(f"student and teacher share {both:.3g} GB of weights, the student has {alone:.3g} GB of its own")
        return student

    def distillation(self, student: nn.Module, teacher: nn.Module, name: str) -> Distillation:
        """Return the module that compares the networks."""
        return Distillation(student, teacher, self.denoiser, name, self._weights)

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
            share=self._share(),
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

    def _share(self) -> Share:
        place = self.accelerator
        return Share(rank=place.process_index, processes=place.num_processes, local_rank=place.local_process_index)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of inherited and of new weights, each with its learning rate."""
        args, trained = self.args, self.trained()
        new = [value for name, value in trained.items() if is_new(name)]
        rest = [value for name, value in trained.items() if not is_new(name)]
        groups = decay_groups(rest, lr=args.learning_rate)
        return groups + decay_groups(new, lr=args.learning_rate_new or args.learning_rate)

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the student in the format of `postgen.lit.load`, with LoRA merged, and a note of the base pipeline.

        If only converted attention modules were trained, also write the small adapter file of the student.
        """
        student = self.unwrap(MODEL).student
        assert isinstance(student, nn.Module)
        own = {name.removeprefix("student."): value for name, value in weights[MODEL].items() if name[0] == "s"}
        shell = copy.deepcopy(self._shell)
        wanted = shell.state_dict()
        state = export_state(own, lora_scales(student))
        shell.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()}, assign=True)
        save(shell, folder / FOLDER)
        if not self.sharded:  # with sharding, other processes hold parts of the teacher
            try:
                save_adapter(shell, folder / ADAPTER, base=self.unwrap(MODEL).teacher)  # type: ignore[arg-type]
            except UserError as error:
                say(f"the export has no adapter file, only the whole transformer: {error}")
        write_note(folder, self.pipe, [FOLDER])
