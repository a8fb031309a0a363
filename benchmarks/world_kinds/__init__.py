"""Clips that are right or wrong on purpose, in kinds. `benchmarks.world_constructions` draws and shows them."""
