"""Requests in, results out: a checkpoint opened by command-line flags, continuous batching, results as JSON.

Imports the decoders, and nothing of training.
"""
