"""Autoencoders on the Hugging Face hub: `push`, `load`, and the command `python -m tsae.hub RUN REPO`."""

from tsae.hub.transfer import load, prepare, push

__all__ = ["load", "prepare", "push"]
