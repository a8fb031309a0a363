"""Kernels of `postgen.kernels` in stock diffusers models: the attention backend "postgen"."""
