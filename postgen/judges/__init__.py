"""How the small learned rewards of the synthetic world are trained: `world_clip` and `world_judge`."""
