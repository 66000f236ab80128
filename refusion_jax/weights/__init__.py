"""Transformations of parameter trees: lazy reading, fused projections, int8, LoRA, rows for new tokens.

Imports no other folder of the package. `checkpoints` reads and writes the trees that are transformed here.
"""
