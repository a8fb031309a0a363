"""Scripts that measure postgen; each writes one file of `benchmarks/results/`."""
