"""Measuring autoencoders on text that training never saw."""
