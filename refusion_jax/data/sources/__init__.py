"""Where examples come from: JSON lines, TFDS datasets."""
