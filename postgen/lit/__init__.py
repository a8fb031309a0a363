"""Hybrid linear attention: convert a trained transformer's self-attention, block by block."""
