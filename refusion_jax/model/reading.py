"""How the weights of a model may be read to decode: values that config.json, flags and requests share.

refusion_jax/decode/config.py and checkpoints/hugging_face.py say what they mean. Imports no JAX.
"""

VERIFY = ("threshold", "exact")
FIRST_TOKENS = ("next", "mask")
BORDERS = ("ar", "draft")
SLOT_SIZES = (4, 8, 16, 32)  # tokens; of the authors' training, for models that do not state theirs
