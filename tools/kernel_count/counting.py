"""The cases that are counted: the calls of a training step on one sequence, whole and divided into segments."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sass import Launch

from tsae_kernels import MULTISCALE
from tsae_kernels.backends.compiled import CudaBackend
from tsae_kernels.backends.interface import Activation, Backend, Gradients, MaskBackend

if TYPE_CHECKING:
    from cuda_kernels import CudaKernels
    from triton_kernels import TritonKernels

K = 2304  # features, as in the benchmark
TEXTS: dict[str, Callable[[int], torch.Tensor | None]] = {
    "one run": lambda T: None,
    "3 runs": lambda T: _ids((37, 50, 41)),
    "20 runs": lambda T: _ids((5, 9, 3, 7, 8) * 4),
}
"""How a sequence of 128 positions is divided into segments."""


def _ids(lengths: tuple[int, ...]) -> torch.Tensor:
    ids = torch.arange(len(lengths))
    return ids.repeat_interleave(torch.tensor(lengths))[None].contiguous()


def operations(backend: Backend, T: int, ids: torch.Tensor | None) -> dict[str, Callable[[], object]]:
    """The calls that are counted, bfloat16 with MULTISCALE's bands, as a training step makes them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, T, K, generator=generator).bfloat16()
    bias, level = torch.zeros(K), torch.full((K,), 0.5)
    grad_h = torch.randn(1, T, K, generator=generator).bfloat16()
    grads = Gradients(grad_h, torch.ones(1, len(MULTISCALE), K), None, None)
    relu, trigger = Activation("relu", bias), Activation("relu", bias, level, 0.3 * level)
    calls: dict[str, Callable[[], object]] = {
        "statistics": lambda: backend.temporal_stats(x, MULTISCALE, ids),
        "forward": lambda: backend.activate_with_stats(x, relu, MULTISCALE, ids),
        "trigger": lambda: backend.activate_with_stats(x, trigger, MULTISCALE, ids),
        "backward": lambda: backend.activate_with_stats_backward(
            x, grads, Activation("relu"), MULTISCALE, ids, x.float().sum(1)
        ),
    }
    if isinstance(backend, MaskBackend):
        calls["mask"] = lambda: backend.activate_with_mask(x, trigger, MULTISCALE, ids)
    if isinstance(backend, CudaBackend):  # with counts of transitions
        calls["counted statistics"] = lambda: backend.temporal_stats(x, MULTISCALE, ids, True)
        calls["counted trigger"] = lambda: backend.activate_with_stats(x, trigger, MULTISCALE, ids, True)
        calls["counted mask"] = lambda: backend.activate_with_mask(x, trigger, MULTISCALE, ids, True)
    return calls


def count(name: str) -> dict[tuple[str, str, int], Launch]:
    """(operation, text, T) -> the launch of its main kernel, for the backend ``name``."""
    out: dict[tuple[str, str, int], Launch] = {}
    cases = [(text, 128) for text in TEXTS] + [("one run", 512), ("one run", 2048)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        kernels, backend = _backend(name, Path(folder))
        for text, T in cases:
            for operation, call in operations(backend, T, TEXTS[text](T)).items():
                launches = kernels.counted(call, T)
                out[operation, text, T] = max(launches, key=lambda launch: launch.count.read + launch.count.written)
    return out


def _backend(name: str, folder: Path) -> tuple[TritonKernels | CudaKernels, Backend]:
    if name == "triton":
        from triton_kernels import TritonKernels

        from tsae_kernels.backends.triton import launch

        return TritonKernels(tool("nvdisasm"), tool("cuobjdump")), launch
    from cuda_kernels import CudaKernels

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("error: nvcc is not on the PATH; install the CUDA toolkit, or count with --backend triton")
    kernels = CudaKernels(nvcc, tool("nvdisasm"), tool("cuobjdump"), folder)
    return kernels, CudaBackend("tsae_kernels_cuda_emulated")


def tool(name: str) -> str:
    """The path of nvdisasm or cuobjdump: CUDA's, else the one in Triton's wheel."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(name, path=os.path.join(home, "bin")) if home else shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found
