"""Modulation by frame for Wan, SkyReels-V2 and LTX, for calls in which all tokens of a latent frame have one timestep.

A network that receives a timestep for every token computes six modulation vectors per token in every block. In Wan and
SkyReels-V2 these are float32: 2.9 GB at the widths of Wan 14B for 15 latent frames of 480 x 832 pixels, which are
written once and read several times.

This module moves the latent frames of a clip into the batch of a block, so that each row has one timestep, as in a
stock call. The norms, linear layers and modulation process single tokens, so this does not change their results. The
two attention modules of a block receive the whole clip. Wan and LTX also embed one timestep per token; here they embed
one per frame.

Other hooks and modules see arguments and outputs with the shapes of a stock call. The results are those of a stock
call up to rounding, and on most CPUs bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import is_compiled, unwrap

_ATTENTIONS = ("attn1", "attn2")


@contextmanager
def modulated_by_frame(network: nn.Module, frames: int) -> Iterator[None]:
    """Context manager in which the blocks of a network modulate by frame, in calls of this thread.

    A call does not change if it has one timestep for the whole clip. Nothing changes if gradients are enabled
    (checkpointed blocks are recomputed later, without this context), if a block is compiled, if the `forward` of a
    block was replaced, or if the network has blocks of another class.

    Args:
        network: the transformer, which may be wrapped.
        frames: number of latent frames; all tokens of a frame have the same timestep.
    """
    model = unwrap(network)
    blocks = list(getattr(model, "blocks", ()) or getattr(model, "transformer_blocks", ()))
    names = {each.__name__ for block in blocks for each in type(block).__mro__} & _FOLDS.keys()
    if torch.is_grad_enabled() or len(names) != 1 or any(map(altered, (network, *blocks))):
        yield
        return
    fold = _FOLDS[names.pop()](frames)
    with ExitStack() as stack:
        embedder: nn.Module = model.get_submodule(fold.embedder)
        stack.callback(embedder.register_forward_pre_hook(fold.before_embedder, with_kwargs=True).remove)
        stack.callback(embedder.register_forward_hook(fold.after_embedder, prepend=True).remove)
        for block in blocks:
            # The order of the hooks lets all other hooks of a block or an attention see the shapes of a stock call.
            stack.callback(block.register_forward_pre_hook(fold.before_block, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(fold.after_block, prepend=True).remove)
            for name in _ATTENTIONS:
                attention = block.get_submodule(name)
                before = attention.register_forward_pre_hook(fold.before_attention, prepend=True, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(attention.register_forward_hook(fold.after_attention).remove)
        yield


def altered(module: nn.Module) -> bool:
    """Whether a transformer or block is compiled, or the `forward` of a block is not the one of its class."""
    return is_compiled(module) or (hasattr(module, "attn1") and "forward" in vars(module))


class _Fold:
    """Hooks for the calls of one context.

    The frames are moved into the batch before a block and out of it after the block. Around each attention module they
    are moved out of the batch and back.
    """

    embedder = "condition_embedder"
    axis = 1
    """Axis of the tokens in the time embedding that a block receives: (B, L, 6, D) or (B, 6, L, D)."""

    def __init__(self, frames: int) -> None:
        self.frames, self.caller = frames, threading.get_ident()
        self.rows = 0
        """B while a block with the frames in its batch is running, else 0."""
        self.tokens = 0
        """Tokens of a frame while the embedder computes one timestep per frame instead of one per token, else 0."""

    def before_embedder(self, embedder: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        length = words.get("timestep_seq_len")
        if threading.get_ident() != self.caller or length is None or length % self.frames:
            return None
        self.tokens = length // self.frames
        return (args[0][:: self.tokens], *args[1:]), {**words, "timestep_seq_len": self.frames}

    def after_embedder(self, embedder: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        if not self.tokens or threading.get_ident() != self.caller:
            return None
        times = [each.repeat_interleave(self.tokens, 1) for each in output[:2]]
        self.tokens = 0
        return (*times, *output[2:])

    def before_block(self, block: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        if threading.get_ident() != self.caller:
            return None
        self.rows = 0
        if len(args) < 3 or args[2].dim() != 4 or args[0].shape[1] % self.frames:
            return None
        hidden, text, told, *rest = args
        self.rows = len(hidden)
        # All tokens of a frame have the same time embedding: take that of the first.
        told = told.unflatten(self.axis, (self.frames, -1)).select(self.axis + 1, 0).movedim(self.axis, 1)
        return (self._apart(hidden), text, told.flatten(0, 1), *rest), words

    def after_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._on():
            return None
        output, self.rows = self._together(output), 0
        return output

    def before_attention(self, attention: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        if not self._on():
            return None
        if args:
            return (self._together(args[0]), *args[1:]), words
        return args, {**words, "hidden_states": self._together(words["hidden_states"])}

    def after_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._apart(output) if self._on() else None

    def _on(self) -> bool:
        return bool(self.rows) and threading.get_ident() == self.caller

    def _apart(self, tokens: Tensor) -> Tensor:
        """Move the frames into the batch: (B, T * n, D) -> (B * T, n, D)."""
        apart: Tensor = tokens.unflatten(1, (self.frames, -1)).flatten(0, 1)
        return apart

    def _together(self, tokens: Tensor) -> Tensor:
        """Move the frames out of the batch: (B * T, n, D) -> (B, T * n, D)."""
        together: Tensor = tokens.unflatten(0, (self.rows, -1)).flatten(1, 2)
        return together


class _FoldOfSkyReels(_Fold):
    axis = 2


class _FoldOfLTX(_Fold):
    """Timesteps are (B * L,), their embedding is (B, L, 6 * D), and blocks are called with keyword arguments."""

    embedder = "time_embed"

    def before_embedder(self, embedder: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        if threading.get_ident() != self.caller:
            return None
        length = len(args[0]) // words["batch_size"]
        if length == 1 or length % self.frames:
            return None
        self.tokens = length // self.frames
        return (args[0][:: self.tokens], *args[1:]), words

    def after_embedder(self, embedder: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        if not self.tokens or threading.get_ident() != self.caller:
            return None
        tokens, self.tokens = self.tokens, 0
        return tuple(each.repeat_interleave(tokens, 0) for each in output)

    def before_block(self, block: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        if threading.get_ident() != self.caller:
            return None
        self.rows = 0
        if args or words["temb"].shape[1] == 1 or words["temb"].shape[1] % self.frames:
            return None
        hidden, told = words["hidden_states"], words["temb"].unflatten(1, (self.frames, -1))[:, :, 0]
        self.rows = len(hidden)
        return args, {**words, "hidden_states": self._apart(hidden), "temb": told.flatten(0, 1)[:, None]}


_FOLDS: dict[str, type[_Fold]] = {
    "WanTransformerBlock": _Fold,
    "SkyReelsV2TransformerBlock": _FoldOfSkyReels,
    "LTXVideoTransformerBlock": _FoldOfLTX,
}
"""Class name of a block -> the hooks for it."""
