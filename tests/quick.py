"""Compiling in about half the time, to slower programs: for those that run a few times."""

import functools

import jax

QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)
