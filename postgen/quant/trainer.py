"""The training method `quant`: train the scales of a quantised network end to end, with the exact network as teacher.

E2E-QP (arXiv:2407.11062) for diffusion models: codes and zero points stay, and the scales learn to reproduce the
predictions of the exact network (velocity, noise, ...) on its own latents,

    L = |v_q(x_t, t, c) - v(x_t, t, c)|^2

at the noise levels of the sampler. With `branch_rank` each layer also has a trained low-rank branch, whose rank may
fall to 0 while the scales learn (QVGen, arXiv:2505.11497).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from postgen.errors import UserError
from postgen.families.exports import write_note
from postgen.quant.branch_decay import decay_
from postgen.quant.e2e_student import add_branches_, fill_, freeze_, read_quantized
from postgen.quant.model import quantize_weights
from postgen.quant.rounding import Quantized
from postgen.quant.solvers import solve
from postgen.quant.spec import LayerSpec
from postgen.quant.train_config import QuantTrainingConfig
from postgen.quant.trained_scales import SCALE, scale_layers, train_scales_
from postgen.training import TrainingConfig, Weights
from postgen.training.digests import weights_digest
from postgen.training.distil_trainer import MODEL, DistillationTrainer
from postgen.training.distillation import Distillation, Terms
from postgen.training.logging import say
from postgen.training.twins import bytes_of, empty_copy, share_equal_, twin


class QuantTrainer(DistillationTrainer[QuantTrainingConfig]):
    """Trainer of the scales of a quantised network, with the exact network as teacher.

    Args:
        args: the configuration.
        model: pipeline, folder or hub id of the exact model; None for `args.model`, or the embedded model if that is
            not set.
        train_dataset: prompts, in place of `args.train_dataset`.
        eval_dataset: held-out prompts, in place of `args.eval_dataset`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: no prompts, a model that cannot be quantised, or settings that exclude each other.
    """

    config_class: ClassVar[type[TrainingConfig]] = QuantTrainingConfig

    def make_student(self, teacher: nn.Module, name: str) -> nn.Module:
        """Quantise a copy of the teacher, or load the student, and make its scales trainable."""
        args = self.args
        if args.student:
            student = read_quantized(args.student, name, teacher).to(self.device)
            if not self.sharded:
                share_equal_(student, teacher)
        else:
            student = twin(teacher, shared=not self.sharded)
            quantize_weights(student, args.spec, self._solve)
        # The codes are part of no checkpoint, so a resumed run must find the same.
        self._codes = weights_digest(student)
        self._shell = empty_copy(student)
        train_scales_(student)
        if args.branch_rank:
            draws = torch.Generator().manual_seed(args.seed)
            add_branches_(student, None if args.student else teacher, args.branch_rank, draws)
        freeze_(student)
        if self.accelerator.is_main_process:
            both, alone = (size / 1e9 for size in bytes_of(student, teacher))
            say(f"student and teacher share {both:.3g} GB of weights, the student has {alone:.3g} GB of its own")
        return student

    def _solve(self, name: str, linear: nn.Linear, spec: LayerSpec) -> Quantized:
        assert spec.weight is not None
        return solve(linear.weight, spec.weight, self.args.solver)

    def distillation(self, student: nn.Module, teacher: nn.Module, name: str) -> Distillation:
        """Return the module that compares the networks."""
        terms = Terms(task=self.args.task_weight, output=self.args.output_weight)
        self._name = name
        return Distillation(student, teacher, self.denoiser, name, terms)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of scales, which do not decay, and of branches, each with its learning rate."""
        args, trained = self.args, self.trained()
        scales = [value for name, value in trained.items() if name.endswith(SCALE)]
        rest = [value for name, value in trained.items() if not name.endswith(SCALE)]
        groups: list[dict[str, Any]] = [{"params": scales, "lr": args.learning_rate, "weight_decay": 0.0}]
        if rest:
            groups.append({"params": rest, "lr": args.branch_learning_rate or args.learning_rate})
        return groups

    def on_optimizer_step(self) -> None:
        """Lower the rank of the branches."""
        if not self.args.branch_decay_steps:
            return
        for layer in scale_layers(self.unwrap(MODEL)).values():
            if layer.aux_gain is not None:
                assert layer.aux_up is not None
                assert layer.aux_down is not None
                decay_(layer.aux_gain, layer.aux_up, layer.aux_down, self.global_step, self.args.branch_decay_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: the number of micro-batches so far, and a digest of the codes."""
        return {**super().state_dict(), "codes": self._codes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Raises:
            UserError: the codes of the student differ from those of the run that wrote the checkpoint.
        """
        super().load_state_dict(state)
        if state["codes"] != self._codes:
            raise UserError(
                "the quantised student is not the one of the run that wrote this checkpoint, so its scales do not fit:"
                " give the same model and the same student as before"
            )

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the quantised network with its trained scales, and a note of the base pipeline."""
        student = self.unwrap(MODEL).student
        assert isinstance(student, nn.Module)
        own = {name.removeprefix("student."): value for name, value in weights[MODEL].items() if name[0] == "s"}
        whole: Any = fill_(empty_copy(self._shell), student, own)
        whole.save_pretrained(folder / self._name)
        write_note(folder, self.pipe, [self._name])
