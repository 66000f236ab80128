"""The methods that ReFusion is compared with.

Autoregressive prediction (AR), masked diffusion (MDM, as in LLaDA) and block diffusion (BD3-LM). `objectives`
holds their training objectives, `decoders` their decoding methods. The two do not import each other.
"""
