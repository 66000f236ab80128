"""Tasks with their verifiers, generated or read from files, and the sandbox for code written by a model.

`registry` lists the tasks. `sandbox_child` is a script that runs in its own process; no module imports it.
Imports `data.sources` and `tokenizer`.
"""
