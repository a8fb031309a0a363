"""The state of FP8 attention on one transformer: which layers run in FP8, and whether the current step does."""

from __future__ import annotations

import inspect
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import video_tokens_of
from postgen.families.attached import AttachedPlugIn, Setting
from postgen.families.attention.dispatch import divert_dispatched, install_attention_tap
from postgen.families.installed import processor_stack
from postgen.families.progress import PipelineProgress
from postgen.fused.fp8_attention.available import check_available, head_channels
from postgen.fused.fp8_attention.config import FP8AttentionConfig
from postgen.fused.fp8_attention.sdpa import divert_sdpa
from postgen.kernels.attention.backends import CUDNN_FP8, Call
from postgen.kernels.attention.ops import as_autocast, router
from postgen.kernels.attention_fp8.ops import attention_fp8, not_finite
from postgen.kernels.attention_fp8.preparation import Preparation
from postgen.kernels.dispatch import warn_once

NAME = "fp8_attention"
"""The name on the processor stack and among the plug-ins of a transformer."""
_MOST_PLANS = 16
"""How many plans are kept, including those of earlier settings, so that their compiled code can be reused."""


class _Here(threading.local):
    """The state of the current call in this thread."""

    def __init__(self) -> None:
        self.exact = False
        """Whether the current step stays exact."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Here, ()


@dataclass(eq=False, slots=True)
class Plan:
    """The preparation of each layer under given settings."""

    layers: dict[str, Preparation | None]
    """Layer name -> preparation, or None if the layer stays exact."""
    fewest_tokens: int
    """Self-attention over fewer tokens stays exact; 0 with `simulate`."""
    number: int = -1
    """Index of the plan among the plans of this transformer. A layer finds its preparation by this index and not by
    its name, because torch.compile compiles code that reads a name again for every block."""


class FP8Attention(AttachedPlugIn[FP8AttentionConfig]):
    """FP8 attention on one transformer."""

    name = NAME

    def __init__(self, model: nn.Module, config: FP8AttentionConfig, progress: PipelineProgress) -> None:
        tokens = video_tokens_of(model)
        self.here, self._progress = _Here(), progress
        self.calls_sdpa = tokens.attention_call == "sdpa"
        self._plans: list[dict[str, Preparation | None]] = []
        self.layers = {name: FP8Layer(self, name) for name in tokens.attention_modules(model)}
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._note = ""
        self._left: dict[str, str] = {}
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        super().__init__(model, config)

    def prepare(self, model: nn.Module, config: FP8AttentionConfig) -> Plan:
        """Return the preparation of each layer.

        Raises:
            UserError: no layer matches a pattern, all layers stay exact, or this machine cannot compute FP8 attention
                for these layers.
        """
        named = config.preparation if isinstance(config.preparation, Mapping) else {}
        for pattern in (*config.exact_layers, *named):
            if not any(re.fullmatch(pattern, name) for name in self.layers):
                known = ", ".join(list(self.layers)[:3])
                raise UserError(f"no layer matches the pattern {pattern!r}. Layers of this model: {known}, ...")
        changed = processor_stack(model).changed_layers
        found: dict[str, Preparation | None] = {}
        for name in self.layers:
            text = None if name in changed else config.of_layer(name)
            found[name] = None if text is None else Preparation.parsed(text)
        in_fp8 = [name for name, each in found.items() if each is not None]
        if not in_fp8:
            by = sorted({changed.get(name, "exact_layers") for name in found})
            raise UserError(
                f"no layer of this {type(model).__name__} is left for FP8 attention: all {len(found)} stay exact"
                f" because of {' and '.join(by)}. Leave FP8 attention off, or leave fewer layers exact"
            )
        if not config.simulate:
            device = next(model.parameters()).device
            for channels in {head_channels(model.get_submodule(name)) for name in in_fp8}:
                check_available(device, channels or 128)
        return Plan(found, 0 if config.simulate else config.fewest_tokens)

    def arrange(self, model: nn.Module, live: Sequence[Setting[FP8AttentionConfig]]) -> None:
        """Put the wrappers on the attention processors while any setting is in use, and remove them otherwise."""
        self._forget()
        for each in live:
            self._number(each.prepared, {each.prepared.number for each in live})
        stack = processor_stack(model)
        on = NAME in stack.wrappers
        if live and not on:
            install_attention_tap()
            stack.push(NAME, {name: layer.around for name, layer in self.layers.items()})
        elif on and not live:
            stack.pop(NAME)

    def _number(self, plan: Plan, used: set[int]) -> None:
        if plan.layers not in self._plans:
            free = [number for number in range(len(self._plans)) if number not in used]
            place = free[0] if len(self._plans) >= _MOST_PLANS and free else len(self._plans)
            for name, layer in self.layers.items():
                # A new tuple, not a change in place: other threads may be reading other entries of the old one.
                layer.choices = (*layer.choices[:place], plan.layers[name], *layer.choices[place + 1 :])
            self._plans[place : place + 1] = [plan.layers]
        plan.number = self._plans.index(plan.layers)

    def note_left(self, name: str, reason: str) -> None:
        """Record for `describe` why a layer stays exact in the current call."""
        self._left[name] = reason

    def tell_left(self, name: str, reason: str) -> None:
        """Record why a layer stays exact in the current call, and warn once per reason."""
        self.note_left(name, reason)
        warn_once(f"attention stays exact, not FP8: {reason}")

    def _forget(self) -> None:
        """Clear the notes about earlier calls."""
        self._note = ""
        self._left.clear()

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Determine whether the current step stays exact, and set the notes for `describe`."""
        super().before_forward(model, args, kwargs)
        now = self.now
        config = now.config
        # FP8 runs unless the step below turns out to be exact.
        self.here.exact = False
        if not torch.compiler.is_compiling():
            self._model = weakref.ref(model)  # a copy of the plug-in has no reference yet
        if not now.enabled:
            return
        if not (config.first_exact_steps or config.last_exact_steps):
            self._forget()
            return
        try:
            step, steps = self._progress.step({**dict(zip(self._parameters, args, strict=False)), **kwargs}, model)
        except UserError:
            self._note = "the denoising step is unknown outside a pipeline call, so no step stays exact"
            if not torch.compiler.is_compiling():
                warn_once(
                    f"FP8 attention: {self._note}. Set first_exact_steps=0 and last_exact_steps=0 if this is intended,"
                    " which stops this warning"
                )
            return
        self.here.exact = config.exact_step(step, steps)
        self._note = ""
        if not self.here.exact:
            self._left.clear()
        if config.first_exact_steps + config.last_exact_steps >= steps:
            self._note = f"all of the {steps} steps stay exact"
            if not torch.compiler.is_compiling():
                least = config.first_exact_steps + config.last_exact_steps + 1
                warn_once(
                    f"FP8 attention: {self._note}: use at least {least} steps, or in Python lower first_exact_steps or"
                    " last_exact_steps"
                )

    def counts(self) -> dict[str, int]:
        """Return the number of FP8 layers, of exact layers, and of outputs that the guard found not finite."""
        model = None if self._model is None else self._model()
        # Another method may have changed layers after the settings were made.
        changed = () if model is None else processor_stack(model).changed_layers
        plan = self.setting.prepared.layers
        exact = sum(each is None or name in changed for name, each in plan.items())
        return {"fp8": len(plan) - exact, "exact": exact, "not_finite": not_finite()}

    def describe(self) -> str:
        """Return one line that describes the state, the settings and the notes about the last call."""
        config, counts = self.config, self.counts()
        how = "simulated" if config.simulate else CUDNN_FP8.name
        parts = [f"{how} in {counts['fp8']} of {len(self.layers)} layers"]
        if fewest := self.setting.prepared.fewest_tokens:
            parts.append(f"from {fewest} tokens on")
        if config.first_exact_steps or config.last_exact_steps:
            parts.append(f"first {config.first_exact_steps} and last {config.last_exact_steps} steps exact")
        if config.debug:
            parts.append(f"outputs checked, {counts['not_finite']} not finite")
        if self._note:
            parts.append(f"note: {self._note}")
        if self._left:
            reasons = "; ".join(dict.fromkeys(self._left.values()))
            parts.append(f"note: {len(self._left)} layers stayed exact in the last call: {reasons}")
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None}


class FP8Layer:
    """The wrapper of one module's attention processor; `around` is pushed on the processor stack."""

    def __init__(self, whole: FP8Attention, name: str) -> None:
        self._whole, self._name = whole, name
        # The length is constant from the beginning: torch.compile would recompile for another length.
        self.choices: tuple[Preparation | None, ...] = (None,) * _MOST_PLANS
        """The preparation of this layer for each plan number; None: the layer stays exact."""

    def around(self, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the processor, with FP8 attention inside it if the current step and this layer use FP8."""
        now = self._whole.now
        if not now.enabled or self._whole.here.exact or self.choices[now.prepared.number] is None:
            return inner(attention, *args, **kwargs)
        if self._whole.calls_sdpa:
            with divert_sdpa(self.attend), divert_dispatched(self.attend):
                return inner(attention, *args, **kwargs)
        with divert_dispatched(self.attend):
            return inner(attention, *args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        key_lengths: Tensor | None,
    ) -> Tensor | None:
        """Compute self-attention in FP8, (B, N, H, D), or return None if the call must stay exact.

        Calls stay exact that are cross-attention, have grouped heads or fewer than `min_tokens` tokens, or that cuDNN
        does not support.
        """
        if query.shape[1] != key.shape[1] or query.shape[2] != key.shape[2]:
            return None
        query, key, value = as_autocast(query, key, value)
        now = self._whole.now
        if query.shape[1] < now.prepared.fewest_tokens:
            # The settings ask for this, so there is no warning.
            if not torch.compiler.is_compiling():
                self._whole.note_left(self._name, f"fewer than {now.prepared.fewest_tokens} tokens")
            return None
        if (reason := self._refusal(query, key, value, mask, scale, key_lengths)) is not None:
            if not torch.compiler.is_compiling():
                self._whole.tell_left(self._name, reason)
            return None
        return attention_fp8(
            query, key, value, scale=scale, preparation=self.choices[now.prepared.number], key_lengths=key_lengths,
            simulate=now.config.simulate, guard=now.config.debug,
        )  # fmt: skip

    def _refusal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        key_lengths: Tensor | None,
    ) -> str | None:
        if mask is not None:
            return "the call has a mask"
        # A traced call is checked when the compiled code runs, by the operation itself.
        if self._whole.now.config.simulate or torch.compiler.is_compiling():
            return None
        given = query.shape[-1] ** -0.5 if scale is None else scale
        reason = router().why_not(CUDNN_FP8, Call(query, key, value, given, key_lengths, False))
        return None if reason is None else f"{CUDNN_FP8.name} {reason}"
