"""What a conversion leaves on a transformer: it knows the grid of the call, and computes in the converted modules."""

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
    from postgen.lit.config import LiTConfig
    from postgen.lit.layers import LitLayer
    from postgen.lit.report import Report

NAME = "lit"
"""Among what is on a transformer, and on its processor stack."""
CHILD = "postgen_lit"
"""Name of the layer in its attention module."""


class _Here(threading.local):
    """Grid of the forward under way in a thread."""

    def __init__(self) -> None:
        self.grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """One attention module that was converted."""

    block: int
    """In running order."""
    module: str
    """Name of the attention module."""
    kind: str
    """Layer type."""


class Conversion:
    """Everything on one transformer."""

    def __init__(self, model: nn.Module, config: LiTConfig, converted: tuple[Converted, ...], report: Report) -> None:
        self.config, self.converted, self.report = config, converted, report
        self.fresh = False
        """Whether projections began anew."""
        self._video = tokens_of(model)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._here = _Here()
        self._last: Grid | None = None
        self._hooks: list[Any] = []

    def install(self, model: nn.Module, readers: Mapping[str, AttentionReader]) -> None:
        """Claim the modules and listen to the calls of the transformer."""
        computes = {name: functools.partial(self.compute, reader) for name, reader in readers.items()}
        # What goes through the dispatcher is diffusers' own attention, in calls that a window covers.
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
        """Say in one line what is converted."""
        kinds = [each.kind for each in self.converted]
        parts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        blocks = len({each.block for each in self.converted})
        text = f"{blocks} of {len(self.report.types)} blocks are linear: {', '.join(parts) or 'none'}"
        return text + (", queries, keys and values begun anew" if self.fresh else "")

    def set_grid(self, grid: Grid) -> None:
        """Say the grid of blocks that are called alone, until the transformer is called; copies of blocks keep it."""
        self._here.grid, self._last = None, grid  # a compiled call leaves its own

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grid of a call.

        Raises:
            UserError: the call does not tell it, or processors were replaced, so that softmax would run instead.
        """
        if lost := {each.module for each in self.converted} & {*processor_stack(model).displaced()}:
            raise UserError(
                f"the processors of {len(lost)} converted layers were replaced (set_attn_processor and"
                " fuse_qkv_projections do that), so softmax would run in them: put them back, or convert afterwards"
            )
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        grid = self._video.grid_rule(model.config, arguments)
        if grid is None and self.converted:
            raise UserError(
                f"this call of {type(model).__name__} does not tell frames, rows and columns of its tokens, which a"
                " converted model needs: pass num_frames, height and width, and no references"
            )
        self._here.grid = self._last = grid

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """End the call."""
        if torch.compiler.is_compiling():
            return
        grid, self._here.grid = self._here.grid, None
        found = output if isinstance(output, tuple) else tuple(output.values()) if isinstance(output, dict) else ()
        for each in found:
            if isinstance(each, torch.Tensor) and each.requires_grad:
                each.register_hook(functools.partial(self._before_backward, grid))

    def _before_backward(self, grid: Grid | None, gradient: torch.Tensor) -> None:
        # Blocks that gradient checkpointing runs again now are of the call that ends here, not of the last one.
        self._last = grid

    def compute(
        self, reader: AttentionReader, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the processor `inner` returns, by the module's layer.

        Raises:
            UserError: a call that the layer cannot compute.
        """
        # Gradient checkpointing runs blocks again outside of a call, perhaps in another thread.
        # Where hooks and blocks are compiled apart, what the hooks leave in a thread's own place is not seen here.
        grid = self._last if torch.compiler.is_compiling() else self._here.grid or self._last
        if grid is None:
            raise UserError(
                "a converted block was called alone, before its transformer: call postgen.lit.set_grid first"
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
    """Return what the processor `inner` returns for a call of an attention module, by a layer on a grid.

    Raises:
        UserError: a call that the layer cannot compute.
    """
    if layer.covers(grid):
        return inner(attention, *args, **kwargs)
    call = reader.bind(attention, *args, **kwargs)
    reading = reader.read(call)
    if reading is None or attention_settings(attention.processor)[1] is not None:
        raise UserError(
            f"a {layer.kind} layer got a call of its attention that it cannot compute (unknown arguments, or a split"
            " among ranks)"
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
    "{kind} in float16 without a norm of queries and keys overflows: load the model in bfloat16 or float32, or leave"
    " these blocks softmax"
)
