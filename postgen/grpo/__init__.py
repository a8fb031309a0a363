"""DanceGRPO and its relatives: post-training of any diffusers image or video pipeline by rewards."""
