"""Enhance-A-Video on one transformer: what its layers share, and what is known of the call under way."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from postgen.enhance.call import VideoCall
from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.layer import EnhancedAttention
from postgen.enhance.progress import PipelineProgress
from postgen.enhance.recommended import recommended_weight
from postgen.errors import UserError
from postgen.families import Grid, layout_of, video_tokens_of
from postgen.families.attention.dispatch import install_attention_tap
from postgen.families.installed import installed, processor_stack

NAME = "enhance_a_video"
"""Name on the processor stack and among the plug-ins of a transformer."""

STRONG = 0.5
"""w/T from which on a warning is given; the strongest official setting has 0.26."""


class Enhancement:
    """Everything on one transformer. `install` puts it there, `remove` takes it off."""

    def __init__(self, model: nn.Module, config: EnhanceAVideoConfig, progress: PipelineProgress | None) -> None:
        video = video_tokens_of(model)
        self.call = VideoCall(layout_of(model).transformer, model.config, video, config)
        self.progress = progress
        self.enabled = True
        self.layers = {name: EnhancedAttention(self.call) for name in video.attention_modules(model)}
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._hooks: list[Any] = []
        self._notes: dict[str, str] = {}  # what was warned of under these settings, by kind
        self.configure(model, config)

    @property
    def config(self) -> EnhanceAVideoConfig:
        """The settings."""
        return self.call.config

    def check(self, model: nn.Module, config: EnhanceAVideoConfig) -> None:
        """Refuse settings that are wrong.

        Raises:
            UserError: a pattern that no layer matches, or start and stop without a way to know the step.
        """
        self._weights(config)

    def configure(self, model: nn.Module, config: EnhanceAVideoConfig) -> None:
        """Take new settings; nothing changes where they are wrong.

        Raises:
            UserError: as `check`.
        """
        weights = self._weights(config)
        self.call.config = config
        self._notes.clear()
        for name, layer in self.layers.items():
            chosen = weights[name]
            layer.on = chosen is not None
            layer.weight, layer.relative_weight = chosen or (0.0, 0.0)

    def _weights(self, config: EnhanceAVideoConfig) -> dict[str, tuple[float, float] | None]:
        if not config.whole_range and config.progress is None and self.progress is None:
            raise UserError("start and stop need the denoising step: give the pipeline, or progress=, a function")
        if isinstance(config.weight, Mapping):
            for pattern in config.weight:
                if not any(re.fullmatch(pattern, name) for name in self.layers):
                    known = ", ".join(list(self.layers)[:3])
                    raise UserError(f"weight: no layer matches {pattern!r}. Layers: {known}, ...")
        return {name: _weight_of(name, config, self.call.transformer) for name in self.layers}

    def enable(self, model: nn.Module) -> None:
        """Act again after `disable`."""
        self.enabled = True

    def disable(self, model: nn.Module) -> None:
        """Stop acting, to the bit; what is installed stays."""
        self.enabled = False

    def install(self, model: nn.Module) -> None:
        """Put the wrappers on the processors and the hooks on the transformer."""
        install_attention_tap()
        self._stack = processor_stack(model)
        self._stack.push(NAME, {name: layer.around for name, layer in self.layers.items()})
        # Native hooks: the hooks of diffusers and accelerate replace `forward`, and these survive that.
        self._hooks.append(model.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self.after_forward))
        target = self.call.video.scale_target
        if target != "attention":
            for name, layer in self.layers.items():
                norm = model.get_submodule(f"{name.rpartition('.')[0]}.{target}")
                self._hooks.append(norm.register_forward_hook(layer.scale_norm))
        installed(model).plug_ins[NAME] = self

    def remove(self, model: nn.Module) -> None:
        """Take everything off."""
        for hook in self._hooks:
            hook.remove()
        self._stack.pop(NAME)
        del installed(model).plug_ins[NAME]

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the geometry of the call that comes."""
        self.call.active = False
        if not self.enabled:
            return
        if model.training and not self.config.train:
            self._warn("training", "it is off in training mode: call eval(), or set train=True")
            return
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if not self.config.whole_range and not self.config.covers(self._progress(arguments)):
            return
        grid = self._grid(arguments)
        if grid is None or grid.frames < self.config.min_frames:
            return
        self.call.measure(grid)
        self.call.active = True
        through_diffusers = self.call.video.attention_call == "dispatch"
        for name, layer in self.layers.items():
            layer.dispatched = through_diffusers or self._stack.dispatches(name)
        self._warn_of_displaced()
        self._warn_of_strength()

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Say what went wrong in the layers, where a warning does not break compiled code."""
        if not self.call.active:
            return
        # Gradient checkpointing runs the layers again, outside a call of the transformer.
        self.call.active = torch.is_grad_enabled()
        if any(layer.mismatch for layer in self.layers.values()):
            self._warn_of_tokens()
        elif unseen := [name for name, layer in self.layers.items() if layer.unseen]:
            self._warn_of_unseen(unseen)
        for layer in self.layers.values():
            layer.unseen = layer.mismatch = False

    def _warn_of_unseen(self, unseen: list[str]) -> None:
        by = [name for name, modules in self._stack.claims.items() if not set(modules).isdisjoint(unseen)]
        why = f"{' and '.join(by)} does not show it to us" if by else "past diffusers' dispatcher?"
        layers = f"{len(unseen)} of {len(self.layers)} layers"
        self._warn("unseen", f"no attention call was seen in {layers} ({why}). It is off there")

    def gains(self) -> dict[str, tuple[float, ...]]:
        """Return the gains of the last measured call, one per sample, by layer."""
        return {name: tuple(layer.gain.tolist()) for name, layer in self.layers.items() if layer.gain is not None}

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""
        config, relative = self.config, self.config.relative_weight
        if config.weight == "auto" and relative is None:
            relative = recommended_weight(self.call.transformer).relative_weight
        weight = f"weight {config.weight}" if relative is None else f"weight {relative:.3g} x latent frames"
        on = sum(layer.on for layer in self.layers.values())
        parts = [weight, f"{on} of {len(self.layers)} layers"]
        if not config.whole_range:
            parts.append(f"steps {config.start:.0%} to {config.stop:.0%}")
        if gains := [gain for layer in self.gains().values() for gain in layer]:
            parts.append(f"last gains {min(gains):.4f} to {max(gains):.4f} with {self.call.frames} frames")
        parts += [f"note: {text}" for text in self._notes.values()]
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"

    def _progress(self, arguments: Mapping[str, Any]) -> float:
        if self.config.progress is not None:
            return self.config.progress()
        assert self.progress is not None  # configure saw to it
        return self.progress(arguments)

    def _grid(self, arguments: Mapping[str, Any]) -> Grid | None:
        """Return the token grid, or None after a warning."""
        video = self.call.video
        packed = video.latent_axes == "packed"
        grid = video.grid_rule(self.call.model_config, arguments)
        given = self.config.num_frames
        if given is not None:
            frames = given(arguments) if callable(given) else given
            if isinstance(frames, Grid):
                return frames
            tokens = arguments["hidden_states"].shape[1] if packed or grid is None else grid.tokens
            if tokens % frames:
                raise UserError(f"num_frames={frames} does not divide the call's {tokens} tokens: give another number")
            grid = Grid(frames=frames, height=1, width=tokens // frames)
        if grid is None:
            self._warn("grid", "the call does not tell its frames: give num_frames=. It is off")
        elif packed and video.token_order == "video" and arguments["hidden_states"].shape[1] != grid.tokens:
            self.call.measure(grid)
            self._warn_of_tokens()
            return None
        return grid

    def _warn_of_tokens(self) -> None:
        self._warn(
            "tokens",
            f"the tokens do not match {self.call.frames} frames of {self.call.places} tokens (reference frames?)."
            " It is off: give num_frames= or leave it off",
        )

    def _warn_of_displaced(self) -> None:
        displaced = set(self._stack.displaced()) & set(self.layers)
        if displaced:
            self._warn(
                "displaced",
                f"the processors of {len(displaced)} of {len(self.layers)} layers were replaced since"
                " (fuse_qkv_projections and set_attn_processor do that), so it is off there: remove and reapply it",
            )

    def _warn_of_strength(self) -> None:
        if self.config.max_gain is not None:
            return
        frames = self.call.frames
        strength = max(layer.weight / frames + layer.relative_weight for layer in self.layers.values())
        if strength > STRONG:
            self._warn(
                "strength",
                f"weight {strength * frames:.3g} is strong for {frames} latent frames (expect noise):"
                " lower it, use relative_weight=, or bound it with max_gain=",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind in self._notes:
            return
        self._notes[kind] = text
        # A warning would break the graph of a model that is compiled as a whole: the summary tells it.
        if not torch.compiler.is_compiling():
            warnings.warn(f"Enhance-A-Video on {self.call.transformer}: {text}", stacklevel=2)


def _weight_of(layer: str, config: EnhanceAVideoConfig, transformer: str) -> tuple[float, float] | None:
    """Return (weight, relative weight) of a layer; None leaves it alone."""
    if config.relative_weight is not None:
        return 0.0, config.relative_weight
    if isinstance(config.weight, Mapping):
        return next(((float(w), 0.0) for pattern, w in config.weight.items() if re.fullmatch(pattern, layer)), None)
    if config.weight == "auto":
        return 0.0, recommended_weight(transformer).relative_weight
    return float(config.weight), 0.0
