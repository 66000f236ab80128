"""A training run: its configuration (run), the compiled step, the loop around it, and its metrics.

Objectives and optimizer, FLOPs, wall time, profiling and the start of several processes are here too.
Imports `model`, `diffusion`, `baselines.objectives`, `data`, `weights`, `checkpoints`, `tokenizer` and the
modules at the package's top, never a decoder.
"""
