"""Training data: embedded tasks, JSONL and TFDS sources, and the Grain pipeline over them."""
