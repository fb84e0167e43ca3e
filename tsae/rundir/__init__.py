"""The run directory: what it is called, what it holds, and how files get into it."""
