"""`pytest -p emulated_backend`: the backend "cuda" is the emulated library TSAE_EMULATED_LIBRARY, on the CPU.

It has to be loaded before the tests look at the table of backends.
"""

import os

import torch

from tsae_kernels import backends, cuda

torch.ops.load_library(os.environ["TSAE_EMULATED_LIBRARY"])
backends._IMPLEMENTATIONS["cuda"] = cuda
backends._UNAVAILABLE.pop("cuda", None)
backends._DEVICES["cuda"] = "cpu"
