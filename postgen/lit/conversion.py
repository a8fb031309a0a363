"""The run-time part of a conversion: read the token grid of each call, and compute the converted attention."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from postgen.errors import UserError
from postgen.families import tokens_of
from postgen.families.attention.dispatch import attention_settings
from postgen.families.installed import installed, living, processor_stack
from postgen.kernels.attention.ops import attention as softmax_attention
from postgen.lit.tokens import Tokens

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.families.attention import AttentionReader
    from postgen.lit.config import LitConfig
    from postgen.lit.layers import LitLayer
    from postgen.lit.report import Report

NAME = "lit"
"""Name of this plug-in on a transformer and on its processor stack."""
CHILD = "postgen_lit"
"""Name of the new layer as a child of its attention module."""


class _Here(threading.local):
    """The grid of the forward pass that is running in the current thread."""

    def __init__(self) -> None:
        self.grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """One attention module to convert."""

    block: int
    """Index of its block, in running order."""
    module: str
    """Name of the attention module."""
    kind: str
    """Layer type."""


class Conversion:
    """The conversion of one transformer: its settings, hooks and claimed attention modules."""

    def __init__(self, model: nn.Module, config: LitConfig, converted: tuple[Converted, ...], report: Report) -> None:
        self.config, self.converted, self.report = config, converted, report
        self.fresh = False
        """Whether the projections of converted blocks were initialised anew."""
        self._video = tokens_of(model)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._here = _Here()
        self._last: Grid | None = None
        self._hooks: list[Any] = []

    def install(self, model: nn.Module, readers: Mapping[str, AttentionReader]) -> None:
        """Claim the attention modules and register the hooks of the transformer."""
        computes = {name: functools.partial(self.compute, reader) for name, reader in readers.items()}
        # `dispatches`: calls that a window covers run the stock processor, which uses the attention dispatcher.
        processor_stack(model).claim(NAME, computes, dispatches=True, of_model=True)
        self._hooks = [model.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
        self._hooks.append(model.register_forward_hook(self.after_forward, always_call=True))
        installed(model).plug_ins[NAME] = self

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install`."""
        processor_stack(model).release(NAME)
        for hook in self._hooks:
            hook.remove()
        del installed(model).plug_ins[NAME]

    def describe(self) -> str:
        """Return one line that describes the conversion."""
        kinds = [each.kind for each in self.converted]
        parts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        blocks = len({each.block for each in self.converted})
        text = f"{blocks} of {len(self.report.types)} blocks are linear: {', '.join(parts) or 'none'}"
        return text + (", projections of queries, keys and values initialised anew" if self.fresh else "")

    def set_grid(self, grid: Grid) -> None:
        """Set the grid for blocks that are called without their transformer; copies of blocks keep this grid.

        The next call of the transformer replaces it.
        """
        self._here.grid, self._last = None, grid  # a compiled call leaves a grid in `_here`

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: read the grid of the call from its arguments.

        Raises:
            UserError: the arguments do not determine the grid, or somebody replaced the processors of converted
                layers, so that softmax would run instead.
        """
        if lost := {each.module for each in self.converted} & {*processor_stack(model).displaced()}:
            raise UserError(
                f"the attention processors of {len(lost)} converted layers were replaced, for example by"
                " set_attn_processor or fuse_qkv_projections, so softmax would run in them: restore the processors, or"
                " replace them before the conversion"
            )
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        grid = self._video.grid_rule(model.config, arguments)
        if grid is None and self.converted:
            raise UserError(
                f"the arguments of this call of {type(model).__name__} do not determine the frames, rows and columns"
                " of its tokens, which a converted model needs: pass num_frames, height and width, and no references"
            )
        self._here.grid = self._last = grid

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: end the call, and keep its grid for gradient checkpointing in the backward pass."""
        if torch.compiler.is_compiling():
            return
        grid, self._here.grid = self._here.grid, None
        found = output if isinstance(output, tuple) else tuple(output.values()) if isinstance(output, dict) else ()
        for each in found:
            if isinstance(each, torch.Tensor) and each.requires_grad:
                each.register_hook(functools.partial(self._before_backward, grid))

    def _before_backward(self, grid: Grid | None, gradient: torch.Tensor) -> None:
        # Gradient checkpointing runs blocks again in the backward pass. They belong to the call of this output, which
        # need not be the last call.
        self._last = grid

    def compute(
        self, reader: AttentionReader, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Compute a call of an attention module with its new layer, in place of the processor `inner`.

        Raises:
            UserError: the layer cannot compute this call.
        """
        # Gradient checkpointing runs blocks outside a call of the transformer, perhaps in another thread, so `_last`
        # is the fallback. If hooks and blocks are compiled separately, the thread-local value of the hooks is not
        # visible here.
        grid = self._last if torch.compiler.is_compiling() else self._here.grid or self._last
        if grid is None:
            raise UserError(
                "a converted block was called without its transformer, so the grid of its tokens is not known: call"
                " postgen.lit.set_grid first"
            )
        return compute_layer(getattr(attention, CHILD), reader, grid, inner, attention, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_here"}
        return {**state, "_hooks": living(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = _Here()


def compute_layer(
    layer: LitLayer,
    reader: AttentionReader,
    grid: Grid,
    inner: Callable[..., Any],
    attention: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute a call of an attention module with a layer, in place of the processor `inner`.

    Args:
        layer: the layer.
        reader: reads the arguments of the attention module.
        grid: the grid of the video tokens.
        inner: the stock processor; it runs if the layer equals softmax on this grid.
        attention: the attention module.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The return value that the processor would have: a tensor or a tuple, after the output projection.

    Raises:
        UserError: the layer cannot compute this call.
    """
    if layer.covers(grid):
        return inner(attention, *args, **kwargs)
    call = reader.bind(attention, *args, **kwargs)
    reading = reader.read(call)
    if reading is None or attention_settings(attention.processor)[1] is not None:
        raise UserError(
            f"a {layer.kind} layer cannot compute this call of its attention module: the arguments are not known, or"
            " the call is split across ranks (context parallelism). Leave the block softmax"
        )
    reading = reading.with_video(grid.tokens)
    hidden = call.hidden_states
    if reading.streams[0].norms.query is None and hidden.dtype == torch.float16:
        raise UserError(HALF.format(kind=layer.kind))
    tokens = Tokens(reading, grid, hidden if hidden.shape[1] == grid.tokens else hidden[:, reading.video])
    out = layer(tokens)
    if tokens.text:
        query, key, value = tokens.rotated()
        rows = query[:, tokens.text_rows]
        out = tokens.with_text(out, softmax_attention(rows, key, value, key_lengths=tokens.key_lengths))
    return reader.finish(call, out, out.dtype)


HALF = (
    "{kind} layers overflow in float16 if the model does not normalise queries and keys: load the model in bfloat16 or"
    " float32, or leave these blocks softmax"
)
