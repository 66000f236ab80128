"""The measurements of `bench`, and the text tables that `bench` and `aot` print.

Imports `training`, `serving` and the slot decoder.
"""
