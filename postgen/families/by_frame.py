"""Wan, SkyReels-V2 and LTX modulated frame by frame, where all tokens of a frame have one timestep.

A network that is told a timestep for every token makes six vectors of each token in every block, in Wan and
SkyReels-V2 of float32: 2.9 GB at the widths of 14B for 15 latent frames of 480 x 832, written once and read several
times. With the frames in the batch of a
block there is one timestep a row, as in a stock call: norms, linear layers and modulation look at single tokens
anyway, and the two attentions are handed the whole clip. Wan and LTX also embed the time of every token; here they do
of every frame. Everybody's arguments and outputs keep the shapes of a stock call, and the numbers are the same,
on a CPU to the bit.
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
    """While open, let the blocks of a network modulate by frame in the calls of this thread.

    Calls that have one timestep for the whole clip stay as they are. So does everything where gradients are wanted
    (blocks that are computed again later would not know of it), where a block is compiled or somebody replaced its
    forward, and in networks of other classes.

    Args:
        network: the transformer, which may be wrapped.
        frames: of the tokens; all tokens of a frame have the same timestep.
    """
    model = unwrap(network)
    blocks = list(getattr(model, "blocks", ()) or getattr(model, "transformer_blocks", ()))
    names = {each.__name__ for block in blocks for each in type(block).__mro__} & _FOLDS.keys()
    if torch.is_grad_enabled() or len(names) != 1 or any(map(_altered, (network, *blocks))):
        yield
        return
    fold = _FOLDS[names.pop()](frames)
    with ExitStack() as stack:
        embedder: nn.Module = model.get_submodule(fold.embedder)
        stack.callback(embedder.register_forward_pre_hook(fold.before_embedder, with_kwargs=True).remove)
        stack.callback(embedder.register_forward_hook(fold.after_embedder, prepend=True).remove)
        for block in blocks:
            # What others hang on a block or an attention sees the shapes of a stock call.
            stack.callback(block.register_forward_pre_hook(fold.before_block, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(fold.after_block, prepend=True).remove)
            for name in _ATTENTIONS:
                attention = block.get_submodule(name)
                before = attention.register_forward_pre_hook(fold.before_attention, prepend=True, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(attention.register_forward_hook(fold.after_attention).remove)
        yield


def _altered(module: nn.Module) -> bool:
    """Whether a module is compiled, or its forward is no longer that of its class."""
    return is_compiled(module) or (hasattr(module, "attn1") and "forward" in vars(module))


class _Fold:
    """Hooks of one call: frames go into the batch before a block and out of it behind, and around each attention."""

    embedder = "condition_embedder"
    axis = 1
    """Of the tokens in what a block is told of the time: (B, L, 6, D) or (B, 6, L, D)."""

    def __init__(self, frames: int) -> None:
        self.frames, self.caller = frames, threading.get_ident()
        self.rows = 0
        """B while a block is under way whose frames stand in the batch, else 0."""
        self.tokens = 0
        """Of a frame, while times are embedded one for each frame instead of one for each token; else 0."""

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
        # One token of each frame speaks for all.
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
        """(B, T * n, D) -> (B * T, n, D)."""
        apart: Tensor = tokens.unflatten(1, (self.frames, -1)).flatten(0, 1)
        return apart

    def _together(self, tokens: Tensor) -> Tensor:
        """(B * T, n, D) -> (B, T * n, D)."""
        together: Tensor = tokens.unflatten(0, (self.rows, -1)).flatten(1, 2)
        return together


class _FoldOfSkyReels(_Fold):
    axis = 2


class _FoldOfLTX(_Fold):
    """Times are (B * L,) and their embedding (B, L, 6 * D); a block is called by names."""

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
"""Class of a block -> how its frames are told apart."""
