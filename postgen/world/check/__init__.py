"""The exact judge: does a clip show the bodies, colours, shapes and events that were asked for? From pixels alone."""

from .judge import check, check_batch, check_long, find_tracks, find_tracks_long
from .report import BodyReport, Report

__all__ = ["BodyReport", "Report", "check", "check_batch", "check_long", "find_tracks", "find_tracks_long"]
