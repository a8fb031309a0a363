"""The model that is trained: loaded, frozen but for adapters (or not at all), with its reference, and saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import postgen
from postgen.compat import quiet_libraries, save_lora
from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.families.loading import Defaults, inspect_model, load_pipeline
from postgen.families.lora import check_lora, load_loras
from postgen.families.lora_export import NOTE
from postgen.sampling.schedule import shifted

from .run_state import trained_parameters


class Snapshot:
    """A copy of trained parameters that can stand in for them.

    Args:
        parameters: the trained parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self.tensors: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the copy into the model; afterwards the trained weights stand there again, bit by bit."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self.tensors)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Move the copy towards the weights: decay * copy + (1 - decay) * weights."""
        for copy, parameter in zip(self.tensors, self._parameters, strict=True):
            copy.lerp_(parameter.detach(), 1 - decay)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return the copy by `<prefix><name>`."""
        return {f"{prefix}{name}": tensor for name, tensor in zip(self._names, self.tensors, strict=True)}

    def load(self, state: Mapping[str, Any], prefix: str) -> None:
        """Take the copy of a checkpoint."""
        for name, tensor in zip(self._names, self.tensors, strict=True):
            tensor.copy_(state[f"{prefix}{name}"])

    @torch.no_grad()
    def _write(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.data.copy_(tensor)


class Policy:
    """A pipeline with the parameters that are trained.

    Args:
        pipe: a pipeline, already on its device; its components are used in place.
        args: the run's configuration.
        peft_config: a `peft.LoraConfig`; none takes the one that `args` describes.
        defaults: what the model's folder says about sizes.

    Raises:
        UserError: no denoiser for it, or LoRA layers that it does not have.
    """

    def __init__(self, pipe: Any, args: Any, peft_config: Any = None, defaults: Defaults | None = None) -> None:
        self.pipe, self.args = pipe, args
        self.denoiser: Denoiser = denoiser_for(pipe)
        if args.flow_shift is not None:
            pipe.scheduler = shifted(pipe.scheduler, args.flow_shift)
        if args.max_sequence_length is not None:
            self.denoiser.max_sequence_length = args.max_sequence_length
        self.defaults = defaults or Defaults()
        self.modules: dict[str, Any] = dict(self.denoiser.transformers)
        self.adapter: str | None = None
        self._start: Snapshot | None = None
        for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
            module.requires_grad_(False).eval()
        if args.lora_path and peft_config is not None:
            raise UserError("peft_config with lora_path: that LoRA has its own rank and layers, leave one of them out")
        if args.use_peft or args.lora_path or peft_config is not None:
            self._add_lora(peft_config)
        else:
            for module in self.modules.values():
                # In half precision most updates of such a learning rate would be rounded away.
                module.requires_grad_(True).float()
        for module in self.modules.values():
            if args.gradient_checkpointing:
                module.enable_gradient_checkpointing()

    @property
    def size(self) -> dict[str, int]:
        """`num_frames`, `height` and `width` of what is made.

        Raises:
            UserError: neither the configuration nor the model says one.
        """
        found = {}
        for name in ("num_frames", "height", "width"):
            value = getattr(self.args, name) or getattr(self.defaults, name)
            if value is None and name == "num_frames" and "num_frames" not in _arguments(self.pipe):
                value = 1
            if value is None:
                raise UserError(f"{name} is not given, and {type(self.pipe).__name__} has no default: set it")
            found[name] = int(value)
        return found

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.args.fps or self.defaults.fps)

    @property
    def copies_reference(self) -> bool:
        """Whether a copy of the trained weights is kept as the reference."""
        return self._start is not None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is what it was before training: adapters off, or, with all weights trained, a copy."""
        with ExitStack() as stack:
            if self.adapter is None or self.args.lora_path:
                if self._start is None:
                    raise RuntimeError("keep_reference has not been called")
                stack.enter_context(self._start.swapped_in())
            else:
                for module in self.modules.values():
                    module.disable_adapters()
                    stack.callback(module.enable_adapters)
            yield

    def keep_reference(self) -> None:
        """Remember the weights as they are, where switching adapters off would not give them back.

        Raises:
            UserError: they are yet to be replaced.
        """
        if self.adapter is None or self.args.lora_path:
            if self.args.init_from:
                raise UserError(
                    "init_from with beta above 0: the reference would be the model before it. Name a folder "
                    "of a pipeline with those weights as model (or their LoRA as lora_path), or set beta to 0"
                )
            self._start = Snapshot(trained_parameters(self.modules))

    def save(self, folder: Path, state: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Write LoRA files that `pipe.load_lora_weights` reads, or the trained models in diffusers' form.

        Args:
            folder: an existing folder. Of two experts each gets its own sub-folder.
            state: complete weights by model and name, where the models hold only shards.
        """
        for name, module in self.modules.items():
            weights = None if state is None else state[name]
            alone = len(self.modules) == 1
            if self.adapter is None:
                (module if weights is None else _plain(module, weights)).save_pretrained(folder / name)
            else:
                place = folder if alone else folder / name
                save_lora(self.pipe, place, name, module, self.adapter, weights)
                # For `postgen export-lora`: layers of different families have the same names.
                (place / NOTE).write_text(json.dumps({"pipeline": type(self.pipe).__name__}) + "\n")

    def _add_lora(self, peft_config: Any) -> None:
        if self.args.lora_path:
            check_lora(self.args.lora_path)
            load_loras(self.pipe, [self.args.lora_path])
            self.adapter = "lora0"
        else:
            config = peft_config if peft_config is not None else self._lora_config()
            self.adapter = "default"
            for module in self.modules.values():
                _check_targets(module, config.target_modules)
                module.add_adapter(config, adapter_name=self.adapter)
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if f".{self.adapter}." in name and "lora_" in name:
                    parameter.requires_grad_(True)
                    parameter.data = parameter.data.float()

    def _lora_config(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.args.lora_r,
            lora_alpha=self.args.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(self.args.lora_target_modules or self.denoiser.lora_targets),
        )


def load_policy(model: Any, args: Any, device: torch.device, peft_config: Any = None) -> Policy:
    """Return the policy of a model: a folder, a hub id, a pipeline, or None for the embedded model.

    Raises:
        UserError: it cannot be loaded, or as `Policy`.
    """
    if model is not None and not isinstance(model, str | Path):
        return Policy(model.to(device), args, peft_config)
    facts = inspect_model(model if model is not None else postgen.embedded_model(), images=True)
    with quiet_libraries():
        place = str(device) if device.type == "cuda" else device.type  # accelerate speaks of cpu:0
        pipe = load_pipeline(facts, dtype=args.dtype, device=place)
    pipe.set_progress_bar_config(disable=True)
    return Policy(pipe, args, peft_config, facts.defaults)


def _plain(module: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a sharded model as one of its own class; the one it has now is made up by torch."""
    kind: Any = next(parent for parent in type(module).__mro__ if not parent.__name__.startswith("FSDP"))
    with torch.device("meta"):
        made = kind.from_config(module.config)
    made.load_state_dict(dict(weights), assign=True)
    return made


def _check_targets(module: nn.Module, targets: Any) -> None:
    if not isinstance(targets, list | tuple | set):
        return  # a pattern: peft itself refuses one that matches nothing
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = dict.fromkeys(".".join(p for p in name.split(".")[-2:] if not p.isdigit()) for name in names)
            raise UserError(
                f"lora_target_modules: {target!r} matches no layer of {type(module).__name__}. Its layers end in "
                f"{', '.join(list(endings)[:12])}"
            )


def _arguments(pipe: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(pipe).__call__).parameters)
