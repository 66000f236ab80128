"""The parts of `aot`: TPU slices that are not attached, programs compiled for them, and their collectives.

Imports `training` and the slot decoder.
"""
