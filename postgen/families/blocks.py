"""The repeated blocks of a model in running order, and which arguments and outputs carry the latents and the text.

A layout row names the blocks that process the latents. It does not name blocks that process only the text (text
encoders and refiners). `postgen.families.recording` records the inputs and outputs of blocks and runs single blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGroup:
    """Blocks of one kind, which run one after another: one entry of a layout row."""

    names: str
    """Regular expression that matches the full names of the modules."""
    hidden: str = "hidden_states"
    """Argument of the block's `forward` that carries the latents."""
    text: str | None = "encoder_hidden_states"
    """Argument that carries the text. A block takes no text if this is None, or if its `forward` has no such name."""
    hidden_out: int | None = None
    """Position of the latents in the output tuple of a block; None if the block returns only the latents."""
    text_out: int | None = None
    """Position of the text in the output tuple; None if a block returns no text. The next block then receives the same
    text."""
    breaks: str = ""
    """What the blocks of this group exchange besides latents and text; empty if nothing, so that they are a chain."""
    enters: str = ""
    """What the first block receives besides the output of the previous group; empty if nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One repeated block of one model."""

    name: str
    """Name in `named_modules()` of the transformer."""
    module: nn.Module
    hidden: str
    """Argument that carries the latents."""
    text: str | None
    """Argument that carries the text; None if the block takes no text."""
    hidden_out: int | None
    """Position of the latents in the output tuple; None if the output is the latents."""
    text_out: int | None
    """Position of the text in the output tuple; None if the block returns no text."""
    follows: bool
    """Whether the block receives exactly the output of the previous block: the latents, and the text if the previous
    block returns it. Nothing else passes between the two. False for the first block."""

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the latents and the text of a call of the block.

        The text is None if the block takes no text or the call has none.

        Raises:
            UserError: the call has no latents, or a wrapper hides the arguments of the block.
        """
        hidden = self._found(self.hidden, args, kwargs)
        text = None if self.text is None else self._found(self.text, args, kwargs, needed=False)
        return hidden, text

    def outputs(self, output: Any) -> tuple[Any, Any]:
        """Return the latents and the text of an output of the block; the text is None if the block returns none."""
        hidden = output if self.hidden_out is None else output[self.hidden_out]
        return hidden, None if self.text_out is None else output[self.text_out]

    def fed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Any = None, text: Any = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with other latents and another text.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            hidden: new latents; None keeps those of the call.
            text: new text; None keeps that of the call.

        Raises:
            UserError: a wrapper hides the arguments of the block.
        """
        changed, named = list(args), dict(kwargs)
        for name, value in ((self.hidden, hidden), (self.text, text)):
            if name is None or value is None:
                continue
            if name in named or self._place(name) >= len(changed):
                named[name] = value
            else:
                changed[self._place(name)] = value
        return tuple(changed), named

    def _found(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, needed: bool = True) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = self._place(name)
        if place < len(args):
            return args[place]
        if needed:
            raise UserError(
                f"block {self.name} was called without {name}: its layout row is out of date, update the row"
            )
        return None

    def _place(self, name: str) -> int:
        kind: Any = type(self.module)
        names = _parameters(kind)
        if name not in names:
            raise UserError(
                f"the forward of {self.name}, a {kind.__name__}, has no argument {name}: remove the wrapper"
                " from the block, or update its layout row"
            )
        return names.index(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of a transformer class: a field of its layout row (`Layout.blocks`)."""

    groups: tuple[BlockGroup, ...]
    """The groups, in the order in which they run."""
    interleaved: bool = False
    """True if one block of each group runs in turn; False if the groups run one after the other."""

    @property
    def chain(self) -> bool:
        """Whether every block receives exactly the output of the previous block and nothing else passes between them.

        Residuals of a ControlNet, which some models add between their blocks, do not count.
        """
        return not self.broken

    @property
    def broken(self) -> tuple[str, ...]:
        """Reasons why the blocks are no chain; empty if they are a chain."""
        reasons = (reason for group in self.groups for reason in (group.enters, group.breaks) if reason)
        return tuple(dict.fromkeys(reasons))

    def find(self, transformer: nn.Module) -> tuple[Block, ...]:
        """Return the blocks of a transformer in the order in which they run.

        Args:
            transformer: the transformer, without a wrapper (DDP, compiled, peft).

        Raises:
            UserError: no module matches the patterns, so the model's structure differs from the layout row.
        """
        named = dict(transformer.named_modules())
        found = [[name for name in named if re.fullmatch(group.names, name)] for group in self.groups]
        if not any(found):
            patterns = ", ".join(repr(group.names) for group in self.groups)
            raise UserError(
                f"{type(transformer).__name__} has no blocks named {patterns}: its layout row is out of date,"
                " update the row"
            )
        made = [
            [
                _block(group, name, named[name], follows=not (group.breaks if place else group.enters))
                for place, name in enumerate(names)
            ]
            for group, names in zip(self.groups, found, strict=True)
        ]
        turns = zip_longest(*made) if self.interleaved else made
        first, *others = (block for block in chain.from_iterable(turns) if block is not None)
        return dataclasses.replace(first, follows=False), *others


def _block(group: BlockGroup, name: str, module: nn.Module, *, follows: bool) -> Block:
    kind: Any = type(module)
    known = _parameters(kind)
    # A wrapper with `*args, **kwargs` hides the names; the block may then take the text.
    takes_text = group.text in known or group.hidden not in known
    return Block(
        name=name,
        module=module,
        hidden=group.hidden,
        text=group.text if takes_text else None,
        hidden_out=group.hidden_out,
        text_out=group.text_out,
        follows=follows,
    )


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """Return the parameter names of the `forward` of a class, without self; hooks may replace that of an instance."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
