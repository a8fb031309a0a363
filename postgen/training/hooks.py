"""What a method says to the trainer, and what it may ask of it."""

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
from .processes import counted
from .run_state import Weights
from .sharding import blocks_inside, repeated_blocks
from .swap import WeightsCopy
from .updates import adamw, decay_groups

C = TypeVar("C", bound=TrainingConfig)


class TrainerHooks(ABC, Generic[C]):
    """The hooks of a method with their defaults. A method inherits from `Trainer`, which documents them."""

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig

    args: C
    """The configuration, an instance of `config_class`."""
    accelerator: Accelerator
    """Processes, autocast, trackers."""
    device: torch.device
    """Where this process computes."""
    generator: torch.Generator
    """On the device, seeded for this process, kept in checkpoints."""
    global_step: int
    """Optimiser steps done."""
    models: dict[str, nn.Module]
    """What `build` returned, prepared by accelerate: calls that carry gradients go through these."""
    sharded: bool
    """Whether the models hold only parts of their weights."""
    callbacks: Callbacks
    """The callbacks with the state and control that they share."""
    _raw: dict[str, nn.Module]
    _trained: dict[str, nn.Parameter]

    # What a method says.

    @abstractmethod
    def build(self) -> Mapping[str, nn.Module]:
        """Return the modules to train by name, on any device. Parameters without `requires_grad` stay frozen."""

    @abstractmethod
    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Draw one micro-batch with `self.generator`; return its mean loss and metrics (numbers or scalar tensors).

        Reading a tensor here (`item`, `float`) makes every step wait for the device: return it instead.
        A method with several backward passes calls `self.backward` inside `self.no_sync()` for all but the last,
        whose loss it returns.
        """

    @abstractmethod
    def export(self, folder: Path, weights: Weights) -> None:
        """Write the result of the run into the empty `folder`; called on the first process, average swapped in.

        Args:
            folder: where to.
            weights: all weights of each model by their names in its `state_dict`, whole, averaged where there is an
                average. Those of a model that is cut over the processes are copies on the CPU, and `uncut` makes a
                model of them; else they share its memory, and what is to outlive this call must be copied.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups. By default biases and gains (fewer than two dimensions) do not decay."""
        return decay_groups(self.trained().values())

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimiser of these groups: AdamW by the configuration, or any other.

        Its rate follows the schedule, and what it keeps is saved and resumed, as `OptimizerState` says.
        """
        return adamw(groups, self.args, self.device)

    def shard_blocks(self, name: str) -> Sequence[nn.Module]:
        """Return the modules inside a model that are cut, gathered and let go one by one, where weights are sharded.

        What lies outside of them is one more piece; without any the model is one piece. By default the repeated blocks
        of all networks inside it, as `postgen.families` or their own classes name them. They must be called in the
        forward pass of the model, not only their parts.

        Raises:
            UserError: no blocks are known inside it.
        """
        return repeated_blocks(self.unwrap(name), name)

    def compiled_blocks(self, name: str) -> Sequence[nn.Module]:
        """Return the modules inside a model that `torch_compile` compiles one by one: by default as `shard_blocks`.

        Raises:
            UserError: no blocks are known inside it.
        """
        if found := blocks_inside(model := self.unwrap(name)):
            return found
        raise UserError(
            f"torch_compile: no repeated blocks are known in {name}, a {type(model).__name__}: leave it out; a trainer"
            " of your own can name the modules in its compiled_blocks"
        )

    def on_models_ready(self) -> None:
        """Do something once the models are on their devices, cut where they are to be, with their first weights.

        A checkpoint is read afterwards. Here copies of the weights are made.
        """

    def on_optimizer_step(self) -> None:
        """Do something after each optimiser step and update of the average; `global_step` counts the step already."""

    def evaluate(self) -> dict[str, float]:
        """Return numbers to log as `eval_<name>`; called on every process, averaged over them, average swapped in."""
        return {}

    def weight_copies(self) -> Mapping[str, WeightsCopy]:
        """Return the copies of the trained weights that change during the run, for checkpoints to hold, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state in this process (a data cursor, ...): JSON values, whole tensors.

        Both under flat names.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned in this process; tensors come on the CPU."""

    def state_of_others(self, states: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `load_state_dict` takes in this process, where another number of processes wrote a checkpoint.

        By default that is refused: what they drew from their own random streams, one more or fewer would not draw.

        Args:
            states: of each of those processes, as `state_dict` returned it.
            before: the settings of that run.

        Raises:
            UserError: the run cannot go on so; the message says what to do.
        """
        raise UserError(
            f"{type(self).__name__} draws its data in each process, so that it would be another run. Start "
            f"{counted(len(states))}, or take the weights alone with init_from"
        )

    # What a method may ask.

    def unwrap(self, name: str) -> nn.Module:
        """Return the module that `build` gave for `name`."""
        return self._raw[name]

    def unaveraged(self, name: str) -> nn.Module:
        """Return a model for calls without gradients, which processes need not make equally often unless it is cut."""
        model = self.models[name]
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def progress(self) -> float:
        """Return the share of `max_steps` that is done, in [0, 1]."""
        return min(1.0, self.global_step / self.args.max_steps)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by `<model>.<parameter>`."""
        return dict(self._trained)

    def request_stop(self) -> None:
        """End the run after this step, as a callback may."""
        self.callbacks.control.should_training_stop = True
