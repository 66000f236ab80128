"""Serving: opens a checkpoint by command-line flags, decodes requests with continuous batching, writes JSON.

May import the decoders, `loader`, `tokenizer` and `data`; imports no training module itself.
"""
