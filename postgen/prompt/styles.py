"""How the prompts of each model family are written: length and phrases. Light to import.

The lengths are below the limits of the text encoders, because very long rewrites make videos over-saturated
(the authors of SkyReels-V2 report it) and drown the words of the user. Phrases name no thing, colour or number, and
negate nothing, so that they cannot contradict a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """A way to write prompts."""

    name: str
    """Name in settings."""
    tokens: int
    """Largest number of tokens of an enhanced prompt."""
    advice: str
    """Advice to a language model in one sentence; the length is added."""
    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Phrases of the template enhancer by slot: motion, camera, light, style. One phrase of each slot is added if the
    prompt says nothing about it."""


_MOTION = (
    "The motion is smooth and natural",
    "Everything moves smoothly and continuously",
    "The movement is steady and physically plausible",
)
_CAMERA = (
    "Static camera, medium shot",
    "The camera holds still at eye level",
    "Steady medium shot with the subject in the centre of the frame",
)
_LIGHT = ("Soft, even light with gentle shadows", "Natural light with soft shadows", "Clear, balanced lighting")
_LOOK = (
    "Sharp detail, realistic textures and consistent appearance",
    "Realistic, detailed footage with clean edges",
    "Cinematic, finely detailed and coherent from beginning to end",
)
_PROSE = {"motion": _MOTION, "camera": _CAMERA, "light": _LIGHT, "style": _LOOK}

STYLES: Mapping[str, Style] = {
    style.name: style
    for style in (
        Style(
            name="prose",
            tokens=160,
            advice="Write one paragraph of plain sentences: the subject and its look, then the action, the setting,"
            " the camera, and the light.",
            phrases=_PROSE,
        ),
        Style(
            name="long",
            tokens=200,
            advice="Write one rich paragraph: the subject and its look, the action in order, the setting with its"
            " background, the camera, the light, and the mood.",
            phrases=_PROSE,
        ),
        Style(
            name="sequence",
            tokens=120,
            advice="Write one flowing paragraph in the order of time, begin with the main action, and name exact"
            " movements, the camera angle, and the light.",
            phrases=_PROSE,
        ),
        Style(
            name="restrained",
            tokens=110,
            advice="Write two or three plain sentences and add few details, because long prompts over-saturate the"
            " video.",
            phrases={"motion": _MOTION, "camera": _CAMERA, "light": _LIGHT},
        ),
        Style(
            name="short",
            tokens=70,
            advice="Write one or two short sentences.",
            phrases={"camera": _CAMERA, "style": _LOOK},
        ),
        Style(
            name="edit",
            tokens=100,
            advice="The prompt is an instruction to change a picture or a video: make it exact, and add nothing else.",
        ),
        Style(
            name="world",
            tokens=64,
            advice="Write one sentence in lower case such as 'a red ball rolls left, static camera'.",
            phrases={"camera": ("static camera", "fixed camera", "the camera stays still", "still camera")},
        ),
    )
}
"""Styles by name. `world` is that of models with a fixed list of words, such as the embedded model."""

_FAMILIES: tuple[tuple[str, str], ...] = (
    ("WanAnimate", "prose"),
    ("SkyReels", "restrained"),
    ("HunyuanSkyreels", "restrained"),
    ("CogVideoX", "long"),
    ("ConsisID", "long"),
    ("Cosmos", "long"),
    ("EasyAnimate", "long"),
    ("LTX", "sequence"),
    ("Latte", "short"),
    ("AnimateDiff", "short"),
    ("TextToVideoSD", "short"),
    ("ChronoEdit", "edit"),
    ("LucyEdit", "edit"),
)
"""Beginning of the class name of a pipeline -> style; the first that fits. All others write prose."""


def style_for(pipeline: str) -> Style:
    """Return the style for the class name of a pipeline.

    >>> style_for("LTXPipeline").name, style_for("WanPipeline").name
    ('sequence', 'prose')
    """
    return STYLES[next((style for start, style in _FAMILIES if pipeline.startswith(start)), "prose")]
