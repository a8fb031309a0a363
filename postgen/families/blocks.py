"""The repeated blocks of a model in the order in which they run, and which of their arguments and outputs carry what.

A row names the blocks that the latents pass. Blocks that see the text alone (encoders and refiners of it) are not
among them. To record what goes in and out of a block, and to run one alone, see `postgen.families.recording`.
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
    """Blocks of one kind, which run one after another: one entry of a row."""

    names: str
    """Pattern that the names of the modules match in full."""
    hidden: str = "hidden_states"
    """Argument of their forward that carries the latents."""
    text: str | None = "encoder_hidden_states"
    """Argument that carries the text; None, or a name that a block's forward does not have: it takes none."""
    hidden_out: int | None = None
    """Position of the latents among what a block returns; None: it returns nothing else."""
    text_out: int | None = None
    """Position of the text among what a block returns; None: it returns no text, and the next one takes the same."""
    breaks: str = ""
    """What passes from block to block of this group beside the two; empty: nothing, they are a chain."""
    enters: str = ""
    """What the first of them takes beside what the group before returned; empty: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One repeated block of one model."""

    name: str
    """As `named_modules` has it."""
    module: nn.Module
    hidden: str
    """Argument that carries the latents."""
    text: str | None
    """Argument that carries the text; None: it takes none."""
    hidden_out: int | None
    """Position of the latents in the output; None: the output is the latents."""
    text_out: int | None
    """Position of the text in the output; None: it returns no text."""
    follows: bool
    """Whether it takes just what the block before returned, latents and (where that one returns it) text, and nothing
    else passes between the two. False for the first block."""

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return latents and text of a call of the block; the text is None where it takes none or was given none.

        Raises:
            UserError: the block was given no latents, or a wrapper hides its arguments.
        """
        hidden = self._found(self.hidden, args, kwargs)
        text = None if self.text is None else self._found(self.text, args, kwargs, needed=False)
        return hidden, text

    def outputs(self, output: Any) -> tuple[Any, Any]:
        """Return latents and text of what the block returned; the text is None where it returns none."""
        hidden = output if self.hidden_out is None else output[self.hidden_out]
        return hidden, None if self.text_out is None else output[self.text_out]

    def fed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Any = None, text: Any = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with other latents and another text; None leaves what there is.

        Raises:
            UserError: a wrapper hides its arguments.
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
            raise UserError(f"block {self.name} was called without {name}: its layout row is out of date")
        return None

    def _place(self, name: str) -> int:
        kind: Any = type(self.module)
        names = _parameters(kind)
        if name not in names:
            raise UserError(
                f"the forward of {self.name}, a {kind.__name__}, has no argument {name}: take the wrapper"
                " off the block, or bring its layout row up to date"
            )
        return names.index(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of a transformer class, as a row of `Layout` has them."""

    groups: tuple[BlockGroup, ...]
    """In the order in which they run."""
    interleaved: bool = False
    """One block of each group in turn, instead of one group after the other."""

    @property
    def chain(self) -> bool:
        """Whether every block takes what the one before returned and nothing else passes between them.

        Holds for calls without residuals of a control network, which some models add between their blocks.
        """
        return not self.broken

    @property
    def broken(self) -> tuple[str, ...]:
        """Say what keeps the blocks from being a chain; nothing where they are one."""
        reasons = (reason for group in self.groups for reason in (group.enters, group.breaks) if reason)
        return tuple(dict.fromkeys(reasons))

    def find(self, transformer: nn.Module) -> tuple[Block, ...]:
        """Return the blocks of a transformer (no wrapper around it), in the order in which they run.

        Raises:
            UserError: none matches; the model's structure is not what the row says.
        """
        named = dict(transformer.named_modules())
        found = [[name for name in named if re.fullmatch(group.names, name)] for group in self.groups]
        if not any(found):
            patterns = ", ".join(repr(group.names) for group in self.groups)
            raise UserError(
                f"{type(transformer).__name__} has no blocks named {patterns}: its layout row is out of date"
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
    # A wrapper that takes anything does not tell.
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
    """Names of the parameters of a class's own forward, without self: hooks replace that of an instance."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
