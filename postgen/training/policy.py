"""The model that is trained: loaded, frozen but for adapters (or not at all), with its reference, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from postgen.assets import embedded_model
from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.families.exports import write_note
from postgen.families.loaded import defaults_of
from postgen.families.loading import inspect_model, load_pipeline
from postgen.families.lora import save_lora
from postgen.families.model_folder import Defaults
from postgen.families.video_calls import RANGES
from postgen.sampling.schedule import shifted
from postgen.settings import Part

from .lora import AdapterConfig, add_adapters
from .run_state import Weights
from .sharding import uncut
from .swap import WeightsCopy


@dataclass(kw_only=True)
class ModelConfig(Part):
    """Which model is trained, and how it is loaded and run.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "model"
    may_change: ClassVar[tuple[str, ...]] = ("gradient_checkpointing",)

    model: str | None = None
    """A diffusers folder or hub id; none is the embedded model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the frozen weights. Trained weights are float32 in any case."""

    flow_shift: float | None = None
    """Shift of the noise levels; none keeps the scheduler's."""

    max_sequence_length: int | None = None
    """Tokens of a prompt; none is the pipeline's default."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.flow_shift is None or self.flow_shift > 0, "flow_shift", "above 0")
        self.require_in(RANGES["max_sequence_length"], "max_sequence_length")


class Policy:
    """A pipeline with the parameters that are trained.

    Args:
        pipe: a pipeline, already on its device; its components are used in place.
        model: how it is run.
        lora: which adapters are added; without any, all weights of the denoiser are trained.
        peft_config: a `peft.LoraConfig`; none takes the one that `lora` describes.
        defaults: what the model's folder says about sizes and playback rate; none takes the family's rate.

    Raises:
        UserError: no denoiser for it, or LoRA layers that it does not have.
    """

    def __init__(
        self,
        pipe: Any,
        model: ModelConfig,
        lora: AdapterConfig,
        peft_config: Any = None,
        defaults: Defaults | None = None,
    ) -> None:
        self.pipe = pipe
        self.denoiser: Denoiser = frozen(pipe, model)
        self.defaults = defaults or defaults_of(pipe)
        self.modules: dict[str, Any] = dict(self.denoiser.transformers)
        self._start: WeightsCopy | None = None
        self.adapter = add_adapters(pipe, self.denoiser, lora, peft_config)
        # Adapters of a file are part of the model that training starts from.
        self._switches_off = self.adapter is not None and not lora.lora_path
        if self.adapter is None:
            for module in self.modules.values():
                # In half precision most updates of a usual learning rate would be rounded away.
                module.requires_grad_(True).float()
        for module in self.modules.values():
            if model.gradient_checkpointing:
                module.enable_gradient_checkpointing()

    def rate(self, fps: float | None) -> float:
        """Return the frames per second of clips, the model's where none are given, and tell a network that takes them.

        Args:
            fps: from the user.
        """
        rate = float(fps or self.defaults.fps)
        if hasattr(self.denoiser, "frame_rate"):  # LTX: positions in time are seconds
            self.denoiser.frame_rate = rate
        return rate

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a copy of the trained weights, because switching adapters off would not give it."""
        return not self._switches_off

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is what it was before training: adapters off, or, with all weights trained, a copy."""
        with ExitStack() as stack:
            if not self._switches_off:
                if self._start is None:
                    raise RuntimeError("keep_reference has not been called")
                stack.enter_context(self._start.swapped_in())
            else:
                for module in self.modules.values():
                    module.disable_adapters()
                    stack.callback(module.enable_adapters)
            yield

    def park_text_encoders(self) -> None:
        """Move the text encoders to the CPU: all prompts are encoded."""
        park_text_encoders(self.pipe)

    def check_reference(self, init_from: str | None) -> None:
        """Check that the weights which training starts from are those of the reference.

        Args:
            init_from: where other weights are about to be taken from (`TrainingConfig.init_from`).

        Raises:
            UserError: the weights are about to be replaced.
        """
        if self.copies_reference and init_from:
            raise UserError(
                "init_from with beta above 0: the reference would be the model before it. Name a folder "
                "of a pipeline with those weights as model (or their LoRA as lora_path), or set beta to 0"
            )

    def keep_reference(self) -> None:
        """Remember the weights as they are, on their device and cut where they are, if a copy is needed."""
        if self.copies_reference:
            self._start = WeightsCopy(self.modules)

    def save(self, folder: Path, weights: Weights) -> None:
        """Write LoRA files that `pipe.load_lora_weights` reads, or the trained models in diffusers' form.

        The latter with a note of the model around them, so that `postgen generate --model` takes the folder.

        Args:
            folder: an existing folder. Of two experts each gets its own sub-folder.
            weights: all weights of each model, as a trainer's `export` is given them.
        """
        if self.adapter is None:
            write_note(folder, self.pipe, list(self.modules))
        for name, module in self.modules.items():
            alone = len(self.modules) == 1
            if self.adapter is None:
                uncut(module, weights[name]).save_pretrained(folder / name)
            else:
                target = folder if alone else folder / name
                save_lora(self.pipe, target, name, module, self.adapter, weights[name])


def load_policy(
    source: Any, model: ModelConfig, lora: AdapterConfig, device: torch.device, peft_config: Any = None
) -> Policy:
    """Return the policy of a model.

    Args:
        source: a folder, a hub id, a pipeline, or None for the embedded model.
        model: how it is loaded and run.
        lora: which adapters are added.
        device: where it is trained.
        peft_config: instead of the one that `lora` describes.

    Raises:
        UserError: it cannot be loaded, or as `Policy`.
    """
    pipe, defaults = load_model(source, model, device)
    return Policy(pipe, model, lora, peft_config, defaults)


def load_model(source: Any, model: ModelConfig, device: torch.device) -> tuple[Any, Defaults | None]:
    """Return a pipeline on its device, and what its folder says of sizes and rate; None where there is no folder.

    Args:
        source: a folder, a hub id, a pipeline, or None for the embedded model.
        model: its number type.
        device: where to.

    Raises:
        UserError: it cannot be loaded.
    """
    if source is not None and not isinstance(source, str | Path):
        return source.to(device), None
    facts = inspect_model(source if source is not None else embedded_model(), images=True)
    with quiet_libraries():
        where = str(device) if device.type == "cuda" else device.type  # accelerate speaks of cpu:0
        pipe = load_pipeline(facts, dtype=model.dtype, device=where)
    pipe.set_progress_bar_config(disable=True)
    return pipe, facts.defaults


def frozen(pipe: Any, model: ModelConfig) -> Denoiser:
    """Freeze all weights of a pipeline, in evaluation mode, and return its denoiser, set up as a configuration says.

    Raises:
        UserError: no denoiser for it.
    """
    denoiser = denoiser_for(pipe)
    if model.flow_shift is not None:
        pipe.scheduler = shifted(pipe.scheduler, model.flow_shift)
    if model.max_sequence_length is not None:
        denoiser.max_sequence_length = model.max_sequence_length
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        module.requires_grad_(False).eval()
    return denoiser


def park_text_encoders(pipe: Any) -> None:
    """Move the text encoders of a pipeline to the CPU: all prompts are encoded."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            part.to("cpu")
