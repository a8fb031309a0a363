"""A small synthetic 3-D world with exact ground truth.

A clip is a pure function of its spec, and a spec is a pure function of its seed.
"""

from .grammar import caption, simple_caption
from .long import caption_at, sample_long
from .palette import Palette
from .parse import parse, read
from .plan import Wish, arrange, eligible_events, sample
from .reading import Clause, Reading
from .render import Frames, ground_shades, render, shades, stream
from .spec import Body, Spec, is_held_out

__all__ = [
    "Body",
    "Clause",
    "Frames",
    "Palette",
    "Reading",
    "Spec",
    "Wish",
    "arrange",
    "caption",
    "caption_at",
    "eligible_events",
    "ground_shades",
    "is_held_out",
    "parse",
    "read",
    "render",
    "sample",
    "sample_long",
    "shades",
    "simple_caption",
    "stream",
]
