"""The methods that ReFusion is compared with.

Autoregressive models (AR), masked diffusion (MDM, LLaDA) and block diffusion (BD3-LM). `objectives` holds
their training objectives, `decoders` their decoders; neither imports the other.
"""
