"""The exact judge: does a clip show the bodies, colours, shapes and events that were asked for? From pixels alone."""

from .judge import BodyReport, Report, check, check_batch, find_tracks

__all__ = ["BodyReport", "Report", "check", "check_batch", "find_tracks"]
