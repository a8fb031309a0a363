"""How the embedded text-to-video model is trained: its autoencoder first, then its denoiser and text encoder.

The one room that builds a concrete diffusers model; everything else takes the model that the user brings.
"""
