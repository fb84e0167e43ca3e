"""Every backend on random calls: as accurate as PyTorch operations, and every output is written."""

import kernels_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import cases

from tsae_kernels import MULTISCALE, activate_with_stats

# Triton takes 1 ms per row and operation in its interpreter, and on a GPU seconds to compile each new set of bands.
EXAMPLES = {"reference": 15, "eager": 40, "cpp": 80, "cuda": 60, "triton": 8 if oracle.INTERPRETED else 15}


def assert_as_exact_as_torch(name, found, right, in_torch, size):
    """Require at most twice the error of PyTorch's operations, plus a few roundings of the terms and one of the result.

    The extra roundings are for cases in which PyTorch's result happens to be exact.
    """
    if right.numel() == 0:
        return
    compute = torch.float64 if found.dtype == torch.float64 else torch.float32
    error, of_torch = ((x.double() - right).abs().max().item() for x in (found, in_torch.to(found.dtype)))
    luck = 8 * torch.finfo(compute).eps * size + torch.finfo(found.dtype).eps * right.abs().max().item()
    assert error <= 2 * of_torch + luck, f"{name}: off by {error:.1e}, PyTorch by {of_torch:.1e}, terms of {size:.1e}"


def check(case, backend):
    torch.use_deterministic_algorithms(True)  # PyTorch then fills new tensors with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = case.run(activate_with_stats, backend, oracle.DEVICE.get(backend, "cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    right, in_torch = (case.expected(found["h"], dtype) for dtype in (torch.float64, case.compute))
    assert found["h"].dtype == case.pre.dtype
    if case.name != "gelu":
        assert torch.equal(found["h"], in_torch["h"].to(case.pre.dtype))
    sizes = case.sizes(found["h"])
    for name, value in found.items():
        assert value.shape == right[name].shape
        assert_as_exact_as_torch(name, value, right[name], in_torch[name], sizes[name])


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_every_backend_computes_the_definition(backend):
    small = {"longest": 14, "widest": 5} if backend == "triton" and oracle.INTERPRETED else {}
    if backend == "triton" and not oracle.INTERPRETED:  # every dtype and set of bands would compile further kernels
        small = {"dtypes": (torch.float32,), "only_bands": MULTISCALE, "widest": 31}
    settings(deadline=None, max_examples=EXAMPLES[backend])(given(cases(**small))(lambda case: check(case, backend)))()
