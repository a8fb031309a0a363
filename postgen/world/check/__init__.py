"""The exact judge of clips of the world.

From pixels alone, it decides whether a clip shows the requested bodies, colours, shapes and events.
"""

from .judge import check, check_batch, check_long, find_tracks, find_tracks_long
from .report import BodyReport, Report

__all__ = ["BodyReport", "Report", "check", "check_batch", "check_long", "find_tracks", "find_tracks_long"]
