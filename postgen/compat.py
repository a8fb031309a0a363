"""The only file that touches private symbols of diffusers, accelerate, peft, typer and the like.

Light to import: every library is imported inside the function that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def quiet_libraries() -> None:
    """Switch off the progress bars and notices that diffusers and transformers write while they load a model."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
