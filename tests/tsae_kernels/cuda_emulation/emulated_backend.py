"""`pytest -p emulated_backend`: the backend "cuda" is the emulated library TSAE_EMULATED_LIBRARY, on the CPU.

It has to be loaded before the tests look at the table of backends.
"""

import os

import torch

from tsae_kernels.backends import registry
from tsae_kernels.backends.compiled import cuda

torch.ops.load_library(os.environ["TSAE_EMULATED_LIBRARY"])
registry._AVAILABLE["cuda"] = cuda
registry._UNAVAILABLE.pop("cuda", None)
registry._DEVICE_TYPES["cuda"] = "cpu"
