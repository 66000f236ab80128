"""Generated and file-based tasks with their judges, and the sandbox that runs code a model wrote.

`sandbox_child` runs in a process of its own and is imported by no module.
"""
