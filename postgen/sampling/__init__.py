"""The sampling loop for training, calibration and long videos; users generate with diffusers' pipelines instead.

    schedule    noise levels
    transition  a sampling step as a Gaussian with mean, std and log-probability
    solver      higher-order deterministic steps
    seeds       random numbers that depend on names and not on order
    conditions  encoded prompts
    meter       cost in passes and seconds
    config      the sampling part of a configuration
    sampler     the loop, which yields a state after each step
    clean       estimate of the clean latents in the middle of a diffusers pipeline call

`docs/sampling.md` has examples.
"""
