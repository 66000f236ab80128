"""Mutated files: `seeds` has valid ones, `mutations` damages them, `readers` reads, `runner` counts."""
