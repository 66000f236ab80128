"""Decoders of the baselines, behind the same interface as `refusion_jax.decode`.

Imports `decode` and `model`.
"""
