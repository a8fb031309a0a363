"""Whether all weights of a model are in its files: what is missing is left empty or drawn at random by the loaders."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from postgen.errors import UserError

from .lora_layers import shortened

_FOREIGN = re.compile(r"^(\S+)\s*\|\s*(?:\x1b\[[\d;]*m)?UNEXPECTED", re.MULTILINE)
_MISSING = re.compile(r"^(\S+)\s*\|\s*(?:\x1b\[[\d;]*m)?MISSING", re.MULTILINE)


@contextmanager
def foreign_weights_refused(source: str) -> Iterator[None]:
    """Refuse files with tensors that the network they are for does not have, which diffusers leaves out.

    Raises:
        UserError: some belong to modules of the network, as a further block does that its configuration lacks.
    """
    found: list[tuple[str, str]] = []
    pattern = re.compile(r"were not used when initializing (\w+): \s*\[(['\"])(.*)\2\]", re.DOTALL)
    with _heard(
        "diffusers.models.modeling_utils", lambda text: found.extend((m[1], m[3]) for m in pattern.finditer(text))
    ):
        yield
    for network, names in found:
        more = names.split(", ")
        # One that stands alone, as a table that the class makes itself, is left out by design.
        if blocks := [name for name in more if re.search(r"\.\d+\.", f".{name}")]:
            raise UserError(
                f"{source}: its files hold {len(blocks)} tensors of blocks that the configuration of its {network}"
                f" lacks, {shortened(blocks)}: is its config.json that of another model?"
            )


@contextmanager
def random_weights_told(source: str) -> Iterator[None]:
    """Warn of weights that transformers draws at random, which it says in a report that is muted elsewhere.

    Args:
        source: what is loaded.
    """
    missing: list[str] = []

    foreign: list[str] = []

    def hear(text: str) -> None:
        missing.extend(_MISSING.findall(text))
        foreign.extend(_FOREIGN.findall(text))

    with _heard("transformers.modeling_utils", hear):
        yield
    if missing and foreign:
        raise UserError(
            f"text_encoder of {source} is of another class than its files: {len(missing)} weights are missing, as"
            f" {shortened(missing[:1])}, and {len(foreign)} are of another network, as {shortened(foreign[:1])}"
        )
    if missing:
        warnings.warn(
            f"{source} lacks {len(missing)} weights of its text encoders, which are random now: {shortened(missing)}."
            " Is the download complete?",
            stacklevel=3,
        )


def check_whole(pipe: Any, source: str) -> None:
    """Look for weights that diffusers has left empty, and for such that are no numbers.

    Raises:
        UserError: there are some.
    """
    for name, module in pipe.components.items():
        if not hasattr(module, "named_parameters"):
            continue
        if empty := [key for key, value in module.named_parameters() if value.is_meta]:
            raise UserError(f"{source} is not complete: {name} lacks {len(empty)} weights, {shortened(empty)}")
        if bad := [key for key, value in module.named_parameters() if not _finite(value)]:
            raise UserError(f"{source} is damaged: NaN or infinity in {len(bad)} weights of {name}, {shortened(bad)}")


def _finite(value: Tensor) -> bool:
    """Whether all numbers are; those of 8 bits are quantised."""
    if value.numel() == 0 or value.itemsize == 1:
        return True
    low, high = value.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


@contextmanager
def _heard(name: str, hear: Callable[[str], object]) -> Iterator[None]:
    """Hand every message of a logger to a function, also where warnings are muted."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    logger, listener = logging.getLogger(name), Listener()
    level, propagate = logger.level, logger.propagate
    logger.propagate = propagate and logger.isEnabledFor(logging.WARNING)
    logger.setLevel(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
