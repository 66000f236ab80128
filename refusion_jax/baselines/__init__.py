"""The methods ReFusion is compared with.

Left-to-right prediction (AR), masked diffusion (MDM, LLaDA), block diffusion (BD3-LM). `objectives` has what
they are trained for, `decoders` how they decode; the two do not import each other.
"""
