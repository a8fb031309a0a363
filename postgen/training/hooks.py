"""Hooks that a training method overrides, and helpers that it may call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from postgen.errors import UserError

from .callbacks import Callbacks
from .config import TrainingConfig
from .optimizers import optimizer_of
from .processes import counted
from .run_state import Weights
from .sharding import blocks_inside, repeated_blocks
from .swap import WeightsCopy
from .updates import decay_groups

C = TypeVar("C", bound=TrainingConfig)


class TrainerHooks(ABC, Generic[C]):
    """Hooks that a training method overrides, and helpers. Inherit from `Trainer`, whose docstring lists the hooks."""

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig

    args: C
    """The configuration, an instance of `config_class`."""
    accelerator: Accelerator
    """The accelerator of this trainer: processes, autocast, trackers."""
    device: torch.device
    """Device of this process."""
    generator: torch.Generator
    """Random generator on the device, seeded for this process, saved in checkpoints."""
    global_step: int
    """Optimiser steps done."""
    models: dict[str, nn.Module]
    """Modules that `build` returned, prepared by accelerate. Forward passes with gradients must call these."""
    sharded: bool
    """Whether the weights of the models are sharded over processes."""
    on_trial: bool = False
    """Whether `evaluate` measures an average of checkpoints that the run may discard, or only shows which metrics it
    has: such an evaluation writes no pictures and decides nothing else."""
    callbacks: Callbacks
    """The callbacks with their shared state and control."""
    _raw: dict[str, nn.Module]
    _trained: dict[str, nn.Parameter]

    # Hooks that a method overrides.

    @abstractmethod
    def build(self) -> Mapping[str, nn.Module]:
        """Return the modules to train by name, on any device. Parameters without `requires_grad` stay frozen."""

    @abstractmethod
    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Draw one micro-batch with `self.generator`; return its mean loss and metrics (numbers or scalar tensors).

        Return tensors as they are: a tensor that is read on the host (`item`, `float`) makes every step wait for the
        device. A method with several backward passes computes all losses but the last one inside `self.no_sync()`,
        passes them to `self.backward` there, and returns the last one.
        """

    @abstractmethod
    def export(self, folder: Path, weights: Weights) -> None:
        """Write the result of the run into the empty `folder`, on the first process, with the average swapped in.

        Args:
            folder: the folder to write into.
            weights: the state dict of each model, with whole tensors, averaged if the run keeps an average. For a
                sharded model the tensors are copies on the CPU, and `uncut` builds a model from them. Otherwise they
                share memory with the model; copy them if they must outlive this call.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups. By default biases and gains (under two dimensions) do not decay."""
        return decay_groups(self.trained().values())

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimiser for these parameter groups; by default the configured one (`optim`).

        The learning rate follows the schedule. Checkpoints save the optimiser's state, see `OptimizerState`.
        """
        return optimizer_of(groups, self.args, self.device, sharded=self.sharded)

    def shard_blocks(self, name: str) -> Sequence[nn.Module]:
        """Return the modules inside a model that FSDP shards, gathers and frees one by one.

        All other weights of the model form one more unit. An empty sequence makes the whole model one unit. The
        default is the repeated blocks of all networks inside the model, as `postgen.families` or the networks' classes
        name them. The forward pass of the model must call these modules themselves, and not only their parts.

        Args:
            name: name of the model.

        Raises:
            UserError: no blocks are known inside the model.
        """
        return repeated_blocks(self.unwrap(name), name)

    def compiled_blocks(self, name: str) -> Sequence[nn.Module]:
        """Return the modules inside a model that `torch_compile` compiles; by default its repeated blocks.

        Args:
            name: name of the model.

        Raises:
            UserError: no blocks are known inside the model.
        """
        if found := blocks_inside(model := self.unwrap(name)):
            return found
        raise UserError(
            f"torch_compile: no repeated blocks are known in {name}, a {type(model).__name__}: set torch_compile:"
            " false; a trainer of your own can name the modules in its compiled_blocks"
        )

    def on_models_ready(self) -> None:
        """Act once the models are on their devices, sharded if configured, with their initial weights.

        A method makes its copies of the weights here. A checkpoint is read afterwards.
        """

    def on_gradients(self) -> None:
        """Act on the gradients of an update, which the prepared models have averaged, before they are clipped."""

    def on_optimizer_step(self) -> None:
        """Act after each optimiser step and update of the average; `global_step` already counts this step."""

    def evaluate(self) -> dict[str, float]:
        """Return metrics to log as `eval_<name>`.

        Every process calls this method with the average swapped in; the log has the mean over the processes.
        """
        return {}

    def inputs(self) -> Mapping[str, Any]:
        """Return inputs that all processes must have read alike, by name, such as the rows of a data set.

        `train` compares their JSON form; of a value that JSON does not support only the class is compared.
        """
        return {}

    def weight_copies(self) -> Mapping[str, WeightsCopy]:
        """Return the copies of the trained weights, by name, that change during the run; checkpoints save them."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state in this process, such as a position in the data, for checkpoints.

        Values are JSON values and whole (not sharded) tensors under flat names.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned in this process; tensors are on the CPU."""

    def state_of_others(self, states: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state for `load_state_dict` in this process if another number of processes wrote the checkpoint.

        The default raises an error: each process draws data from its own random stream, so another number of processes
        would draw other data.

        Args:
            states: return value of `state_dict` in each process of the checkpoint.
            before: settings of the run that wrote the checkpoint.

        Raises:
            UserError: the run cannot resume with this number of processes; the message says what to do.
        """
        raise UserError(
            f"{type(self).__name__} draws its data in each process, so another number of processes would be another "
            f"run. Start {counted(len(states))}, or load the weights only with init_from"
        )

    # Helpers that a method may call.

    def unwrap(self, name: str) -> nn.Module:
        """Return the module that `build` returned under `name`, without accelerate's wrappers."""
        return self._raw[name]

    def unaveraged(self, name: str) -> nn.Module:
        """Return a model whose gradients are not averaged over processes; mostly for forward passes without gradients.

        Processes may call the returned module a different number of times, unless the model is sharded.
        """
        model = self.models[name]
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def progress(self) -> float:
        """Return the fraction of `max_steps` that is done, in [0, 1]."""
        return min(1.0, self.global_step / self.args.max_steps)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by `<model>.<parameter>`."""
        return dict(self._trained)

    def request_stop(self) -> None:
        """Stop the run after this step, like a callback that sets `should_training_stop`."""
        self.callbacks.control.should_training_stop = True
