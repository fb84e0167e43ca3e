"""Triton's interpreter, made fast enough for tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _patch_triton_once_per_launch():
    """Patch Triton's language once per launch and function instead of at every call of a device function.

    The interpreter's patching takes 3 ms per call, half of these tests' time.
    """
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

    def launch_and_clear(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_clear)
        yield
