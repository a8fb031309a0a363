"""Checks that the files of a model have all its weights; diffusers and transformers load incomplete files silently.

diffusers leaves missing weights on the meta device, and transformers initialises them at random.
"""

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
    """Refuse files with tensors of blocks that the network lacks; diffusers would ignore these tensors.

    Args:
        source: model that is loaded, for the error message.

    Raises:
        UserError: the files have tensors of blocks that the network's config lacks.
    """
    found: list[tuple[str, str]] = []
    pattern = re.compile(r"were not used when initializing (\w+): \s*\[(['\"])(.*)\2\]", re.DOTALL)
    with _heard(
        "diffusers.models.modeling_utils", lambda text: found.extend((m[1], m[3]) for m in pattern.finditer(text))
    ):
        yield
    for network, names in found:
        more = names.split(", ")
        # Surplus tensors outside the blocks, such as tables that the class computes itself, are ignored by design.
        if blocks := [name for name in more if re.search(r"\.\d+\.", f".{name}")]:
            raise UserError(
                f"{source}: its files have {len(blocks)} tensors of blocks that the config of its {network} lacks,"
                f" {shortened(blocks)}: check whether config.json belongs to another model"
            )


@contextmanager
def random_weights_told(source: str) -> Iterator[None]:
    """Warn if transformers initialises missing weights at random; its own report of this may be muted.

    Args:
        source: model that is loaded, for the messages.

    Raises:
        UserError: weights are missing and others are surplus: the files are those of another class.
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
            f"the class of text_encoder in {source} does not match its files: {len(missing)} weights are missing, such"
            f" as {shortened(missing[:1])}, and {len(foreign)} belong to another network, such as"
            f" {shortened(foreign[:1])}"
        )
    if missing:
        warnings.warn(
            f"{source} lacks {len(missing)} weights of its text encoders, which are random: {shortened(missing)}."
            " Check whether the download is complete",
            stacklevel=3,
        )


def check_whole(pipe: Any, source: str) -> None:
    """Check that all weights of a pipeline were loaded and are finite.

    Args:
        pipe: the loaded pipeline.
        source: model that was loaded, for the error message.

    Raises:
        UserError: weights are missing (on the meta device), NaN or infinite.
    """
    for name, module in pipe.components.items():
        if not hasattr(module, "named_parameters"):
            continue
        if empty := [key for key, value in module.named_parameters() if value.is_meta]:
            raise UserError(
                f"{source} is not complete: {name} lacks {len(empty)} weights, {shortened(empty)}: download it again"
            )
        if bad := [key for key, value in module.named_parameters() if not _finite(value)]:
            raise UserError(
                f"{source} is damaged: NaN or infinity in {len(bad)} weights of {name}, {shortened(bad)}: use an"
                " undamaged copy"
            )


def _finite(value: Tensor) -> bool:
    """Whether all elements are finite. Tensors with 8-bit elements are quantised and not checked."""
    if value.numel() == 0 or value.itemsize == 1:
        return True
    low, high = value.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


@contextmanager
def _heard(name: str, hear: Callable[[str], object]) -> Iterator[None]:
    """Pass every message of a logger to a function, even if its warnings are muted."""

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
