"""Settings in the address of the page: `/?prompt=a+red+ball&seed=3` fills the form of Generate, and runs nothing."""

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
"""Gives the numbers that a link does not."""
_WHOLE = ("steps", "width", "height", "frames", "seed")
_NUMBERS = (*_WHOLE, "guidance", "lora_scale")
_OTHERS = ("view", "logs")
"""Words of Gradio and of Spaces; those that begin with an underscore are theirs too."""


def names() -> list[str]:
    """Return what a link may say: the fields of a form but the first frame, a preset, and the options of plug-ins."""
    return [*(name for name in FIELDS if name != "image"), "preset", *(row.option for row in known_plug_ins())]


def form_in(app: App, words: Mapping[str, str]) -> tuple[Form, str | None, bool] | None:
    """Return the form that an address asks for, checked as a call of the API.

    Args:
        app: the server.
        words: of the address, as `gradio.Request.query_params`.

    Returns:
        The form; the preset, where it has all numbers of it; whether the seed is drawn anew. None where the address
        says nothing of a video.

    Raises:
        UserError: the first thing that is wrong.
    """
    known = names()
    if not any(word in known for word in words):
        return None
    for word in words:
        if word not in (*known, *_OTHERS) and not word.startswith("_"):
            raise UserError(f"a link has no {shown(word)}.{did_you_mean(word, known)} It has: {', '.join(known)}")
    preset = words.get("preset", PRESET)
    texts = {row.option: words[row.option] for row in known_plug_ins() if words.get(row.option)}
    values: dict[str, Any] = {name: _value(name, words[name]) for name in FIELDS if words.get(name) and name in known}
    form = Form(**{"model": app.model_names[0], "seed": 0, **values}, plug_ins=texts)
    whole = filled(app, form, preset)
    job_of(app, whole)
    own = any(name in values for name in ("steps", "width", "height", "frames", "guidance"))
    return whole, None if own else preset, "seed" not in values


def link_of(app: App, settings: Mapping[str, Any]) -> str | None:
    """Return the address, from `?` on, that asks for the settings of a sidecar; None where a link cannot.

    A first frame is left out: it is no text.
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
    """Return a number where a field takes one; what is none stays a text, which the form refuses."""
    if name in _NUMBERS:
        with suppress(ValueError):
            return int(text) if name in _WHOLE else float(text)
    return text
