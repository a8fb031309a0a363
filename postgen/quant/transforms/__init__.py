"""Transformations of a model before it is quantised, which do not change its output."""
