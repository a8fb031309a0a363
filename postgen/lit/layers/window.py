"""`window_delta` and `window_linear`: softmax attention in a window of frames, plus a memory of all frames outside the
window (Video DeltaNet, arXiv:2609.20744). The weights of the base model stay; the layer adds a branch:

    y = g_s winsoftmax(q, k, v) + W' (g_l RMSNorm(M_t q~))
    M_t = P_{lo-1} prod alpha_{lo..t} + Q_{hi} prod alpha_{t..hi-1}

The query belongs to frame t, and its window holds the frames lo to hi - 1. P and Q are the memories that run forward
and backward in time (`memory.py`). No frame is both in the window and in the memory that the query reads. q~, k~, v~
are the projections of the base model before norm and rotary embedding.

The paper adds the branch after the base model's output projection and gives the branch its own. Here W' comes before
the base model's output projection, so architectures without an output projection work too. W' begins with zeros and
g_s = 2 sigmoid(0) = 1, so a new layer computes softmax in the window. If the window holds the whole clip, the stock
attention computes, without the branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postgen.kernels.attention.ops import attention
from postgen.kernels.frame_memory.ops import frame_memories, frame_reads, frame_sums, gated_sum, takes
from postgen.lit.features import GridConvolution, by_frame_and_head, exact, no_autocast
from postgen.lit.layers.base import LitLayer, Shape, State, check_pushed, softmax_flops
from postgen.lit.layers.memory import Writes, decayed, scan, solved, step, written

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.options import WindowOptions
    from postgen.lit.tokens import Tokens

CONV_SPACE, CONV_TIME = 5, 5
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Window:
    """A chunk of query frames, `first` to `stop` - 1, and the frames in its window, `low` to `high` - 1."""

    first: int
    stop: int
    low: int
    high: int


class _Gate(nn.Module):
    """Computes the logits of a gate per channel, up(down(x)), (B, N, H * D)."""

    def __init__(self, hidden: int, rank: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out


class _Decay(nn.Module):
    """Computes the decay of the memory per frame, head and key channel, (B, F, H, D).

    log(alpha) = -exp(a_h) softplus(up(down(mean over the frame's tokens)) + delta).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.down = nn.Linear(shape.hidden, shape.channels, bias=False)
        self.up = nn.Linear(shape.channels, shape.heads * shape.channels, bias=False)
        # As in the paper: exp(a) from 1 to 16 over the heads, softplus(delta) from 0.001 to 0.1 over the channels.
        self.log_rate = nn.Parameter(torch.linspace(1, 16, shape.heads).log())
        rates = torch.logspace(-3, -1, shape.channels).repeat(shape.heads, 1)
        self.delta = nn.Parameter(rates.expm1().log())

    def forward(self, hidden: Tensor, frames: int) -> Tensor:
        mean = hidden.unflatten(1, (frames, -1)).mean(dim=2)
        change = exact(self.up(self.down(mean))).unflatten(-1, tuple(self.delta.shape))
        return -exact(self.log_rate).exp()[:, None] * F.softplus(change + exact(self.delta))


class WindowLayer(LitLayer):
    """Base class of both window types: softmax in a window and a memory of the other frames."""

    delta = True
    """Whether the memory solves the ridge problem of `memory.py`; False makes it a decayed sum."""

    def __init__(self, shape: Shape, options: WindowOptions) -> None:
        super().__init__(shape)
        self.options = options
        width = shape.heads * shape.channels
        self.soft_gate = nn.Linear(shape.hidden, shape.heads)
        nn.init.zeros_(self.soft_gate.weight)
        nn.init.zeros_(self.soft_gate.bias)
        self.strength = nn.Linear(shape.hidden, shape.heads, bias=False)
        self.decay = _Decay(shape)
        self.gate = _Gate(shape.hidden, shape.channels, width)
        self.norm = nn.Parameter(torch.ones(shape.channels))
        sides = (CONV_SPACE, CONV_TIME) if options.conv else (0, 0)
        self.conv_key, self.conv_value = (GridConvolution(width, *sides, causal=options.causal) for _ in range(2))
        if options.output == "full":
            self.mix = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.mix.weight)
        else:
            self.gain = nn.Parameter(torch.zeros(width))

    def covers(self, grid: Grid) -> bool:
        """Whether every frame attends to all frames by softmax, so that the layer equals the stock attention."""
        frames, anchors = {*range(grid.frames)}, {*self.anchors(grid.frames)}
        return all(
            {*range(each.first, each.stop)} <= anchors or {*range(each.low, each.high)} | anchors == frames
            for each in self.windows(grid.frames)
        )

    def windows(self, frames: int) -> Iterator[Window]:
        """Yield the chunks of a clip in order, each with its window."""
        size, radius = self.options.chunk, self.options.radius
        for first in range(0, frames, size):
            stop = min(first + size, frames)
            high = stop if self.options.causal else min(first + (radius + 1) * size, frames)
            yield Window(first, stop, max(0, first - radius * size), high)

    def anchors(self, frames: int) -> list[int]:
        """Return the dense frames: they attend to all frames by softmax, and all frames attend to them."""
        return {"none": [], "first": [0], "both": sorted({0, frames - 1})}[self.options.anchors]

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D)."""
        if self.options.causal:
            return self.stream(tokens, None)[0]
        anchors = self.anchors(tokens.grid.frames)
        near = self._near(tokens, anchors)
        query, writes = self._written(tokens)[:2]
        return self._finished(tokens, near, query, self._reads(query, writes.without(anchors), anchors))

    def _reads(self, query: Tensor, writes: Writes, anchors: list[int]) -> Tensor:
        """Return the memory that each frame reads, (B, F, H, D, D); zeros for dense frames, which read no memory."""
        if takes(query):
            inverse, content, log_decay = writes.inverse, writes.content, writes.log_decay
            found: Tensor = frame_memories(inverse, content, log_decay, self.options.chunk, self.options.radius)
            for frame in anchors:
                found[:, frame] = 0
            return found
        forward, backward = scan(writes), scan(writes, backward=True)
        reads = []
        for each in self.windows(writes.content.shape[1]):
            for frame in range(each.first, each.stop):
                before = decayed(forward[each.low], writes.log_decay[:, each.low : frame + 1])
                after = decayed(backward[each.high], writes.log_decay[:, frame : each.high])
                reads.append(torch.zeros_like(before) if frame in anchors else before + after)
        return torch.stack(reads, dim=1)

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Compute the next frames of a stream; see `LitLayer.stream`.

        Every piece but the last must be a whole number of chunks. The state holds the frames that the window of the
        next chunk can reach: their keys, values and `Writes` (what they will add to the memory). It also holds the
        memory of all frames before these, and the last frames for the convolutions.
        """
        if not self.options.causal:
            return super().stream(tokens, state)
        grid, reach = tokens.grid, self.options.chunk * self.options.radius
        places = grid.height * grid.width
        pushed = check_pushed(state, self.options.chunk) + grid.frames
        query, key, value = tokens.softmax_parts()
        memory_query, writes, tails = self._written(tokens, state)
        kept, memory = 0, torch.zeros_like(writes.content[:, 0])
        if state is not None:
            kept, memory = state["content"].shape[1], state["memory"]
            key, value = torch.cat([state["key"], key], dim=1), torch.cat([state["value"], value], dim=1)
            past = Writes(inverse=state.get("inverse"), content=state["content"], log_decay=state["log_decay"])
            writes = past.followed_by(writes)
        near, reads, low = [], [], 0
        for each in self.windows(grid.frames):
            # Frames that leave the window are written to the memory.
            for frame in range(low, max(0, each.first + kept - reach)):
                memory, low = step(memory, writes, frame), frame + 1
            rows, seen = (
                slice(each.first * places, each.stop * places),
                slice(low * places, (each.stop + kept) * places),
            )
            near.append(self._attend(tokens, query[:, rows], key[:, seen], value[:, seen]))
            for frame in range(each.first + kept, each.stop + kept):
                reads.append(decayed(memory, writes.log_decay[:, low : frame + 1]))
        out = self._finished(tokens, torch.cat(near, dim=1), memory_query, torch.stack(reads, dim=1))
        # Keep only the frames that the window of the next chunk can reach; write the others to the memory.
        last = max(low, writes.content.shape[1] - reach)
        for frame in range(low, last):
            memory = step(memory, writes, frame)
        rest = writes.frames(last)
        found = {"memory": memory, "content": rest.content.clone(), "log_decay": rest.log_decay.clone(), **tails}
        if rest.inverse is not None:
            found["inverse"] = rest.inverse.clone()
        found["pushed"] = torch.tensor(pushed)
        # Clones, because a view would keep the whole earlier tensor in memory.
        return out, {**found, "key": key[:, last * places :].clone(), "value": value[:, last * places :].clone()}

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample."""
        shape, places, frames = self.shape, grid.height * grid.width, grid.frames
        anchors, width = self.anchors(frames), shape.heads * shape.channels
        pairs = 0
        for each in self.windows(frames):
            more = [frame for frame in anchors if not each.low <= frame < each.high]
            inside = sum(frame not in anchors for frame in range(each.first, each.stop))
            pairs += inside * (each.high - each.low + len(more))
        pairs += len(anchors) * frames
        soft = 4 * pairs * places**2 * width + softmax_flops(grid.tokens, text, shape)
        if self.covers(grid):
            return soft + softmax_flops(text, grid.tokens + text, shape)
        products = 3 if self.delta else 2
        per_token = 2 * products * width * shape.channels
        gates = 2 * (shape.hidden * (2 * shape.heads + shape.channels) + shape.channels * width)
        taps = 2 * 2 * (CONV_SPACE**2 + CONV_TIME) * width if self.options.conv else 0
        output = 2 * width**2 if self.options.output == "full" else 0
        return (
            soft
            + softmax_flops(text, grid.tokens + text, shape)
            + grid.tokens * (per_token + gates + taps + output)
            + 2 * frames * shape.heads * 3 * shape.channels**3 * self.delta
        )

    def _near(self, tokens: Tokens, anchors: list[int]) -> Tensor:
        """Compute softmax of each chunk over its window, the dense frames and the text, with one call per chunk."""
        query, key, value = (x.unflatten(1, (tokens.grid.frames, -1)) for x in tokens.softmax_parts())
        parts: dict[int, Tensor] = {}
        for frame in anchors:
            parts[frame] = self._attend(tokens, query[:, frame], key.flatten(1, 2), value.flatten(1, 2))
        for each in self.windows(tokens.grid.frames):
            rows = [frame for frame in range(each.first, each.stop) if frame not in anchors]
            if not rows:
                continue
            # Dense frames are the first and the last frame of the clip, so the other frames of a chunk are contiguous.
            more = [frame for frame in anchors if not each.low <= frame < each.high]
            seen = [x[:, each.low : each.high] for x in (key, value)]
            if more:
                seen = [torch.cat([part, x[:, more]], dim=1) for part, x in zip(seen, (key, value), strict=True)]
            queries = query[:, rows[0] : rows[-1] + 1].flatten(1, 2)
            parts[rows[0]] = self._attend(tokens, queries, *(part.flatten(1, 2) for part in seen))
        return torch.cat([parts[first] for first in sorted(parts)], dim=1)

    def _attend(self, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        text, lengths = tokens.text_keys(), tokens.text_lengths
        if text is None:
            return attention(query, key, value)
        lengths = None if lengths is None else lengths + key.shape[1]
        key, value = torch.cat([key, text[0]], dim=1), torch.cat([value, text[1]], dim=1)
        return attention(query, key, value, key_lengths=lengths)

    def _written(self, tokens: Tokens, state: State | None = None) -> tuple[Tensor, Writes, State]:
        """Return the projected queries, the writes of the frames, and the state of the convolutions.

        The state holds the last frames, which the causal convolutions along time read in the next piece of a stream.
        """
        frames = tokens.grid.frames
        query, key = tokens.raw()
        tails: State = {}
        convolved = []
        for name, x, conv in (("key", key, self.conv_key), ("value", tokens.value, self.conv_value)):
            x = conv.in_space(x, tokens.grid, added=True)
            before = self._before(f"tail_{name}", x, conv, tokens, state)
            if before is not None:
                tails[f"tail_{name}"] = torch.cat([before, x], dim=1)[:, x.shape[1] :].clone()
            convolved.append(conv.in_time(x, tokens.grid, before, added=True))
        return query, self._writes(convolved[0], convolved[1], tokens.hidden, frames), tails

    def _writes(self, key: Tensor, value: Tensor, hidden: Tensor, frames: int) -> Writes:
        """Compute the writes of each frame from its convolved keys and values, (B, N, H, D)."""
        strength, log_decay, scale = self.strength(hidden), self.decay(hidden, frames), self.options.scale_memory
        with no_autocast(key):
            if takes(key, value, strength):
                gram, content = frame_sums(key, value, strength, frames, gram=self.delta)
                places = key.shape[1] // frames
                return solved(gram, content, log_decay, places=places, scale=scale)
            b = exact(strength).sigmoid().unflatten(1, (frames, -1))
            k, v = _activated(key, frames, unit=True), _activated(value, frames, unit=False)
            return written(k, v, b, log_decay, delta=self.delta, scale=scale)

    def _before(
        self, name: str, x: Tensor, conv: GridConvolution, tokens: Tokens, state: State | None
    ) -> Tensor | None:
        if not (self.options.causal and conv.taps_before):
            return None
        if state is not None:
            return state[name]
        places = tokens.grid.height * tokens.grid.width
        return x.new_zeros(x.shape[0], conv.taps_before * places, *x.shape[2:])

    def _finished(self, tokens: Tokens, near: Tensor, query: Tensor, reads: Tensor) -> Tensor:
        """Read the memories `reads`, (B, F, H, D, D), and add them to the output `near` of softmax."""
        far = self._far(query, reads, self.gate(tokens.hidden), near.dtype)
        added = self.mix(far) if self.options.output == "full" else far * self.gain
        gate = self.soft_gate(tokens.hidden)
        if takes(near, added, gate):
            summed: Tensor = gated_sum(near, added.view_as(near), gate)
            return summed.to(tokens.value.dtype)
        soft = 2 * gate.sigmoid()
        out: Tensor = near * soft[..., None].to(near.dtype) + added.view_as(near).to(near.dtype)
        return out.to(tokens.value.dtype)

    def _far(self, query: Tensor, reads: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the queries (B, N, H, D) read from the memories, normalised and gated, (B, N, H * D)."""
        with no_autocast(query):
            if takes(query, gate):
                found: Tensor = frame_reads(query, reads, self.norm, gate.view(query.shape), NORM_EPS)
                return found.flatten(2).to(dtype)
            q = _activated(query, reads.shape[1], unit=True)
            far = torch.einsum("bfshd,bfhed->bfshe", q, reads).flatten(1, 2)
            far = far * (far.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt() * exact(self.norm)
        return far.flatten(2).to(dtype) * gate.sigmoid().to(dtype)


def _activated(x: Tensor, frames: int, *, unit: bool) -> Tensor:
    """Return silu(x) as (B, F, S, H, D) for x (B, N, H, D), scaled to unit length if `unit`."""
    # With gradients the memory layout stays: another layout would change the last bits of the gradients.
    x = exact(x) if torch.is_grad_enabled() else by_frame_and_head(x, frames)
    x = F.normalize(F.silu(x), dim=-1) if unit else F.silu(x)
    return x if x.dim() == 5 else x.unflatten(1, (frames, -1))


class WindowDelta(WindowLayer):
    """The layer type `window_delta`: the memory minimises the error of each frame (see `memory.py`)."""

    kind = "window_delta"


class WindowLinear(WindowLayer):
    """The layer type `window_linear`: the memory is a decayed sum (A = 0 in `memory.py`)."""

    kind = "window_linear"
    delta = False
