"""The decoders of the baselines, with the same interface as the slot decoder (`decode.decoder.Decoder`).

May import `decode` and `model`.
"""
