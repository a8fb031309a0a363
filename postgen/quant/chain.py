"""The inputs of each block in a quantised model: the outputs of the quantised blocks before it.

Records hold what the exact model computed. While blocks are quantised one after the other, a chain keeps for each
record what the finished blocks make of it, and the next block is trained on that. Errors of earlier blocks therefore
reach later blocks, which can compensate them.

Nothing of a chain is written to disk: after a resume, it is computed again from the finished blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families import Block
from postgen.families.recording import RecordedCall
from postgen.reconstruct import Call, Records

Key = tuple[bool, int]
"""Whether a call is of a held-out record, and its place in `Records.calls`."""


@dataclass(frozen=True, slots=True)
class ChainedCall(RecordedCall):
    """A recorded call of a block, with the inputs of the quantised model and the output of the exact one."""

    chain: Chain
    number: int
    """Number of the block in the chain."""
    key: Key

    def inputs(self, device: torch.device | str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call in the quantised model."""
        args, kwargs = RecordedCall.inputs(self, device)
        return self.chain.fed(self.number, self.key, args, kwargs)


class Chain:
    """The inputs of the blocks of one model, see the module docstring.

    Args:
        blocks: the blocks in running order, from `blocks_of`.
        records: records of all of them.
        finished: number of a block -> its quantised form, on `device`, for inference.
        device: device of the computation.
        half: whether the blocks run under bfloat16 autocast.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        records: Records,
        finished: Callable[[int], nn.Module],
        device: torch.device,
        *,
        half: bool = False,
    ) -> None:
        self.blocks, self.records, self.device, self.half = list(blocks), records, device, half
        self._finished, self._at = finished, 0
        self._inputs: dict[Key, tuple[Tensor, Tensor | None]] = {}

    def calls(self, number: int, *, held_out: bool) -> list[ChainedCall]:
        """Return the calls of a block, in the order of `Records.calls`. Their inputs can be read after `reach`."""
        found = self.records.calls([self.blocks[number].name], held_out=held_out)
        return [
            ChainedCall(call.spec, call.store, self, number, (held_out, place)) for place, (call,) in enumerate(found)
        ]

    @torch.no_grad()
    def reach(self, number: int) -> None:
        """Compute the inputs of a block. The blocks before it must be finished. Earlier inputs are dropped."""
        assert number >= self._at, "a chain only moves forwards"
        while self._at < number:
            found = self._outputs(self._at) if self._passes(self._at) else {}
            self._at, self._inputs = self._at + 1, found

    def fed(
        self, number: int, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the recorded arguments of a block with the latents and the text of the quantised model."""
        assert number == self._at, "reach the block first"
        if key not in self._inputs:
            return args, dict(kwargs)
        hidden, text = self._inputs[key]
        return self.blocks[number].fed(
            args, kwargs, hidden.to(self.device), None if text is None else text.to(self.device)
        )

    def _passes(self, number: int) -> bool:
        """Whether the next block receives the outputs of this one."""
        return number + 1 < len(self.blocks) and self.blocks[number + 1].follows

    def _outputs(self, number: int) -> dict[Key, tuple[Tensor, Tensor | None]]:
        block, student, found = self.blocks[number], self._finished(number), {}
        dtype = block.outputs(self.calls(number, held_out=True)[0].output())[0].dtype
        for held_out in (False, True):
            for recorded in self.calls(number, held_out=held_out):
                hidden, text = self.run(block, student, recorded)
                # A block that returns no text leaves the recorded text to the next one.
                found[recorded.key] = hidden.to("cpu", dtype), None if text is None else text.to("cpu", dtype)
        return found

    def run(self, block: Block, student: nn.Module, recorded: ChainedCall) -> tuple[Tensor, Tensor | None]:
        """Run a form of a block on the inputs of a call, and return its latents and its text."""
        args, kwargs = Call(recorded, self.device, widen=not self.half).inputs()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            hidden, text = block.outputs(student(*args, **kwargs))
        return hidden, text


class ChainedRecords(Records):
    """Records of the exact model whose calls have the inputs of a chain.

    Args:
        chain: the chain.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__(chain.records.plan, {})
        self._chain = chain
        self._numbers = {block.name: number for number, block in enumerate(chain.blocks)}

    def calls(self, modules: Sequence[str], *, held_out: bool) -> list[tuple[RecordedCall, ...]]:
        """Return the calls of one block, see `Records.calls`."""
        (name,) = modules
        return [(call,) for call in self._chain.calls(self._numbers[name], held_out=held_out)]
