"""Training objectives of the baselines: each turns a batch into inputs, per-token targets and weights.

Each module's function is `corrupt`, and all return the `Noised` of `diffusion`, the only folder imported.
"""
