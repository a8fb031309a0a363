"""One sampler for whatever is trained, calibrated or long.

`schedule` has the noise levels, `transition` a step as a Gaussian, `solver` faster deterministic steps, `seeds` random
numbers by name, `conditions` the encoded prompts, `meter` the cost, `config` the part of a configuration, and
`sampler` the one loop, which yields its states. `docs/sampling.md` has examples.
"""
