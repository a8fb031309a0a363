"""Whether all weights of a model are in its files: what is missing is left empty or drawn at random by the loaders."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from postgen.errors import UserError

from .lora_layers import shortened

_MISSING = re.compile(r"^(\S+)\s*\|\s*(?:\x1b\[[\d;]*m)?MISSING", re.MULTILINE)


@contextmanager
def random_weights_told(source: str) -> Iterator[None]:
    """Warn of weights that transformers draws at random, which it says in a report that is muted elsewhere.

    Args:
        source: what is loaded.
    """
    missing: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            missing.extend(_MISSING.findall(record.getMessage()))

    logger, listener = logging.getLogger("transformers.modeling_utils"), Listener()
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
    if missing:
        warnings.warn(
            f"{source} lacks {len(missing)} weights of its text encoders, which are random now: {shortened(missing)}."
            " Is the download complete?",
            stacklevel=3,
        )


def check_whole(pipe: Any, source: str) -> None:
    """Look for weights that diffusers has left empty.

    Raises:
        UserError: there are some.
    """
    for name, module in pipe.components.items():
        if not hasattr(module, "named_parameters"):
            continue
        if empty := [key for key, value in module.named_parameters() if value.is_meta]:
            raise UserError(f"{source} is not complete: {name} lacks {len(empty)} weights, {shortened(empty)}")
