"""Settings in the address of the page: `/?prompt=a+red+ball&seed=3` fills the Generate form and starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from postgen.apps.making import FIELDS, Form, filled, form_of, job_of
from postgen.apps.state import App
from postgen.errors import UserError, did_you_mean, shown
from postgen.plug_ins import known_plug_ins

PRESET = "balanced"
"""Default preset of a link; it sets the numbers that the link does not contain."""
_WHOLE = ("steps", "width", "height", "frames", "seed")
_NUMBERS = (*_WHOLE, "guidance", "lora_scale")
_OTHERS = ("view", "logs")
"""Query parameters of Gradio and Spaces; names that begin with an underscore are also theirs."""


def names() -> list[str]:
    """Return the parameters of a link: all fields of a form except the first frame, `preset`, and plug-in options."""
    return [*(name for name in FIELDS if name != "image"), "preset", *(row.option for row in known_plug_ins())]


def form_in(app: App, words: Mapping[str, str]) -> tuple[Form, str | None, bool] | None:
    """Return the form for the query parameters of an address, with the same checks as a call of `/generate`.

    Args:
        app: the server.
        words: query parameters, as in `gradio.Request.query_params`.

    Returns:
        The form; the preset if all numbers come from it, otherwise None; whether each video gets a new seed. None
        without any parameter of a video.

    Raises:
        UserError: a parameter is invalid; the message is about the first one.
    """
    known = names()
    if not any(word in known for word in words):
        return None
    for word in words:
        if word not in (*known, *_OTHERS) and not word.startswith("_"):
            raise UserError(f"unknown parameter {shown(word)}.{did_you_mean(word, known)} Known: {', '.join(known)}")
    preset = words.get("preset", PRESET)
    texts = {row.option: words[row.option] for row in known_plug_ins() if words.get(row.option)}
    values: dict[str, Any] = {name: _value(name, words[name]) for name in FIELDS if words.get(name) and name in known}
    form = Form(**{"model": app.model_names[0], "seed": 0, **values}, plug_ins=texts)
    whole = filled(app, form, preset)
    job_of(app, whole)
    own = any(name in values for name in ("steps", "width", "height", "frames", "guidance"))
    return whole, None if own else preset, "seed" not in values


def link_of(app: App, settings: Mapping[str, Any]) -> str | None:
    """Return a link (from `?` on) for the settings of a sidecar; None if the server cannot provide all of them.

    The link leaves out a first frame, which cannot be part of an address.
    """
    try:
        form, missing = form_of(app, settings)
    except UserError:
        return None
    if missing:
        return None
    words = {name: getattr(form, name) for name in FIELDS if name != "image"} | dict(form.plug_ins)
    if form.model == app.model_names[0]:
        del words["model"]
    if not form.lora:
        del words["lora_scale"]
    return "?" + urlencode({name: value for name, value in words.items() if value not in (None, "")})


def _value(name: str, text: str) -> Any:
    """Return the number in a text for fields that take numbers; other texts stay texts, and the form refuses them."""
    if name in _NUMBERS:
        with suppress(ValueError):
            return int(text) if name in _WHOLE else float(text)
    return text
