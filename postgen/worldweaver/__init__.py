"""Joint RGB and depth, a memory bank and segmented noise levels, for long videos (WorldWeaver, arXiv:2508.15720)."""
