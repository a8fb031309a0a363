"""Controls of the page that are made from tables: presets from a model's own defaults, plug-ins from their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgen.errors import UserError
from postgen.families.loading import ModelFacts
from postgen.plug_ins import PlugIn, known_plug_ins

OFF = "off"
"""What a control says of a plug-in that is not used."""
CUSTOM = "custom"
"""Name of the preset that is none: the numbers are the user's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The numbers that cost time, all of one model. None leaves a number to the pipeline."""

    name: str
    steps: int | None
    width: int | None
    height: int | None
    frames: int | None
    guidance: float | None


_SHARES = {"draft": (0.4, 0.5), "balanced": (0.7, 1.0), "quality": (1.0, 1.0)}
"""Of the model's own steps, and of its own pixels where a picture has many."""
_MANY = 256 * 256
"""Pixels of a picture: models made for fewer make no good smaller ones, and are quick anyway."""


def presets(facts: ModelFacts) -> dict[str, Preset]:
    """Return the presets of a model by name: draft, balanced and quality, which is the model's own defaults.

    balanced takes 0.7 of its steps and draft 0.4; draft also makes a picture of half the pixels where the model's has
    more than 256 x 256. Frames and guidance are the model's. No preset has fewer steps than its schedule needs.
    """
    return {name: _preset(name, facts, *share) for name, share in _SHARES.items()}


def _preset(name: str, facts: ModelFacts, of_steps: float, of_pixels: float) -> Preset:
    steps, width, height = (facts.default(n) for n in ("num_inference_steps", "width", "height"))
    if steps is not None:
        steps = max(facts.least_steps, round(steps * of_steps))
    if of_pixels < 1 and width and height and facts.multiples and width * height > _MANY:
        height, width = (
            max(each, round(side * of_pixels**0.5 / each) * each)
            for side, each in zip((height, width), facts.multiples, strict=False)
        )
    frames, guidance = facts.default("num_frames"), facts.default("guidance_scale")
    return Preset(name=name, steps=steps, width=width, height=height, frames=frames, guidance=guidance)


def plug_in_controls(prefix: str = "plug-in") -> list[Any]:
    """Build a control for each row of the table of plug-ins, inside the open layout; a new row appears by itself.

    Args:
        prefix: begins the ids of their elements, of which a page has each once.

    Returns:
        Components in the order of the table. Their values together are what `plug_in_texts` takes.
    """
    import gradio as gr

    return [
        gr.Dropdown(
            choices=[OFF, *words_of(row)],
            value=OFF,
            label=row.title,
            info=row.summary.partition(": ")[2].capitalize() or row.summary,
            allow_custom_value=True,
            filterable=True,
            elem_id=f"{prefix}-{row.option}",
        )
        for row in known_plug_ins()
    ]


def words_of(row: PlugIn) -> list[str]:
    """Return the words that a row's option takes as they stand, which its metavar has in lower case.

    >>> words_of(known_plug_ins()[-1])
    ['auto']
    """
    return re.findall(r"[a-z][a-z_]*", re.sub(r"[A-Z][A-Za-z_]*", "", row.metavar))


def plug_in_texts(values: Sequence[Any]) -> dict[str, str]:
    """Return what `GenerateConfig.plug_ins` takes, from the values of the controls; what is off is left out.

    Raises:
        UserError: another number of values than there are plug-ins, or one that is no text.
    """
    rows = known_plug_ins()
    if len(values) != len(rows):
        raise UserError("plug-ins were registered after the page was made: start the app anew")
    texts = {}
    for row, value in zip(rows, values, strict=True):
        text = value.strip() if isinstance(value, str) else value
        if text in (None, "", OFF):
            continue
        if not isinstance(text, str):
            raise UserError(f"{row.title} takes a text, {row.metavar}")
        texts[row.option] = text
    return texts


def plug_in_values(texts: Mapping[str, Any]) -> list[str]:
    """Return the values of the controls for settings that have texts of plug-ins under their options."""
    return [str(texts.get(row.option) or OFF) for row in known_plug_ins()]
