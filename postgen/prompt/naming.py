"""Names of rewriters, as the command line and the drop-in pipelines take them. Light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postgen.errors import UserError, did_you_mean, shown
from postgen.own_code import names_own_code

DEFAULT = "template"
"""Name of the rewriter that needs no model."""
FORMS = "template, smollm2, chat:MODEL, api:MODEL[@URL], module:name or file.py:name"
"""Forms of a name, for help and messages."""


def check_rewriter(name: str) -> None:
    """Check the name of a rewriter without loading a model.

    Raises:
        UserError: the name is unknown; a folder, package or key is missing; or an address is wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "template":
        return
    if name == "smollm2":
        from postgen.prompt.smollm import check_smollm2

        check_smollm2()
    elif kind == "chat":
        from postgen.prompt.chat import check_chat_model

        check_chat_model(_needed(rest, name))
    elif kind == "api":
        _api(_needed(rest, name))
    elif names_own_code(name) or ".py" in name:
        _own(name)
    else:
        hint = did_you_mean(name, ("template", "smollm2"))
        raise UserError(f"there is no prompt enhancer {shown(name)}.{hint} Known: {FORMS}")


def get_rewriter(name: str, *, device: str = "auto") -> Any:
    """Return the rewriter of a name.

    Args:
        name: `template`; `smollm2`, the language model of a Python package; `chat:MODEL` with a folder or Hub id of
            transformers; `api:MODEL@URL` for a server with the interface of OpenAI (without URL: that of
            `OPENAI_BASE_URL`); or your own object: `module:name` or `file.py:name`, a `Rewriter`, or a function
            from a list of prompts to a list of prompts.
        device: device of a chat model.

    Raises:
        UserError: as `check_rewriter`; or the model cannot be loaded.
    """
    check_rewriter(name)
    kind, _, rest = name.partition(":")
    if name == "template":
        from postgen.prompt.templates import TemplateRewriter

        return TemplateRewriter()
    if name == "smollm2":
        from postgen.prompt.smollm import smollm2

        return smollm2()
    if kind == "chat":
        from postgen.prompt.chat import ChatRewriter

        return ChatRewriter(rest, device=device)
    return _api(rest) if kind == "api" else _own(name)


def portable_name(name: str) -> str:
    """Return a name whose paths are absolute, for a sidecar."""
    kind, _, rest = name.partition(":")
    if kind == "chat" and Path(rest).expanduser().exists():
        return f"chat:{Path(rest).expanduser().resolve()}"
    file, colon, function = name.rpartition(":")
    if file.endswith(".py") and Path(file).expanduser().is_file():
        return f"{Path(file).expanduser().resolve()}{colon}{function}"
    return name


def name_without_place(name: str) -> str:
    """Return a name without folders of this machine and without the address of a server, for a shared file."""
    kind, _, rest = name.partition(":")
    if kind == "api":
        return f"api:{rest.partition('@')[0]}"
    if kind == "chat" and Path(rest).is_absolute():
        return f"chat:{Path(rest).name}"
    return Path(name).name if Path(name).is_absolute() else name


def _needed(rest: str, name: str) -> str:
    if not rest.strip():
        raise UserError(f"the prompt enhancer {shown(name)} names no model. Known: {FORMS}")
    return rest


def _api(rest: str) -> Any:
    from postgen.prompt.openai_api import ApiRewriter

    model, at, url = rest.partition("@")
    if at and not url.strip():
        raise UserError(f"the prompt enhancer api:{rest} names no address after @. Known: {FORMS}")
    return ApiRewriter(model, url or None)


def _own(name: str) -> Any:
    from postgen.own_code import own_function
    from postgen.prompt.own import as_rewriter

    return as_rewriter(own_function(name, "the prompt enhancer"), name)
