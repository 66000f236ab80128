"""What `bench` measures, and the table it prints.

Imports `training` and `serving`.
"""
