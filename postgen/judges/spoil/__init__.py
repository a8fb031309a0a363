"""Graded corruptions of clips, which `world_judge` learns to rank and with which it is evaluated.

Level 0 leaves a clip unchanged; levels 1 to 4 have fixed strengths. With generators of the same seed, two levels
corrupt a clip in the same way and differ in strength only. Suffixes: B clips, T frames, K bodies, C channels.

`whole` corrupts whole pictures; `layers`, `looks` and `motion` corrupt the first body; `guests` inserts bodies of
other scenes; `courses` renders bodies on impossible trajectories.
"""

from .courses import COURSES
from .kinds import HEAD, LEVELS, ON_ANY_CLIP, corrupt
from .takes import Picked, Takes, render_takes, shows

__all__ = ["COURSES", "HEAD", "LEVELS", "ON_ANY_CLIP", "Picked", "Takes", "corrupt", "render_takes", "shows"]
