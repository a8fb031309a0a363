"""Measurements of a clip or of a run. They know no model."""
