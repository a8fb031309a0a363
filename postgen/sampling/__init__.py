"""One sampler for whatever is trained, calibrated or long: noise levels, transitions, solvers, seeds, conditions."""
