"""Frozen weights of repeated blocks in main memory, copied to the device before their block runs.

Two buffers on the device, each of the size of the largest block, hold the block that runs and the block that runs
next. On CUDA a second stream copies the next block from pinned memory meanwhile. In the backward pass, gradient
checkpointing runs the forward pass of each block again, so the same hook fetches its weights, in the opposite order.

The weights of a block stay in their buffer until another block needs it. By then the backward pass of the first block
is queued, and the copy waits for it. Without gradient checkpointing a backward pass would read a buffer that another
block has overwritten; torch detects this and raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from postgen.compat.placement import stays
from postgen.errors import UserError

ONE_PROCESS = (
    "offload_blocks works in one process only, because processes exchange weights that are on their devices: set it to"
    " 0, or shard the weights with fully_shard"
)
"""Message of the error for several processes."""
_ALIGNMENT = 256
"""Every weight begins at a multiple of this number of bytes, as kernels need."""
_BUFFERS = 2


@dataclass(kw_only=True)
class _Weight:
    """One frozen weight of a block."""

    places: list[tuple[nn.Module, str]]
    """Modules that have the weight, with its name in each."""
    home: nn.Parameter
    """The weight in main memory, a view of `_Home.memory`."""
    start: int
    """Its first byte."""

    def seen_in(self, memory: Tensor) -> nn.Parameter:
        """Return the weight as a view of a buffer (bytes,) that holds its block."""
        part = memory[self.start : self.start + self.home.nbytes].view(self.home.dtype)
        return nn.Parameter(part.view(self.home.shape), requires_grad=False)

    def put(self, parameter: nn.Parameter | None) -> None:
        """Set the weight of the modules."""
        for module, name in self.places:
            setattr(module, name, parameter)


@dataclass(kw_only=True)
class _Home:
    """The frozen weights of one block."""

    block: nn.Module
    memory: Tensor
    """All weights as bytes (N,) in main memory; pinned for CUDA."""
    weights: list[_Weight]
    there: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    """Index of a buffer -> the weights as views of it."""
    buffer: int | None = None
    """Index of the buffer that holds the block; None if it is in main memory only."""

    def put(self) -> None:
        """Set the weights of the modules to those of the buffer, or of main memory."""
        now = [weight.home for weight in self.weights] if self.buffer is None else self.there[self.buffer]
        for weight, parameter in zip(self.weights, now, strict=True):
            weight.put(parameter)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take the weights out of the modules for the enclosed code."""
        for weight in self.weights:
            weight.put(None)
        try:
            yield
        finally:
            self.put()


class BlockOffload:
    """Keeps the frozen weights of some blocks in main memory. Buffers and trained parameters stay on the device.

    A conversion of the whole model, such as `model.to(device)`, does not move these weights.

    Args:
        model: the network, which must not be sharded or averaged over processes.
        blocks: the blocks in running order.
        device: device on which the blocks run.

    Raises:
        UserError: a block has no frozen weights, or weights of a format of another library, or two blocks share a
            weight.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        weights = [_frozen_in(block) for block in blocks]
        _check(blocks, weights)
        pinned = device.type == "cuda"
        self._homes = [_moved_home(block, found, pinned) for block, found in zip(blocks, weights, strict=True)]
        self._buffers: list[Tensor] = []
        count = min(_BUFFERS, len(self._homes))  # with one block, a second buffer would only take memory
        self._held: list[int | None] = [None] * count
        self._copied: list[torch.cuda.Event | None] = [None] * count
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._last, self._step = -1, 1
        self._paused = False
        self.copies = 0
        """Number of copies of a block to the device so far."""
        self._undo: list[Callable[[], Any]] = [stays(home.block, home.away) for home in self._homes]
        for index, home in enumerate(self._homes):
            hook = home.block.register_forward_pre_hook(partial(self._enter, index))
            self._undo.append(hook.remove)
        _OFFLOADS[model] = ref(self)
        self._undo.append(partial(_OFFLOADS.pop, model, None))

    @property
    def home_bytes(self) -> int:
        """Bytes in main memory."""
        return sum(home.memory.numel() for home in self._homes)

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device, which the first forward pass allocates."""
        return len(self._held) * max(home.memory.numel() for home in self._homes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not put weights into the modules during the enclosed code, which replaces them by others."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def remove(self) -> None:
        """Move all weights to the device, and undo the offload."""
        for undo in self._undo:
            undo()
        self._undo = []
        for home in self._homes:
            home.buffer = None
            for weight in home.weights:
                weight.put(nn.Parameter(weight.home.to(self.device, copy=True), requires_grad=False))
        self._buffers = []

    def _enter(self, index: int, *_: Any) -> None:
        """Act before the forward pass of a block: put its weights in place, and begin to fetch those of the next."""
        if self._paused:
            return
        home = self._homes[index]
        if home.buffer is None:
            self._fetch(index, keep=None)
        assert home.buffer is not None
        if (event := self._copied[home.buffer]) is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        upcoming = self._after(index)
        if upcoming is not None and self._homes[upcoming].buffer is None:
            self._fetch(upcoming, keep=home.buffer)

    def _after(self, index: int) -> int | None:
        """Return the block that runs after block `index`; None if it is one that is on the device."""
        last, count, self._last = self._last, len(self._homes), index
        if index == last:  # the forward pass of the last block again: a backward pass begins; or a new step
            self._step = -1 if index == count - 1 else 1 if index == 0 else self._step
        else:
            wraps = index == 0 and last == count - 1
            self._step = 1 if index > last or wraps else -1
        found = index + self._step
        if found == count:  # without gradients, the next pass begins; with them, the backward pass of this block
            return None if torch.is_grad_enabled() else 0
        return found if found >= 0 else None

    @torch.no_grad()
    def _fetch(self, index: int, keep: int | None) -> None:
        """Copy a block into a buffer other than `keep`; the block in the buffer returns to main memory."""
        if not self._buffers:
            size = max(home.memory.numel() for home in self._homes)
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in self._held]
        buffer = self._free(keep)
        if (before := self._held[buffer]) is not None:
            self._homes[before].buffer = None
            self._homes[before].put()
        home, memory = self._homes[index], self._buffers[buffer]
        if self._stream is None:
            memory[: home.memory.numel()].copy_(home.memory)
        else:
            # All work that reads the buffer is queued on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                memory[: home.memory.numel()].copy_(home.memory, non_blocking=True)
            self._copied[buffer] = self._stream.record_event()
        if buffer not in home.there:
            home.there[buffer] = [weight.seen_in(memory) for weight in home.weights]
        self._held[buffer], home.buffer = index, buffer
        home.put()
        self.copies += 1

    def _free(self, keep: int | None) -> int:
        """Return the buffer to overwrite: an empty one, or else not that of the block that ran last."""
        choices = [number for number in range(len(self._held)) if number != keep]
        return next((number for number in choices if self._held[number] is None), choices[0])


_OFFLOADS: WeakKeyDictionary[nn.Module, ref[BlockOffload]] = WeakKeyDictionary()
"""Network -> its offload, which the hooks of the blocks hold. A reference from here would hold the network, too."""


def offload_in(module: nn.Module) -> BlockOffload | None:
    """Return the offload of a network inside a module, or of the module itself; None if no blocks are offloaded."""
    return next((_OFFLOADS[part]() for part in module.modules() if part in _OFFLOADS), None)


def spread(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """Choose `count` blocks at equal distances, so that a copy has the time of several blocks.

    Raises:
        UserError: there are fewer blocks.
    """
    if count > len(blocks):
        raise UserError(f"offload_blocks is {count}, but the network has {len(blocks)} blocks: use at most that many")
    return [blocks[int((number + 0.5) * len(blocks) / count)] for number in range(count)]


def _frozen_in(block: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Return the frozen parameters of a block by identity, each with its places."""
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.requires_grad:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return found


def _check(blocks: Sequence[nn.Module], weights: Sequence[dict[int, Any]]) -> None:
    seen: set[int] = set()
    for block, found in zip(blocks, weights, strict=True):
        kind = type(block).__name__
        if not found:
            raise UserError(
                f"offload_blocks moves frozen weights, but a {kind} has none: train a LoRA (use_peft: true)"
            )
        for parameter, places in found.values():
            if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
                raise UserError(
                    f"offload_blocks cannot move {places[0][1]} of a {type(places[0][0]).__name__}, which is a"
                    f" {type(parameter).__name__}: use base_quant int4, int8 or fp8, or offload_blocks 0"
                )
        if seen & found.keys():
            raise UserError(f"offload_blocks cannot move a {kind} that shares weights with another block: set it to 0")
        seen |= found.keys()


@torch.no_grad()
def _moved_home(
    block: nn.Module, found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]], pinned: bool
) -> _Home:
    parameters = [parameter for parameter, _ in found.values()]
    sizes = [-(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    starts = [0, *accumulate(sizes)]
    memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    weights = []
    for (parameter, places), start in zip(found.values(), starts, strict=False):
        part = memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        part.copy_(parameter)
        weights.append(_Weight(places=places, home=nn.Parameter(part, requires_grad=False), start=start))
    home = _Home(block=block, memory=memory, weights=weights)
    home.put()
    return home
