"""Reading and writing of model files: Orbax checkpoints, Hugging Face folders, safetensors and GGUF.

Imports `model` and `weights`.
"""
