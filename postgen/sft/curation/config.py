"""Settings of the curation: what is measured, and the thresholds of each filter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from postgen.errors import UserError, check_number, did_you_mean, shown
from postgen.reading import read_text
from postgen.training.recipe_errors import yaml_problem

Band = tuple[float | None, float | None]
"""Least and greatest allowed value, both included; None: no bound on this side."""

EMBEDDINGS = ("none", "thumbnail", "clip")
CUTS = ("split", "drop", "keep")
BARS = ("crop", "drop", "keep")
_LARGEST = 2**20
_FREE: Band = (None, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurationConfig:
    """Settings of `postgen curate`. A band is [least, greatest], and null is no bound: `flow: [0.02, null]`.

    Raises:
        UserError: a value has another type or is out of its range.
    """

    side: int = 360
    """Shorter side in pixels at which frames are measured. Smaller frames keep their size. Sharpness depends on it."""
    pairs: int = 8
    """Number of pairs of neighbouring frames that are measured in a shot, spread over its length."""
    cut_change: float = 0.05
    """Least mean change of the 16 x 16 thumbnails, in [0, 1], between two frames with a cut between them."""
    cut_ratio: float = 3.0
    """How many times the change at a cut exceeds the median change of the four frames before, and of those after."""
    cuts: str = "split"
    """Videos with cuts: "split" makes each shot an own clip, "drop" removes the video, "keep" ignores cuts."""
    bars: str = "crop"
    """Clips with black bars: "crop" cuts them off, "drop" removes the clip, "keep" ignores them."""
    embedding: str = "none"
    """What `embedding_distance` compares: "none", "thumbnail" (small pictures, no weights), "clip" (a CLIP model)."""
    embedding_model: str | None = None
    """Hub id or folder of the CLIP model; null: the one of the reward `clip_score`."""

    height: Band = _FREE
    """Height in pixels, after bars are cut off."""
    width: Band = _FREE
    """Width in pixels, after bars are cut off."""
    frames: Band = _FREE
    """Number of frames of a shot; not for images."""
    seconds: Band = (1.0, None)
    """Length of a shot in seconds; not for images, nor for folders of frames without a rate."""
    fps: Band = (7.5, None)
    """Frames per second; not for images, nor for folders of frames without a rate."""
    brightness: Band = (0.02, 0.94)
    """Mean luma, in [0, 1]. Underexposed clips are found by `contrast`; a bright thing on black is sound."""
    contrast: Band = (0.03, None)
    """Standard deviation of luma within a frame, mean over the frames."""
    sharpness: Band = (1e-4, None)
    """Variance of the Laplacian of luma, mean over the frames; depends on `side`."""
    flow: Band = (0.002, 3.0)
    """Mean length of the optical flow in shorter sides of the picture per second; not for images."""
    text_area: Band = (None, 0.08)
    """Share of the picture with marks that look like text."""
    hash_distance: float | None = 0.08
    """Clips whose perceptual hashes differ in at most this share of the bits are duplicates; null: not compared."""
    embedding_distance: float | None = 0.05
    """Clips whose embeddings have at most this cosine distance are duplicates; null: not compared."""
    caption_distance: float = 0.1
    """A caption within this cosine distance of a prompt that must stay apart is an overlap."""
    density_power: float = 1.0
    """Weight = density of the caption ** -density_power; 0 gives all clips the weight 1."""
    density_width: float = 0.3
    """Width of the Gaussian that measures the density of captions, as a distance of unit vectors in [0, 2]."""
    density_cap: float = 10.0
    """Largest ratio of two weights."""

    def __post_init__(self) -> None:
        check_number("side", self.side, 32, 4096, whole=True)
        check_number("pairs", self.pairs, 1, 256, whole=True)
        for name, allowed in (("cuts", CUTS), ("bars", BARS), ("embedding", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {shown(getattr(self, name))}. Allowed: {', '.join(allowed)}.")
        if self.embedding_model is not None and (
            self.embedding != "clip" or not isinstance(self.embedding_model, str)
        ):
            raise UserError("embedding_model names a CLIP model: use it with embedding 'clip'")
        for name in BANDS:
            object.__setattr__(self, name, _band(name, getattr(self, name)))
        for name, least, most in _NUMBERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_number(name, value, least, most)

    def measured(self) -> dict[str, Any]:
        """Return the settings that change what is measured; all others only decide about measured values."""
        return {name: getattr(self, name) for name in _MEASURED} | {"flow": self.flow != _FREE}


_MEASURED = ("side", "pairs", "cut_change", "cut_ratio", "cuts", "bars", "embedding", "embedding_model")
_NUMBERS: tuple[tuple[str, float, float], ...] = (
    *(("cut_change", 0.001, 1), ("cut_ratio", 1, 1000), ("hash_distance", 0, 0.5), ("embedding_distance", 0, 2)),
    *(("caption_distance", 0, 2), ("density_power", 0, 4), ("density_width", 0.01, 2), ("density_cap", 1, 10**6)),
)
_OPTIONAL = ("hash_distance", "embedding_distance")
BANDS = tuple(item.name for item in dataclasses.fields(CurationConfig) if item.type == "Band")
"""Names of the settings that are bands, in the order of the funnel."""


def _band(name: str, value: Any) -> Band:
    if value is None:
        return _FREE
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"{name} is {shown(value)}, it must be [least, greatest], with null for no bound")
    for end in value:
        if end is not None:
            check_number(name, end, 0)
    low, high = value
    if low is not None and high is not None and low > high:
        raise UserError(f"{name} is {shown(value)}: its least value is above its greatest")
    return (None if low is None else float(low), None if high is None else float(high))


def read_config(path: str | Path | None, values: Mapping[str, Any] | None = None) -> CurationConfig:
    """Read the settings of a curation from a YAML or JSON file.

    Args:
        path: the file; None: the defaults.
        values: settings that replace those of the file.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong.
    """
    found: Any = {}
    if path is not None:
        text = read_text(path, f"the settings {path} cannot be read", most=_LARGEST)
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the settings {path} are not valid YAML, {yaml_problem(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"the settings {path} are not valid YAML: {shown(str(error))}") from error
    if not isinstance(found, dict):
        raise UserError(f"the settings {path} hold {shown(found)}: write lines 'key: value'")
    found = found | dict(values or {})
    hints = get_type_hints(CurationConfig)
    for key, value in found.items():
        if key not in hints:
            near = did_you_mean(str(key), hints)
            raise UserError(f"the curation has no setting {shown(key)}.{near} Known: {', '.join(hints)}")
        if str in (hints[key], *get_args(hints[key])) and not isinstance(value, str | None):
            raise UserError(f"{key} is {shown(value)}, it must be a text")
    return CurationConfig(**found)
