"""Triton's interpreter: made fast enough for tests, and mended for numpy 2.4 and later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest


@pytest.fixture(autouse=True, scope="session")
def _fast_triton_interpreter() -> Iterator[None]:
    """Skips two kinds of the interpreter's work that change nothing and take three quarters of these tests' time.

    * It patches Triton's language at every call of a device function (3 ms); once per launch and function is enough.
    * It computes whether integers overflow, then drops the answer, because its asserts are off.
    """
    from tsae_kernels.backends.triton import launch

    if launch.unavailable_reason() or not launch.interpreting():
        yield
        return
    from triton.runtime import interpreter

    patch, launch_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patch_tensor = interpreter._patch_lang_tensor
    builder = interpreter.interpreter_builder
    patched = {}

    def patch_once(function):
        if function not in patched:
            patched[function] = patch(function)
        return patched[function]

    def patch_tensor_and_index(tensor, scope):
        """Loop bounds known at run time are arrays of one element, of which Triton 3.6 takes `int`: numpy refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def launch_and_clear(self, *args, **kwargs):
        patched.clear()
        return launch_grid(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_clear)
        if not builder.options.debug:
            monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
