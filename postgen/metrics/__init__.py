"""Measurements of a clip or of a run. They use no model."""
