"""Training examples and tasks: sources, tokenised and packed rows, batches prepared ahead.

Imports `tokenizer`. Nothing here imports JAX, so that worker processes start fast and stay small.
"""
