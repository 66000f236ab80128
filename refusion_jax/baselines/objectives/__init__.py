"""Training objectives of the baselines: what is fed, and per-token targets and weights.

Imports `diffusion`, whose `Noised` they all return.
"""
