"""The base class of all layer types: a module that computes the video tokens of one self-attention module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from postgen.errors import UserError

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.tokens import Tokens

State = dict[str, Tensor]
"""Tensors that a causal layer carries from one piece of a stream to the next, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of one attention module."""

    heads: int
    """H, attention heads."""
    channels: int
    """D, channels per head."""
    hidden: int
    """C, channels of the hidden states that the module projects to queries, keys and values."""
    grid: Grid | None = None
    """The grid of tokens for which the layer is created. Only `mhla`, which is bound to its grid, needs it."""


class LitLayer(nn.Module):
    """Replaces softmax attention for the video tokens of one attention module.

    The layer reads the text tokens, but it does not compute their outputs. It returns the attention output before the
    output projection, (B, N, H, D), in the dtype of the queries.
    """

    kind: ClassVar[str]
    """Name of the layer type."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.before: dict[str, Tensor] = {}
        """The original weights of the surrounding attention module that an adapter has replaced, by name."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D).

        Raises:
            UserError: the layer cannot compute on the grid of these tokens.
        """

    def covers(self, grid: Grid) -> bool:
        """Whether the layer equals the stock softmax attention on this grid; the stock attention then computes."""
        return False

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Compute the next frames of a stream.

        A causal layer returns the same outputs here, piece by piece, as `forward` returns for all frames at once.

        Args:
            tokens: the tokens of the next frames. Their positions continue those of the previous piece.
            state: the state that the previous call returned; None starts a stream.

        Returns:
            The outputs of these frames, (B, N, H, D), and the state for the next call, whose size is bounded.

        Raises:
            UserError: the layer is not causal, so its outputs depend on later frames.
        """
        raise UserError(
            f"the layer type {self.kind} reads later frames here, so it cannot compute frame by frame. Use lit, chunk"
            " or a window type with causal=True"
        )

    @abstractmethod
    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample, without the projections of the base model.

        Args:
            grid: the grid of the video tokens.
            text: number of text tokens in the same attention.
        """


_PLACES = {
    "lit": "postgen.lit.layers.lit:Lit",
    "mhla": "postgen.lit.layers.mhla:Mhla",
    "anchor": "postgen.lit.layers.anchor:Anchor",
    "chunk": "postgen.lit.layers.chunk:Chunk",
    "window_delta": "postgen.lit.layers.window:WindowDelta",
    "window_linear": "postgen.lit.layers.window:WindowLinear",
}


def make_layer(kind: str, shape: Shape, options: Any) -> LitLayer:
    """Create a layer, on the CPU, in float32.

    Args:
        kind: the layer type, one of `options.LINEAR_TYPES`.
        shape: the sizes of the attention module.
        options: the options of this layer type, such as `LitOptions`.

    Raises:
        UserError: the options do not fit the sizes.
    """
    module, _, name = _PLACES[kind].partition(":")
    make: Callable[[Shape, Any], LitLayer] = getattr(import_module(module), name)
    return make(shape, options)


def softmax_flops(queries: int, keys: int, shape: Shape) -> int:
    """Return the FLOPs of softmax attention: the scores and the weighted sum of the values."""
    return 4 * queries * keys * shape.heads * shape.channels


def check_pushed(state: State | None, chunk: int) -> int:
    """Return how many frames of the stream earlier calls computed.

    Args:
        state: the state of the previous call; None at the start of a stream.
        chunk: frames per chunk.

    Raises:
        UserError: the earlier frames are not a whole number of chunks, so the next frame would begin inside a chunk.
    """
    pushed = 0 if state is None else int(state["pushed"])
    if pushed % chunk:
        raise UserError(
            f"the earlier pieces of this stream have {pushed} frames, which is not a multiple of the chunk size"
            f" {chunk}. Only the last piece may end inside a chunk"
        )
    return pushed
