"""The trained model (policy): loading, freezing, adapters, the reference policy, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postgen.assets import embedded_model
from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.families.exports import write_note
from postgen.families.linear_checks import check_no_adapters, check_not_quantized
from postgen.families.loaded import defaults_of
from postgen.families.loading import inspect_model, load_pipeline
from postgen.families.lora import save_lora
from postgen.families.model_folder import Defaults
from postgen.sampling.schedule import shifted

from .base_quant import mark_constant, quantization_of
from .lora import AdapterConfig, add_adapters
from .memory_config import MemoryConfig, place_frozen
from .modes import checkpoint_gradients
from .policy_config import ModelConfig
from .run_state import Weights
from .sharding import uncut
from .swap import WeightsCopy

_OTHER_ADAPTERS = (
    "Training begins from a model without adapters: unload them (pipe.unload_lora_weights()), with pipe.fuse_lora()"
    " before it to make them part of the weights; a method with the setting lora_path trains a LoRA file further"
)


class Policy:
    """A pipeline with trained parameters: adapters, or all weights of the denoiser.

    Args:
        pipe: a pipeline on its device; its components are modified in place.
        model: settings of the model.
        lora: settings of the adapters; without adapters, all weights of the denoiser are trained.
        peft_config: a `peft.LoraConfig` that replaces the settings in `lora`.
        defaults: default sizes and frame rate from the model's folder; None uses the defaults of the family.

    Raises:
        UserError: there is no denoiser for the pipeline, or `add_adapters` refuses the adapters.
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
        # With lora_path the loaded adapters belong to the starting model, so disabling them would not give the
        # reference.
        self._switches_off = self.adapter is not None and not lora.lora_path
        if self.adapter is None:
            for module in self.modules.values():
                check_not_quantized(module, "be trained as a whole: train a LoRA, or load the exact model")
                # In half precision, rounding would cancel most updates at usual learning rates.
                module.requires_grad_(True).float()
        for module in self.modules.values() if model.gradient_checkpointing else ():
            checkpoint_gradients(module)

    def rate(self, fps: float | None) -> float:
        """Return the frames per second of clips, and set the frame rate of denoisers that use one.

        Args:
            fps: the configured rate; None uses the model's default.
        """
        rate = float(fps or self.defaults.fps)
        if hasattr(self.denoiser, "frame_rate"):  # LTX encodes the time of a frame in seconds
            self.denoiser.frame_rate = rate
        return rate

    @property
    def copies_reference(self) -> bool:
        """Whether the reference policy is a copy of the weights; otherwise it is the model with adapters disabled."""
        return not self._switches_off

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Turn the model into the reference policy for the enclosed code: disable adapters, or swap the copy in."""
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
        """Move the text encoders to the CPU. Call this after all prompts are encoded."""
        park_text_encoders(self.pipe)

    def check_reference(self, init_from: str | None) -> None:
        """Check that the reference policy has the weights from which training starts.

        Args:
            init_from: `TrainingConfig.init_from`, the folder whose weights replace those of the model.

        Raises:
            UserError: `init_from` would replace weights that the reference policy copies.
        """
        if self.copies_reference and init_from:
            raise UserError(
                "init_from with beta or a guard above 0: the reference policy would not have the weights of init_from."
                " Give a pipeline folder with these weights as model (or their LoRA as lora_path), or set them to 0"
            )

    def keep_reference(self) -> None:
        """Copy the current weights as the reference policy, if it needs a copy, sharded like the weights."""
        if self.copies_reference:
            self._start = WeightsCopy(self.modules)

    def save(self, folder: Path, weights: Weights) -> None:
        """Write LoRA files for `pipe.load_lora_weights`, or models in diffusers' format if all weights are trained.

        In the second case a file `base.json` names the pipeline of the models, so that `postgen generate --model`
        accepts the folder.

        Args:
            folder: an existing folder. With two networks (experts), each gets its own sub-folder.
            weights: state dict of each model, as `TrainerHooks.export` receives them.
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
    source: Any,
    model: ModelConfig,
    lora: AdapterConfig,
    device: torch.device,
    peft_config: Any = None,
    memory: MemoryConfig | None = None,
) -> Policy:
    """Load a model and return its policy.

    Args:
        source: a folder, a hub id, a pipeline, or None for the embedded model.
        model: settings of the model.
        lora: settings of the adapters.
        device: device of the training.
        peft_config: a `peft.LoraConfig` that replaces the settings in `lora`.
        memory: settings of frozen weights; None keeps them exact and on the device.

    Raises:
        UserError: the model cannot be loaded, or `Policy` refuses it.
    """
    pipe, defaults = load_model(source, model, device, memory)
    return Policy(pipe, model, lora, peft_config, defaults)


def load_model(
    source: Any, model: ModelConfig, device: torch.device, memory: MemoryConfig | None = None
) -> tuple[Any, Defaults | None]:
    """Load a pipeline, and the default sizes and frame rate from its folder.

    Args:
        source: a folder, a hub id, a pipeline, or None for the embedded model.
        model: settings of the model; only the dtype is used here.
        device: device of the pipeline.
        memory: settings of frozen weights; None keeps them exact and on the device.

    Returns:
        The pipeline, and its defaults; the defaults are None if `source` is a pipeline.

    Raises:
        UserError: the model cannot be loaded, or it does not support the settings of frozen weights.
    """
    quant = "none" if memory is None else memory.base_quant
    if source is not None and not isinstance(source, str | Path):
        if quant != "none":
            raise UserError(
                f"base_quant {quant} quantises a model when it is loaded, but model is a pipeline: give its folder or"
                " hub id, or quantise the pipeline before"
            )
        if memory is not None:
            place_frozen(source, memory, device)
        return source.to(device), None
    facts = inspect_model(source if source is not None else embedded_model(), images=True)
    if quant != "none" and facts.transformer is None:
        raise UserError(
            f"base_quant {quant} needs a transformer, which a {facts.pipeline} does not have: set it to none"
        )
    networks = ["transformer", *(["transformer_2"] if facts.experts else [])]
    with quiet_libraries():
        where = str(device) if device.type == "cuda" else device.type  # accelerate may name the CPU cpu:0
        pipe = load_pipeline(
            facts,
            dtype=model.dtype,
            device=where,
            before_placing=None if memory is None else lambda made: place_frozen(made, memory, device),
            quantization=quantization_of(quant, networks, device),
        )
    for name in networks if quant != "none" else ():
        mark_constant(getattr(pipe, name))
    pipe.set_progress_bar_config(disable=True)
    return pipe, facts.defaults


def frozen(pipe: Any, model: ModelConfig) -> Denoiser:
    """Freeze all weights of a pipeline, put it into eval mode, and return its denoiser with the configured settings.

    Raises:
        UserError: there is no denoiser for the pipeline, or a network has adapters, as after an earlier training.
    """
    denoiser = denoiser_for(pipe)
    for module in denoiser.transformers.values():
        # New adapters would silence the others, and the export of all weights would have the names of peft's layers.
        check_no_adapters(module, _OTHER_ADAPTERS)
    if model.flow_shift is not None:
        pipe.scheduler = shifted(pipe.scheduler, model.flow_shift)
    if model.max_sequence_length is not None:
        denoiser.max_sequence_length = model.max_sequence_length
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        module.requires_grad_(False).eval()
    return denoiser


def park_text_encoders(pipe: Any) -> None:
    """Move the text encoders of a pipeline to the CPU. Call this after all prompts are encoded."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            part.to("cpu")


__all__ = ["ModelConfig", "Policy", "frozen", "load_model", "load_policy", "park_text_encoders"]
