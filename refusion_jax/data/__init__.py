"""Training data: sources of examples, tasks, tokenised and packed rows, batches prepared ahead.

Imports `tokenizer`. Nothing here imports JAX, so that worker processes start fast and use little memory.
Grain, which imports JAX, is imported only for the order of a finite source.
"""
