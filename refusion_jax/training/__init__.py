"""A training run: its configuration, the compiled step, the loop around it, and what the run reports.

Imports `model`, `diffusion`, `baselines.objectives`, `data`, `weights` and `checkpoints`. Nothing here
imports a decoder.
"""
