"""The backends, which implement the operators of `ops.py`, and the registry that selects one."""
