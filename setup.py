"""Build script; all metadata is in pyproject.toml. The compiled backends of tsae_kernels are built from here."""

from setuptools import setup

setup()
