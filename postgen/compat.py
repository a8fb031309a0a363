"""The only file that touches private symbols of diffusers, accelerate, peft, typer and the like.

Light to import: every library is imported inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """Return the diffusers model inside DDP, FSDP, DeepSpeed, `torch.compile` and peft wrappers."""
    from accelerate.utils import extract_model_from_parallel

    inner: nn.Module = extract_model_from_parallel(module, keep_fp32_wrapper=True)
    inner = getattr(inner, "_orig_mod", inner)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


def command_error(error: BaseException) -> tuple[str, int] | None:
    """Return message and exit code of an error of the command line itself (unknown option, bad value), else None.

    Newer typer carries its own copy of click, older typer uses the click package: both mark such errors alike.
    """
    text, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    return (str(text()), code) if callable(text) and isinstance(code, int) else None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from writing progress bars and notices while a model is loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: list[Any] = [diffusers_logging, transformers_logging]
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggers]
    for logging in loggers:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, (verbosity, bars) in zip(loggers, before, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def execution_device(pipe: Any) -> torch.device:
    """Return the device that a pipeline computes on, also when offloading keeps its parts elsewhere."""
    place: torch.device = pipe._execution_device
    return place
