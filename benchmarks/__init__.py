"""How fast fusedlm is, beside its peers, in one run. `python -m benchmarks ops`."""
