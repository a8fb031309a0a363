"""Blocks whose forward is a fused one: a subclass of the block's class, so that hooks, caches and names go on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.families.forwards import rebind_forward, register_block_class

if TYPE_CHECKING:
    from torch import nn

_WANTED = "_postgen_wanted"
"""Attribute of a block: whether the call under way wants the fused forward."""


def check_block(block: nn.Module) -> None:
    """Refuse a block whose forward was replaced in a way that cannot be looked through.

    Raises:
        UserError: what to do instead.
    """
    kind: Any = type(block)
    if not rebind_forward(block, kind.forward, kind.forward):
        raise UserError(
            f"the forward of a {kind.__name__} was replaced (torch.compile of it alone does that): apply the fused"
            " operations first, or use block.compile()"
        )


def fuse_block(block: nn.Module, forward: Callable[..., Any], wanted: Callable[[], bool]) -> None:
    """Let a block compute by another forward in calls that want it, under whatever hooks it has.

    Args:
        block: the block.
        forward: the other forward.
        wanted: asked in every call; it survives deepcopy and pickle.

    Raises:
        UserError: somebody replaced its forward in a way that cannot be looked through; nothing is changed then.
    """
    check_block(block)
    kind: Any = type(block)
    fused = _fused_class(kind, forward)
    # Another thread may be in the model: at no time is the block something that cannot be called.
    block.__dict__[_WANTED] = wanted
    block.__class__ = fused
    rebind_forward(block, kind.forward, fused.forward)


def fused_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that compute by a fused forward, also those that somebody wrapped since.

    Raises:
        UserError: somebody gave one of them another class, which `restore_block` would take away.
    """
    found = [block for block in model.modules() if is_fused(block)]
    for block in found:
        if "postgen_parent" not in vars(type(block)):
            raise UserError(
                f"a block with fused operations has become a {type(block).__name__} (fully_shard does that):"
                " take them off before, or make the model anew"
            )
    return found


def restore_block(block: nn.Module) -> None:
    """Undo `fuse_block`; where somebody replaced the forward since, say that it still ends in the fused one."""
    fused: Any = type(block)
    block.__class__ = fused.postgen_parent
    block.__dict__.pop(_WANTED, None)
    if not rebind_forward(block, fused.forward, fused.postgen_parent.forward):
        warnings.warn(
            f"the forward of a {fused.__name__} was replaced while fused operations were on, and what replaced it may"
            " still call them: delete block.forward",
            stacklevel=2,
        )


def is_fused(block: nn.Module) -> bool:
    """Whether a block computes by a fused forward."""
    return hasattr(type(block), "postgen_stock_forward")


@functools.cache
def _fused_class(parent: Any, forward: Callable[..., Any]) -> Any:
    """Return the subclass of a block's class with this forward; one for each, so compiled code is shared."""

    stock = parent.forward

    @functools.wraps(forward)
    def fused_or_stock(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = self.__dict__.get(_WANTED)
        if wanted is None or not wanted():
            return stock(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    # The class is made at run time, so an object of it is pickled as an object of its parent and made again.
    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _empty, (parent, forward), self.__getstate__()

    body = {
        "forward": fused_or_stock,
        "postgen_stock_forward": stock,
        "postgen_parent": parent,
        "__reduce__": __reduce__,
        "__module__": parent.__module__,
        "__doc__": parent.__doc__,
    }
    # The same name: diffusers compiles blocks and places them on devices by it.
    made = type(parent.__name__, (parent,), body)
    register_block_class(made, parent)
    return made


def _empty(parent: Any, forward: Callable[..., Any]) -> Any:
    kind = _fused_class(parent, forward)
    return kind.__new__(kind)
