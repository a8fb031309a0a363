"""Graded ways to spoil clips, which `world_judge` learns to rank and is measured by.

Level 0 leaves a clip as it is; levels 1 to 4 are fixed strengths. With equally seeded generators two levels spoil a
clip in the same way and differ in strength only. Suffixes: B clips, T frames, K bodies, C channels.

`whole` spoils whole pictures, `layers` and `looks` and `motion` the first body, `guests` brings in bodies of other
scenes, `courses` renders bodies on ways that no body goes.
"""

from .courses import COURSES
from .kinds import HEAD, LEVELS, ON_ANY_CLIP, corrupt
from .takes import Picked, Takes, render_takes, shows

__all__ = ["COURSES", "HEAD", "LEVELS", "ON_ANY_CLIP", "Picked", "Takes", "corrupt", "render_takes", "shows"]
