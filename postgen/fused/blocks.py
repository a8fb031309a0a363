"""Blocks with a fused forward: the block becomes a subclass of its class, so hooks, caches and names still work."""

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
"""Attribute of a block: a function that returns whether the current call uses the fused forward."""


def check_block(block: nn.Module) -> None:
    """Check that the forward of a block can be replaced below its hooks.

    Raises:
        UserError: other code replaced the forward in a way that hides the original function.
    """
    kind: Any = type(block)
    if not rebind_forward(block, kind.forward, kind.forward):
        raise UserError(
            f"the forward of a {kind.__name__} was replaced (torch.compile(block) does that): apply the fused"
            " operations before, or use block.compile()"
        )


def fuse_block(block: nn.Module, forward: Callable[..., Any], wanted: Callable[[], bool]) -> None:
    """Make a block use a fused forward in the calls that select it; its hooks stay around the forward.

    Args:
        block: the block.
        forward: the fused forward, with the arguments of the block's own forward.
        wanted: a function that every call runs; it returns whether this call uses the fused forward. It must survive
            deepcopy and pickle.

    Raises:
        UserError: other code replaced the forward of the block (see `check_block`); nothing is changed then.
    """
    check_block(block)
    kind: Any = type(block)
    fused = _fused_class(kind, forward)
    # In this order another thread can call the block at any moment.
    block.__dict__[_WANTED] = wanted
    block.__class__ = fused
    rebind_forward(block, kind.forward, fused.forward)


def fused_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that have a fused forward, including blocks that were wrapped afterwards.

    Raises:
        UserError: other code changed the class of such a block, and `restore_block` would undo that change too.
    """
    found = [block for block in model.modules() if is_fused(block)]
    for block in found:
        if "postgen_parent" not in vars(type(block)):
            raise UserError(
                f"the class of a block with fused operations was changed to {type(block).__name__} (fully_shard does"
                " that): remove the fused operations before that change, or load the model again"
            )
    return found


def restore_block(block: nn.Module) -> None:
    """Undo `fuse_block`; warn if other code replaced the forward meanwhile, as it may still call the fused forward."""
    fused: Any = type(block)
    block.__class__ = fused.postgen_parent
    block.__dict__.pop(_WANTED, None)
    if not rebind_forward(block, fused.forward, fused.postgen_parent.forward):
        warnings.warn(
            f"the forward of a {fused.__name__} was replaced while fused operations were on, and the replacement may"
            " still call the fused forward: delete block.forward",
            stacklevel=2,
        )


def is_fused(block: nn.Module) -> bool:
    """Return whether a block has a fused forward."""
    return hasattr(type(block), "postgen_stock_forward")


@functools.cache
def _fused_class(parent: Any, forward: Callable[..., Any]) -> Any:
    """Return the subclass of a block class with this forward; it is cached, so that blocks share compiled code."""

    stock = parent.forward

    @functools.wraps(forward)
    def fused_or_stock(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = self.__dict__.get(_WANTED)
        if wanted is None or not wanted():
            return stock(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    # torch.compile counts recompilations by code object. If all classes shared one, a model with two classes of blocks
    # would reach the limit with half as many variants of each (strides of the first block, exact and FP8 steps).
    own: Any = fused_or_stock
    own.__code__ = own.__code__.replace(co_name=f"fused_{parent.__name__}")

    # The class is made at run time and cannot be imported, so pickle stores its parent and forward and makes it again.
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
    # The subclass has the name of its parent, because diffusers finds blocks to compile and to place by class name.
    made = type(parent.__name__, (parent,), body)
    register_block_class(made, parent)
    return made


def _empty(parent: Any, forward: Callable[..., Any]) -> Any:
    kind = _fused_class(parent, forward)
    return kind.__new__(kind)
