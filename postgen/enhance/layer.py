"""Enhance-A-Video on one self-attention module: it measures queries and keys, and scales the output."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postgen.enhance.call import Kept, PerThread
from postgen.enhance.gain import factored_gain
from postgen.enhance.sdpa import tap_sdpa
from postgen.enhance.shards import ulysses_group, whole_sequence
from postgen.errors import UserError
from postgen.families.attention.dispatch import tap_dispatched
from postgen.kernels.temporal_cfi.ops import temporal_self_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from postgen.enhance.call import VideoCall


class LayerCall:
    """State of one layer in one thread: its factor in the current forward pass, and its measured gains."""

    def __init__(self, calls: PerThread[VideoCall]) -> None:
        self.call = calls.own
        self.on = True
        """Whether the settings give this layer a weight."""
        self.factor = 1.0
        """(T + w) / (T - 1), computed outside compiled code: torch 2.11 recompiles a sum of numbers for each value."""
        self.gain: Tensor | None = None
        """Gains (B,) of the last forward pass; None if nothing was measured."""
        self.dispatched = False
        """Whether attention calls go through diffusers' dispatcher, or reach its tap by `show_attention_call`."""
        self.unseen = False
        """Whether no queries and keys were seen in the last forward pass."""
        self.mismatch = False
        """Whether the tokens of the last forward pass did not match the geometry of the video."""

    @property
    def active(self) -> bool:
        """Whether the method acts on this layer in the current forward pass."""
        return self.call.active and self.on


class EnhancedAttention:
    """Wrapper of the attention processor of one module; `around` is pushed onto the processor stack.

    All Python branches of this class take the same path for every layer of a model, so that compiled blocks share one
    graph.
    """

    def __init__(self, calls: PerThread[VideoCall]) -> None:
        self._threads = PerThread(functools.partial(LayerCall, calls))
        self._kept = Kept()

    @property
    def here(self) -> LayerCall:
        """The state of the layer in this thread."""
        return self._threads.own

    @property
    def gain(self) -> Tensor | None:
        """Gains (B,) of the last forward pass in this thread; None if nothing was measured."""
        return self.here.gain

    @gain.setter
    def gain(self, gain: Tensor | None) -> None:
        self.here.gain = gain

    def around(self, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the attention processor and scale the video tokens of its output."""
        here = self._threads.own
        if not here.call.begun:
            self._resume()
        if not here.active:
            return inner(attention, *args, **kwargs)
        text = _text_length(args, kwargs)
        shares: list[Tensor] = []

        def look(query: Tensor, key: Tensor, scale: float | None, parallel_config: Any) -> None:
            with torch.no_grad():
                share = _share(here, query, key, scale, parallel_config, text)
            if share is not None:
                shares.append(share)

        tap = tap_dispatched if here.dispatched else tap_sdpa
        with tap(look):
            output = inner(attention, *args, **kwargs)
        if not shares:
            here.unseen, here.gain = True, None
            return output
        # A processor may call the attention function once per sample.
        gain = _gain(here, shares[0] if len(shares) == 1 else torch.cat(shares))
        here.gain = gain
        if here.call.video.scale_target != "attention":
            return output
        if isinstance(output, tuple):
            return _scaled(here.call, output[0], gain), *output[1:]
        return _scaled(here.call, output, gain)

    def scale_norm(self, module: Any, args: Any, output: Any) -> Any:
        """Forward hook of the norm after the attention; it scales the norm because the norm would cancel the gain."""
        here = self._threads.own
        # With a cache, the attention output may come from an earlier step; `here.gain` is the gain of that step.
        if here.gain is None or not here.active:
            return output
        return _times(output, here.gain.view(-1, *[1] * (output.dim() - 1)))

    def keep(self) -> None:
        """Save the state of the layer, for a thread in which autograd runs the layer again."""
        here = self._threads.own
        self._kept.values = here.on, here.factor, here.dispatched

    def _resume(self) -> None:
        here = self._threads.own
        here.call.resume()
        if self._kept.values is not None:
            here.on, here.factor, here.dispatched = self._kept.values


def _share(
    here: LayerCall, query: Tensor, key: Tensor, scale: float | None, parallel_config: Any, text: int
) -> Tensor | None:
    """Return the mean share (B,) of its attention that a frame gives to itself; None after a mismatch of tokens."""
    call = here.call
    group = ulysses_group(parallel_config)
    if group is not None:
        if call.video.token_order != "video":
            raise UserError(
                f"Enhance-A-Video does not support context parallelism with {call.transformer}, whose attention mixes"
                " video and other tokens: switch one of the two off"
            )
        query, key = whole_sequence(query, group), whole_sequence(key, group)
    seen = call.locate(query, key, text)
    if seen is None:
        here.mismatch = True
        return None
    query, key = seen
    share: Tensor = temporal_self_share(query, key, scale, call.causal_frames, call.config.chunk_size)
    if group is not None:
        torch.distributed.all_reduce(share, group=group)
        share = share / group.size()
    return share


def _gain(here: LayerCall, share: Tensor) -> Tensor:
    config = here.call.config
    return factored_gain(share, here.factor, reduction=config.reduction, max_gain=config.max_gain)


def _scaled(call: VideoCall, video: Tensor, gain: Tensor) -> Tensor:
    """Multiply the video tokens in the output of an attention by the gains; history and reference tokens stay."""
    if call.video.factorised:
        return _times(video, gain.repeat_interleave(call.places).view(-1, 1, 1))
    gain = gain.view(-1, *[1] * (video.dim() - 1))
    order, others = call.video.token_order, video.shape[1] - call.tokens
    if video.dim() == 3 and others > 0 and order.startswith("history"):
        return torch.cat([video[:, :others], _times(video[:, others:], gain)], dim=1)
    if video.dim() == 3 and others > 0 and order == "video-reference":
        return torch.cat([_times(video[:, : call.tokens], gain), video[:, call.tokens :]], dim=1)
    return _times(video, gain)


def _times(output: Tensor, gain: Tensor) -> Tensor:
    """Return output * gain. bfloat16 has steps of 0.8 % near 1, so gain - 1 is rounded instead of the gain."""
    return torch.addcmul(output, output, (gain - 1).to(output.dtype))


def _text_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of text tokens; processors take (attention, hidden_states, encoder_hidden_states, ...)."""
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return text.shape[1] if isinstance(text, Tensor) else 0
