"""pytest plugin (`-p emulated_backend`): the "cuda" backend is the library TSAE_EMULATED_LIBRARY, on the CPU.

Import it before the tests read the table of backends.
"""

import os

import torch

from tsae_kernels.backends import registry
from tsae_kernels.backends.compiled import CudaBackend

torch.ops.load_library(os.environ["TSAE_EMULATED_LIBRARY"])
registry._AVAILABLE["cuda"] = CudaBackend("tsae_kernels_cuda_emulated")
registry._UNAVAILABLE.pop("cuda", None)
registry._DEVICE_TYPES["cuda"] = "cpu"
