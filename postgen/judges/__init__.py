"""Training of the small learned rewards of the synthetic world: `world_clip` and `world_judge`."""
