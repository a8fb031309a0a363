"""Models, sizes, layer types and plans of `python -m benchmarks.lit_speed`, and the two sides that it compares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import postgen
from benchmarks.fused_step import Case, built, wan
from postgen.families import Grid, blocks_of
from postgen.fused import FusedOpsHandle
from postgen.kernels.attention.backends import Call
from postgen.kernels.attention.ops import attention, router
from postgen.lit import LitConfig, MhlaOptions, WindowOptions, convert, revert
from postgen.lit.layers.base import LitLayer
from postgen.lit.layers.window import WindowLayer

CHANNELS = 128
"""Channels per head of Wan."""
SECONDS = 3000
"""Calls that take longer than this number of milliseconds are timed only twice."""
ROUTED_TOKENS = 75_600
"""Longest clip for which the router itself compares attention backends. With four times as many tokens the comparison
would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published shape of Wan 2.1."""

    name: str
    heads: int
    ffn: int
    layers: int

    def case(self, grid: Grid, layers: int) -> Case:
        """Return the configuration and a call of the transformer with `layers` blocks; a token is 2 x 2 latents."""
        return wan(self.name, self.heads, self.ffn, layers, (grid.frames, 2 * grid.height, 2 * grid.width))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip: its name, such as "720p 81f", and the grid of its tokens."""

    name: str
    grid: Grid


def clip(side: str, frames: int) -> Clip:
    """Return a clip of 480 x 832 or 720 x 1280 pixels.

    Args:
        side: 480p or 720p.
        frames: latent frames; the clip has 4 frames - 3 frames of pixels.
    """
    height, width = {"480p": (30, 52), "720p": (45, 80)}[side]
    return Clip(name=f"{side} {4 * frames - 3}f", grid=Grid(frames=frames, height=height, width=width))


SMALL = Model(name="Wan 1.3B", heads=12, ffn=8960, layers=30)
LARGE = Model(name="Wan 14B", heads=40, ffn=13824, layers=40)
TINY = Model(name="tiny Wan", heads=1, ffn=64, layers=4)
TINY_CLIP = Clip(name="tiny", grid=Grid(frames=7, height=2, width=2))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A layer type with its options."""

    kind: str
    radius: int = 2

    def config(self, where: str, grid: Grid) -> LitConfig:
        """Return the conversion of some blocks.

        Args:
            where: a text for `LitConfig.layers`, with `{}` in place of the type.
            grid: the token grid of the clip.
        """
        shape = (grid.frames, grid.height, grid.width)
        # The default of mhla, 4 x 4 blocks, does not fit into a grid with fewer than 4 rows or columns.
        blocks = (1, min(4, grid.height), min(4, grid.width))
        mhla = MhlaOptions(blocks=blocks)
        window = WindowOptions(radius=self.radius)
        return LitConfig(layers=where.format(self.kind), grid=shape, mhla=mhla, window=window)


KINDS = {
    "lit": Kind(kind="lit"),
    "window_delta radius 2": Kind(kind="window_delta", radius=2),
    "window_delta radius 1": Kind(kind="window_delta", radius=1),
    "mhla": Kind(kind="mhla"),
    "chunk": Kind(kind="chunk"),
    "anchor": Kind(kind="anchor"),
    "window_linear radius 2": Kind(kind="window_linear", radius=2),
    "window_delta radius 0": Kind(kind="window_delta", radius=0),
    "window_linear radius 0": Kind(kind="window_linear", radius=0),
}
"""Layer types to measure. The types for gates come first, because an interrupted run loses the later ones."""
HALF, THREE_QUARTERS, SEVEN_EIGHTHS = "every 2nd:{}", "all:{},every 4th:softmax", "all:{},every 8th:softmax"


class Plan(NamedTuple):
    """Which blocks of a model are converted to which layer type."""

    name: str
    kind: str
    """Key of `KINDS`."""
    where: str
    """Text for `LitConfig.layers`, with `{}` in place of the type."""


PLANS = (
    Plan("half lit", "lit", HALF),
    Plan("window_delta radius 2, every 8th softmax", "window_delta radius 2", SEVEN_EIGHTHS),
    Plan("window_delta radius 2, every 4th softmax", "window_delta radius 2", THREE_QUARTERS),
    Plan("window_delta radius 1, every 4th softmax", "window_delta radius 1", THREE_QUARTERS),
    Plan("half mhla", "mhla", HALF),
    Plan("half chunk", "chunk", HALF),
    Plan("half anchor", "anchor", HALF),
    Plan("half window_delta radius 0", "window_delta radius 0", HALF),
    Plan("window_delta radius 0, every 4th softmax", "window_delta radius 0", THREE_QUARTERS),
    Plan("half window_linear radius 0", "window_linear radius 0", HALF),
    Plan("window_linear radius 0, every 4th softmax", "window_linear radius 0", THREE_QUARTERS),
    Plan("lit, every 4th softmax", "lit", THREE_QUARTERS),
    Plan("mhla, every 4th softmax", "mhla", THREE_QUARTERS),
)


class Built:
    """A transformer with random weights, and a call of it."""

    def __init__(self, model: Model, grid: Grid, layers: int, device: str, *, fused: bool) -> None:
        import diffusers

        torch.manual_seed(0)
        self.model, self.grid, self.device, self.fused = model, grid, device, fused
        case = model.case(grid, layers)
        with torch.device(device):
            self.transformer = built(getattr(diffusers, case.kind), case.config)
            self.arguments = case.arguments()
        if device == "cuda":
            torch.cuda.empty_cache()  # frees the float32 weights of the construction
        self.backend = "auto" if grid.tokens <= ROUTED_TOKENS else best_backend(model, device)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the transformer, in running order."""
        return [block.module for block in blocks_of(self.transformer)]

    def step(self) -> Any:
        """Run one forward pass of the transformer."""
        return self.transformer(**self.arguments, return_dict=False)[0]

    @contextmanager
    def side(self, config: LitConfig | None) -> Iterator[FusedOpsHandle]:
        """Convert the transformer, or leave it stock for None, and apply fused operations; undo both at the end.

        Both sides of a comparison use the same fused operations and the router's fastest softmax backend. Without
        `fused`, both use the norms, rotary embeddings and modulation of diffusers.
        """
        if config is not None:
            with torch.device(self.device):  # new layers are large, so create them on the device
                convert(self.transformer, config)
        try:
            handle = postgen.apply_fused_ops(
                self.transformer,
                postgen.FusedOpsConfig(norm_rope=self.fused, adaln=self.fused, attention=self.backend),
            )
            try:
                yield handle
            finally:
                handle.remove()
        finally:
            if config is not None:
                revert(self.transformer)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Return calls of the second block and of its self-attention with the inputs of a step.

        The first block is never converted.
        """
        block: Any = self.blocks[1]
        parts = {"block": block, "layer": block.attn1}
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def listen(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[name] = (args, kwargs)

            return parts[name].register_forward_pre_hook(hook, with_kwargs=True)

        hooks = [listen(name) for name in parts]
        self.step()
        for each in hooks:
            each.remove()

        def call(name: str) -> Callable[[], Any]:
            args, kwargs = seen[name]
            return lambda: parts[name](*args, **kwargs)

        return {name: call(name) for name in parts}

    def softmax_alone(self) -> Callable[[], Any]:
        """Return a call of softmax attention without projections, norms and rotary embedding, on the same backend."""
        query, key, value = drawn(self.model, self.grid.tokens, self.device)
        backend = None if self.backend == "auto" else self.backend
        return lambda: attention(query, key, value, backend=backend)


def drawn(model: Model, tokens: int, device: str) -> Sequence[torch.Tensor]:
    """Return random queries, keys and values, each (1, tokens, heads, channels), in bfloat16."""
    shape = (1, tokens, model.heads, CHANNELS)
    return [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3)]


def best_backend(model: Model, device: str) -> str:
    """Return the router's choice of backend for a clip of `ROUTED_TOKENS` tokens."""
    query, key, value = drawn(model, ROUTED_TOKENS, device)
    return router().choose(Call(query, key, value, CHANNELS**-0.5, None, False)).name


class Timing(NamedTuple):
    """Time and memory of one call."""

    milliseconds: float
    """Median time."""
    peak_gib: float | None
    """Peak memory with the weights; None on a CPU."""


def timed(call: Callable[[], Any], device: str, repeats: int) -> Timing:
    """Time a call after one warm-up call, on a GPU with CUDA events.

    Args:
        call: the function to time.
        device: cpu or cuda.
        repeats: number of timed calls; 2 if a call takes more than `SECONDS` milliseconds.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = [_milliseconds(call, device)]
    times += [_milliseconds(call, device) for _ in range(min(repeats, 2 if times[0] > SECONDS else repeats) - 1)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return Timing(statistics.median(times), peak)


def _milliseconds(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def density(layer: LitLayer, grid: Grid) -> float | None:
    """Return the share of (query, key) pairs that a window layer computes by softmax; None for other types."""
    if not isinstance(layer, WindowLayer):
        return None
    frames = grid.frames
    return sum((each.stop - each.first) * (each.high - each.low) for each in layer.windows(frames)) / frames**2
