"""Triton's interpreter, made fast enough for tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _patch_triton_once_a_launch():
    """The interpreter patches Triton's language at every call of a device function, which takes it 3 ms and half of the
    time of these tests. Once a launch and function does."""
    from tsae_kernels.backends.triton import launch

    if launch.unavailable_reason() or not launch.interpreting():
        yield
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = {}

    def patch_once(function):
        if function not in patched:
            patched[function] = patch(function)
        return patched[function]

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        yield
