"""Sparse linear probes of features: `python -m tsae.probe RUN [RUN ...]`."""
