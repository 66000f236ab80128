"""Sources of examples: JSON lines, TFDS datasets.

Imports `tokenizer` for the format of messages.
"""
