"""Pallas kernels for NVIDIA GPUs: attention of a decoding pass, and products with int8 matrices.

Each kernel's module is imported where the kernel is chosen, so a CPU or TPU never loads the Triton backend.
`visible` holds the mask that the attention kernel reads, and imports no Pallas.
"""
