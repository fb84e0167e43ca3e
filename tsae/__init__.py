"""Temporal sparse autoencoders for language models."""
