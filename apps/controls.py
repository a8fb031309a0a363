"""Controls of the page that are built from data: presets from the defaults of a model, plug-ins from their table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgen.errors import UserError, shown
from postgen.families.loading import ModelFacts
from postgen.plug_ins import PlugIn, known_plug_ins

OFF = "off"
"""Value of a control for a plug-in that is off."""
CUSTOM = "custom"
"""Name for numbers that the user chose instead of a preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Numbers of one model that determine speed and quality. None uses the default of the pipeline."""

    name: str
    steps: int | None
    width: int | None
    height: int | None
    frames: int | None
    guidance: float | None


_SHARES = {"draft": (0.4, 0.5), "balanced": (0.7, 1.0), "quality": (1.0, 1.0)}
"""Preset -> its share of the model's default steps, and of the default pixels if a frame has more than `_MANY`."""
_MANY = 256 * 256
"""Pixels per frame up to which `draft` keeps the size: such models are fast, and make poor videos at smaller sizes."""


def presets(facts: ModelFacts) -> dict[str, Preset]:
    """Return the presets of a model by name: draft, balanced and quality.

    quality has the default steps of the model, balanced 0.7 of them, draft 0.4; no preset has fewer steps than the
    schedule needs. draft also halves the pixels of frames with more than 256 x 256 pixels. Frames and guidance scale
    are the defaults of the model.
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
    """Create a control for each registered plug-in in the open Gradio layout.

    Args:
        prefix: start of the element ids, which must be unique on a page.

    Returns:
        The components in the order of the plug-in table. `plug_in_texts` takes the list of their values.
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
    """Return the fixed words that the option of a plug-in accepts: the lower-case words of its metavar.

    >>> words_of(known_plug_ins()[-1])
    ['auto']
    """
    return re.findall(r"[a-z][a-z_]*", re.sub(r"[A-Z][A-Za-z_]*", "", row.metavar))


def plug_in_texts(values: Sequence[Any]) -> dict[str, str]:
    """Return the value of `GenerateConfig.plug_ins` for the values of the controls, without plug-ins that are off.

    Raises:
        UserError: the number of values differs from the number of plug-ins, or a value is not a text.
    """
    rows = known_plug_ins()
    if len(values) != len(rows):
        raise UserError("a plug-in was registered after the page was built: restart the app")
    texts = {}
    for row, value in zip(rows, values, strict=True):
        text = value.strip() if isinstance(value, str) else value
        if text in (None, "", OFF):
            continue
        if not isinstance(text, str):
            raise UserError(f"{row.title} takes a text such as {row.metavar}, got {shown(value)}")
        texts[row.option] = text
    return texts


def plug_in_values(texts: Mapping[str, Any]) -> list[str]:
    """Return the values of the controls for settings, a mapping from option names of plug-ins to texts."""
    return [str(texts.get(row.option) or OFF) for row in known_plug_ins()]
