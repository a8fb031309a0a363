"""A small synthetic 3-D world whose ground truth is exact: a clip is a pure function of a spec, a spec of a seed."""

from .plan import arrange, sample
from .render import Frames, render, stream
from .spec import Body, Spec, is_held_out

__all__ = ["Body", "Frames", "Spec", "arrange", "is_held_out", "render", "sample", "stream"]
