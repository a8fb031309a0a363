"""Training of the embedded text-to-video model: its autoencoder first, then its denoiser and text encoder.

This is the only package that builds a concrete diffusers model; all others use the model that the user supplies.
"""
