"""Enhance-A-Video on one transformer: hooks, warnings and the state of the current forward pass."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.enhance.call import Kept, PerThread, VideoCall
from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.gain import gain_factor
from postgen.enhance.layer import EnhancedAttention
from postgen.enhance.recommended import recommended_weight
from postgen.errors import UserError
from postgen.families import Grid, layout_of, video_tokens_of
from postgen.families.attached import AttachedPlugIn, Setting
from postgen.families.attention.dispatch import install_attention_tap
from postgen.families.installed import processor_stack
from postgen.families.progress import PipelineProgress

NAME = "enhance_a_video"
"""Name of the plug-in on a transformer and on its processor stack."""

STRONG = 0.5
"""w/T above which a warning is given; the strongest setting of the authors has 0.26."""


class Plan:
    """Settings resolved for one transformer, and the warnings that were given with them."""

    def __init__(self, weights: dict[str, tuple[float, float] | None], progress: Callable[..., float] | None) -> None:
        self.weights = weights
        """(weight, relative weight) by layer; None does not change the layer."""
        self.progress = progress
        """Function from (forward arguments, transformer) to the denoising progress, 0 to 1; None if not needed."""
        self.notes: dict[str, str] = {}
        """Texts of the warnings by kind; each kind is given once."""


class Enhancement(AttachedPlugIn[EnhanceAVideoConfig]):
    """Enhance-A-Video on one transformer."""

    name = NAME

    def __init__(self, model: nn.Module, config: EnhanceAVideoConfig, progress: PipelineProgress | None) -> None:
        self.progress = progress
        video = video_tokens_of(model)
        transformer = layout_of(model).transformer
        self._threads = PerThread(functools.partial(VideoCall, transformer, model.config, video, config, Kept()))
        self.layers = {name: EnhancedAttention(self._threads) for name in video.attention_modules(model)}
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._norm_hooks: list[Any] = []
        self._last: tuple[int, dict[str, Tensor]] = 0, {}
        super().__init__(model, config)

    @property
    def call(self) -> VideoCall:
        """State of the current forward pass in this thread."""
        return self._threads.own

    def prepare(self, model: nn.Module, config: EnhanceAVideoConfig) -> Plan:
        """Resolve the weight of each layer.

        Raises:
            UserError: a pattern matches no layer, or `start` and `stop` are set and the progress is not available.
        """
        if not config.whole_range and config.progress is None and self.progress is None:
            raise UserError("start and stop need the denoising step: give a pipeline, or a function as progress=")
        if isinstance(config.weight, Mapping):
            for pattern in config.weight:
                if not any(re.fullmatch(pattern, name) for name in self.layers):
                    known = ", ".join(list(self.layers)[:3])
                    raise UserError(f"weight: no layer matches {pattern!r}. Layers of this model: {known}, ...")
        weights = {name: _weight_of(name, config, self.call.transformer) for name in self.layers}
        return Plan(weights, self.progress)

    def arrange(self, model: nn.Module, live: Sequence[Setting[EnhanceAVideoConfig]]) -> None:
        """Install the wrappers if any setting is live, even a disabled one; remove them otherwise."""
        self._stack = processor_stack(model)
        on = NAME in self._stack.wrappers
        if live and not on:
            install_attention_tap()
            self._stack.push(NAME, {name: layer.around for name, layer in self.layers.items()})
            target = self.call.video.scale_target
            if target != "attention":
                for name, layer in self.layers.items():
                    norm = model.get_submodule(f"{name.rpartition('.')[0]}.{target}")
                    self._norm_hooks.append(norm.register_forward_hook(layer.scale_norm))
        elif on and not live:
            for hook in self._norm_hooks:
                hook.remove()
            self._norm_hooks.clear()
            self._stack.pop(NAME)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the geometry of the forward pass that starts, and set the factor of each layer."""
        super().before_forward(model, args, kwargs)
        call, now = self.call, self.now
        call.begun, call.active = True, False
        if not now.enabled:
            return
        call.config = now.config
        if model.training and not now.config.train:
            self._warn("training", "no gain is applied in training mode: call eval(), or set train=True")
            return
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if not now.config.whole_range and not now.config.covers(self._progress(model, arguments)):
            return
        grid = self._grid(arguments)
        if grid is None or grid.frames < now.config.min_frames:
            return
        call.measure(grid)
        call.active = True
        through_diffusers = call.video.attention_call == "dispatch"
        for name, layer in self.layers.items():
            weights = now.prepared.weights[name]
            here = layer.here
            here.on = weights is not None
            weight, relative = weights or (0.0, 0.0)
            here.factor = gain_factor(grid.frames, weight + relative * grid.frames)
            here.dispatched = through_diffusers or self._stack.dispatches(name)
        self._warn_of_displaced()
        self._warn_of_strength()

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Warn of problems in the layers; here a warning does not break the graph of compiled blocks."""
        call, eager = self.call, not torch.compiler.is_compiling()
        if call.active and output is not None:
            self._warn_of_layers()
            if eager:
                self._last = call.frames, {name: x.gain for name, x in self.layers.items() if x.gain is not None}
        # Gradient checkpointing runs the layers again after the forward pass of the transformer has returned.
        call.active = call.active and output is not None and torch.is_grad_enabled()
        if eager and torch.is_grad_enabled():
            call.keep()
            for layer in self.layers.values():
                layer.keep()
        super().after_forward(model, args, output)

    def _warn_of_layers(self) -> None:
        layers = {name: layer.here for name, layer in self.layers.items()}
        if any(layer.mismatch for layer in layers.values()):
            self._warn_of_tokens()
        elif unseen := [name for name, layer in layers.items() if layer.unseen]:
            self._warn_of_unseen(unseen)
        for layer in layers.values():
            layer.unseen = layer.mismatch = False

    def _warn_of_unseen(self, unseen: list[str]) -> None:
        by = [name for name, modules in self._stack.claims.items() if not set(modules).isdisjoint(unseen)]
        why = f"{' and '.join(by)} hides it" if by else "does it bypass diffusers' dispatcher?"
        layers = f"{len(unseen)} of {len(self.layers)} layers"
        self._warn("unseen", f"no attention call was seen in {layers} ({why}). No gain is applied there")

    def gains(self) -> dict[str, tuple[float, ...]]:
        """Return the gains of the last measured forward pass by layer, one gain per sample.

        A thread that has called the transformer gets the gains of its own last call.
        """
        return {name: tuple(gain.tolist()) for name, gain in self._measured()[1].items()}

    def _measured(self) -> tuple[int, dict[str, Tensor]]:
        if not self.call.begun:
            return self._last
        return self.call.frames, {name: x.gain for name, x in self.layers.items() if x.gain is not None}

    def describe(self) -> str:
        """Return one line with the state and the settings."""
        config, relative = self.config, self.config.relative_weight
        if config.weight == "auto" and relative is None:
            relative = recommended_weight(self.call.transformer).relative_weight
        weight = f"weight {config.weight}" if relative is None else f"weight {relative:.3g} x latent frames"
        on = sum(weights is not None for weights in self.setting.prepared.weights.values())
        parts = [weight, f"{on} of {len(self.layers)} layers"]
        if not config.whole_range:
            parts.append(f"steps {config.start:.0%} to {config.stop:.0%}")
        if gains := [gain for layer in self.gains().values() for gain in layer]:
            parts.append(f"last gains {min(gains):.4f} to {max(gains):.4f} with {self._measured()[0]} frames")
        parts += [f"note: {text}" for text in self.setting.prepared.notes.values()]
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"

    def _progress(self, model: nn.Module, arguments: Mapping[str, Any]) -> float:
        if self.call.config.progress is not None:
            return self.call.config.progress()
        return float(self.now.prepared.progress(arguments, model))

    def _grid(self, arguments: Mapping[str, Any]) -> Grid | None:
        """Return the token grid; None, with a warning, if the grid is unknown or does not match the tokens."""
        video = self.call.video
        packed = video.latent_axes == "packed"
        grid = video.grid_rule(self.call.model_config, arguments)
        given = self.call.config.num_frames
        if given is not None:
            frames = given(arguments) if callable(given) else given
            if isinstance(frames, Grid):
                return frames
            tokens = arguments["hidden_states"].shape[1] if packed or grid is None else grid.tokens
            if tokens % frames:
                raise UserError(f"num_frames={frames} does not divide the {tokens} video tokens: give another number")
            grid = Grid(frames=frames, height=1, width=tokens // frames)
        if grid is None:
            self._warn("grid", "the call does not contain the number of frames: give num_frames=. No gain is applied")
        elif packed and video.token_order == "video" and arguments["hidden_states"].shape[1] != grid.tokens:
            self.call.measure(grid)
            self._warn_of_tokens()
            return None
        return grid

    def _warn_of_tokens(self) -> None:
        self._warn(
            "tokens",
            f"the tokens do not match {self.call.frames} frames of {self.call.places} tokens (reference frames?), so"
            " no gain is applied: give num_frames=, or remove the plug-in",
        )

    def _warn_of_displaced(self) -> None:
        displaced = set(self._stack.displaced()) & set(self.layers)
        if displaced:
            self._warn(
                "displaced",
                f"the attention processors of {len(displaced)} of {len(self.layers)} layers were replaced"
                " (fuse_qkv_projections and set_attn_processor do that), so no gain is applied there: remove the"
                " plug-in and apply it again",
            )

    def _warn_of_strength(self) -> None:
        if self.call.config.max_gain is not None:
            return
        frames = self.call.frames
        weights = [found or (0.0, 0.0) for found in self.now.prepared.weights.values()]
        strength = max(weight / frames + relative for weight, relative in weights)
        if strength > STRONG:
            self._warn(
                "strength",
                f"weight {strength * frames:.3g} is strong for {frames} latent frames (expect noise):"
                " use a lower weight or auto (in Python, also relative_weight or max_gain)",
            )

    def _warn(self, kind: str, text: str) -> None:
        notes = self.now.prepared.notes
        if kind in notes:
            return
        notes[kind] = text
        # A warning would break the graph of a model that is compiled as a whole; `postgen.summary` shows the note.
        if not torch.compiler.is_compiling():
            warnings.warn(f"Enhance-A-Video on {self.call.transformer}: {text}", stacklevel=2)


def _weight_of(layer: str, config: EnhanceAVideoConfig, transformer: str) -> tuple[float, float] | None:
    """Return (weight, relative weight) of a layer; None if the layer is not changed."""
    if config.relative_weight is not None:
        return 0.0, config.relative_weight
    if isinstance(config.weight, Mapping):
        return next(((float(w), 0.0) for pattern, w in config.weight.items() if re.fullmatch(pattern, layer)), None)
    if config.weight == "auto":
        return 0.0, recommended_weight(transformer).relative_weight
    return float(config.weight), 0.0
