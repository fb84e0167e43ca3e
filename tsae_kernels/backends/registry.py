"""Which implementation runs: the table of backends and the rule that picks one.

A backend is a module, or an object, with the functions of `reference.py`. `docs/environment.md` lists the variable read
here.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from tsae_kernels.backends import eager, reference
from tsae_kernels.backends.compiled import CompiledBackend, cpp, cuda
from tsae_kernels.backends.extension import load_cuda_library, load_library
from tsae_kernels.backends.triton import launch as triton

BACKEND_VARIABLE = "TSAE_BACKEND"

OK = "ok"

_IMPLEMENTATIONS: dict[str, ModuleType | CompiledBackend] = {"reference": reference, "eager": eager}

_UNAVAILABLE: dict[str, str] = {}

for _name, _module, _library in (("cpp", cpp, load_library()), ("cuda", cuda, load_cuda_library())):
    if _library.problem:
        _UNAVAILABLE[_name] = _library.problem
    else:
        _IMPLEMENTATIONS[_name] = _module

if triton.problem():
    _UNAVAILABLE["triton"] = triton.problem()
else:
    _IMPLEMENTATIONS["triton"] = triton

# Fastest first; `reference` is an oracle and is never chosen unasked.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "eager"),
    "cuda": ("cuda", "triton", "eager"),
}
_FALLBACK = ("eager",)

_DEVICES = {"cpp": "cpu", "cuda": "cuda"}  # the only type of device that a backend runs on
_WAYS_OUT: dict[str, str] = {}  # what else helps on another device
if not triton.interpreting():
    _DEVICES["triton"] = "cuda"
    _WAYS_OUT["triton"] = f": {triton.WAYS_OUT}"


def available_backends() -> dict[str, str]:
    """Every backend's name -> "ok", or the reason why it is not available here, with the command that helps."""
    return dict.fromkeys(_IMPLEMENTATIONS, OK) | _UNAVAILABLE


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend asked for by argument or by `TSAE_BACKEND`, else the fastest one for `device`.

    Raises `ValueError` for an unknown name or one that does not run on `device`, and `RuntimeError`, with the
    reason and the command that helps, for one that is not available.
    """
    asked_by = "backend"
    if backend is None:
        asked_by = BACKEND_VARIABLE
        backend = os.environ.get(BACKEND_VARIABLE) or None
    if backend is None:
        for name in _PREFERENCE.get(device.type, _FALLBACK):
            if name in _IMPLEMENTATIONS:
                return name
    if backend in _IMPLEMENTATIONS:
        if _DEVICES.get(backend, device.type) != device.type:
            wanted = f"{asked_by}={backend!r} runs on {_DEVICES[backend]} tensors, got one on {device}"
            raise ValueError(wanted + _WAYS_OUT.get(backend, ""))
        return backend
    names = ", ".join(repr(name) for name in available_backends())
    if not isinstance(backend, str):
        raise TypeError(f"{asked_by} must be None or one of {names}, got {backend!r}")
    if backend not in _UNAVAILABLE:
        raise ValueError(f"{asked_by} must be one of {names}, got {backend!r}")
    remedy = (
        f"`unset {BACKEND_VARIABLE}` (or `export {BACKEND_VARIABLE}=eager`)"
        if asked_by == BACKEND_VARIABLE
        else "backend=None (or backend='eager')"
    )
    raise RuntimeError(
        f"{asked_by}={backend!r} is not available: {_UNAVAILABLE[backend]}. Use {remedy} to run in PyTorch; "
        "`python -m tsae_kernels` lists what is there."
    )


def implementation(backend: str) -> ModuleType | CompiledBackend:
    """What is behind a name that `choose_backend` returned."""
    return _IMPLEMENTATIONS[backend]
