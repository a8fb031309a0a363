"""What every layer type is: a module that computes the video's rows of one self-attention."""

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
"""What a layer keeps between the pieces of a stream, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of one attention module."""

    heads: int
    channels: int
    """D, of a head."""
    hidden: int
    """C, of what is projected."""
    grid: Grid | None = None
    """That the layer is made for, where it is bound to one."""


class LitLayer(nn.Module):
    """Computes what the video's tokens get, instead of softmax attention. Text is read, its rows are not computed.

    Results are before the output layer, (B, N, H, D), in the dtype of the queries.
    """

    kind: ClassVar[str]
    """Name of the layer type."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.before: dict[str, Tensor] = {}
        """Weights of the attention module around it that an adapter has replaced, as they were."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """Return the video's rows.

        Raises:
            UserError: the layer cannot compute on this grid.
        """

    def covers(self, grid: Grid) -> bool:
        """Whether on this grid it is the base's softmax attention, which computes then."""
        return False

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Return the rows of the next frames of a stream, and what the frames after them need, of constant size.

        What comes out is what `forward` of a causal layer gives for all frames at once.

        Args:
            tokens: of the next frames; positions go on from those before.
            state: what the call before returned; None begins a stream.

        Raises:
            UserError: the layer is not causal, so that its rows depend on frames to come.
        """
        raise UserError(
            f"{self.kind} looks at later frames, so it cannot compute frame by frame: lit, chunk and the window types"
            " can, with causal=True"
        )

    @abstractmethod
    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of a call of one sample, projections of the base left out.

        Args:
            grid: of the video.
            text: tokens of text beside it.
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
    """Return a layer of a type, on the CPU, in float32.

    Args:
        kind: one of `options.LINEAR_TYPES`.
        shape: of the attention module.
        options: of the type.

    Raises:
        UserError: options that do not go with the shape.
    """
    module, _, name = _PLACES[kind].partition(":")
    make: Callable[[Shape, Any], LitLayer] = getattr(import_module(module), name)
    return make(shape, options)


def softmax_flops(queries: int, keys: int, shape: Shape) -> int:
    """Return the FLOPs of softmax attention, scores and values."""
    return 4 * queries * keys * shape.heads * shape.channels


def check_pushed(state: State | None, chunk: int) -> int:
    """Return how many frames of a stream there were before.

    Raises:
        UserError: they are no whole chunks, so that the next frame is in the middle of one.
    """
    pushed = 0 if state is None else int(state["pushed"])
    if pushed % chunk:
        raise UserError(
            f"{pushed} frames were given, which are no whole chunks of {chunk}: only the last piece may end so"
        )
    return pushed
