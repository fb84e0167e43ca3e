"""The backends that are available here, and the rule that selects one.

`docs/environment.md` lists the environment variable read here.
"""

from __future__ import annotations

import os

import torch

from tsae_kernels.backends import eager, reference
from tsae_kernels.backends.compiled import cpp, cuda
from tsae_kernels.backends.extension import load_cuda_library, load_library
from tsae_kernels.backends.interface import Backend
from tsae_kernels.backends.triton import launch as triton

BACKEND_VARIABLE = "TSAE_BACKEND"

OK = "ok"

_AVAILABLE: dict[str, Backend] = {"reference": reference, "eager": eager}
_UNAVAILABLE: dict[str, str] = {}  # name -> reason

for _name, _backend, _reason in (
    ("cpp", cpp, load_library().error),
    ("cuda", cuda, load_cuda_library().error),
    ("triton", triton, triton.unavailable_reason()),
):
    if _reason:
        _UNAVAILABLE[_name] = _reason
    else:
        _AVAILABLE[_name] = _backend

# Fastest first. `reference` is the definition that the others are tested against; it only runs on request.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "eager"),
    "cuda": ("cuda", "triton", "eager"),
}
_FALLBACK = ("eager",)

_DEVICE_TYPES = {"cpp": "cpu", "cuda": "cuda"}  # backends that run on one type of device only
if not triton.interpreting():
    _DEVICE_TYPES["triton"] = "cuda"


def available_backends() -> dict[str, str]:
    """Every backend's name -> "ok", or the reason it is unavailable here and the command that fixes it."""
    return dict.fromkeys(_AVAILABLE, OK) | _UNAVAILABLE


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend requested by argument or by `TSAE_BACKEND`, else the fastest one for `device`.

    Raises `ValueError` for an unknown name or a backend that does not run on `device`, and `RuntimeError`, with the
    reason and the command that fixes it, for one that is unavailable.
    """
    requested_by = "backend"
    if backend is None:
        requested_by = BACKEND_VARIABLE
        backend = os.environ.get(BACKEND_VARIABLE) or None
    if backend is None:
        for name in _PREFERENCE.get(device.type, _FALLBACK):
            if name in _AVAILABLE:
                return name
    if backend in _AVAILABLE:
        device_type = _DEVICE_TYPES.get(backend, device.type)
        if device_type != device.type:
            hint = f": {triton.HINT}" if backend == "triton" else ""
            raise ValueError(f"{requested_by}={backend!r} runs on {device_type} tensors, got one on {device}{hint}")
        return backend
    names = ", ".join(repr(name) for name in available_backends())
    if not isinstance(backend, str):
        raise TypeError(f"{requested_by} must be None or one of {names}, got {backend!r}")
    if backend not in _UNAVAILABLE:
        raise ValueError(f"{requested_by} must be one of {names}, got {backend!r}")
    remedy = (
        f"`unset {BACKEND_VARIABLE}` (or `export {BACKEND_VARIABLE}=eager`)"
        if requested_by == BACKEND_VARIABLE
        else "backend=None (or backend='eager')"
    )
    raise RuntimeError(
        f"{requested_by}={backend!r} is not available: {_UNAVAILABLE[backend]}. Use {remedy} to run in PyTorch; "
        "`python -m tsae_kernels` lists the available backends."
    )


def get_backend(name: str) -> Backend:
    """The backend of a name that `choose_backend` returned."""
    return _AVAILABLE[name]
