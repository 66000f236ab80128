"""Transformations of parameter trees.

Lazy reading, fused projections, int8, low-rank adaptation, rows for new tokens. Imports no file format and no
decoder; `checkpoints` reads and writes what is transformed here.
"""
