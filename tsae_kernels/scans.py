"""Functions that walk along T, feature by feature: the best on/off path and the leaky recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae_kernels import scan_ops as _ops  # noqa: F401  (registers the operators)
from tsae_kernels.arguments import check_features, check_segments, check_tensor
from tsae_kernels.backends.registry import choose_backend


def viterbi_path(
    z: Tensor,
    transition_cost: Tensor,
    start_cost: Tensor,
    segments: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The cheapest sequence of off (0) and on (1) states of each feature (Viterbi 1967).

    For every feature and segment it minimizes exactly, over all paths s,

        sum over t of (-z_t^2 if s_t is on, else 0) + start_cost[s_first] + sum over t of transition_cost[s_t, s_{t+1}]

    where on is allowed at z_t > 0 only. With a cost of lambda times the bits of each transition it is the path that a
    two-state Markov code of the support pays least for, at a squared error that falls by z^2 where the feature is on.
    It sees the whole segment, so it is not causal. docs/mathematics.md, section 8.

    z: [B, T, k] float64, float32, bfloat16 or float16; any strides; B may be 0. NaN is off; +inf is on.
    transition_cost: [2, 2, k] finite floating point, of any sign, indexed [from, to], in the unit of z^2
    start_cost: [2, k], the cost of the state at a segment's first position, in the same unit
    segments: [B, T] integers or None. A segment is a maximal run of equal non-negative ids; a negative id
        excludes the position, which is off and passes nothing on. None: every row is one segment.
    backend: a name from `available_backends()`; None for `TSAE_BACKEND` or, if unset, the fastest on z's device
    out: [B, T, k] bool, True where on. Of two paths of equal cost, the one that is off at the last position where they
        differ.

    Costs are float32 (float64 for float64); the recursion keeps the difference of the two states' costs, so rounding
    does not grow with T. There is no gradient. The kernels of `triton` and `cuda` have not run on a GPU.

    Raises `TypeError` or `ValueError` for an invalid argument and `RuntimeError` for an unavailable backend. That costs
    are finite is not checked on an accelerator or under torch.compile, where the check would wait for the device.
    """
    check_features("z", z)
    k = z.shape[2]
    check_tensor("transition_cost", transition_cost, (2, 2, k), z.device)
    check_tensor("start_cost", start_cost, (2, k), z.device)
    check_segments(segments, z)
    if _checks_values(z):
        for name, cost in (("transition_cost", transition_cost), ("start_cost", start_cost)):
            if not bool(cost.isfinite().all()):
                raise ValueError(f"{name} must be finite, got {cost[~cost.isfinite()][0].item()}")
    chosen = choose_backend(backend, z.device)
    costs = transition_cost.detach(), start_cost.detach()
    path: Tensor = torch.ops.tsae_kernels.viterbi_path(z.detach(), *costs, segments, chosen)
    return path


def leaky_recurrence(a: Tensor, decay: Tensor, segments: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """h_t = decay h_{t-1} + (1 - decay) a_t along T, per feature (Persistent SAE, arXiv 2607.17117).

    h is 0 before the first position of every segment. docs/mathematics.md, section 8.

    a: [B, T, k] float64, float32, bfloat16 or float16; any strides; B may be 0
    decay: [k] floating point in [0, 1). 0 gives h = a; the time constant is 1 / (1 - decay) positions.
    segments: [B, T] integers or None. A segment is a maximal run of equal non-negative ids; a negative id excludes the
        position: h is 0 there, and it passes nothing on. None: every row is one segment.
    backend: a name from `available_backends()`; None for `TSAE_BACKEND` or, if unset, the fastest on a's device
    out: [B, T, k] in a's dtype and unit, contiguous. Differentiable once in a and decay.

    The state is float32 (float64 for float64), and h is rounded on output only. What is not finite stays in its feature
    until the segment ends. The gradient of decay is computed from h as returned. The kernels of `triton` and `cuda`
    have not run on a GPU.

    Raises `TypeError` or `ValueError` for an invalid argument, `RuntimeError` for an unavailable backend and for a
    second derivative. That decay is in [0, 1) is not checked on an accelerator or under torch.compile, where the check
    would wait for the device.
    """
    check_features("a", a)
    check_tensor("decay", decay, (a.shape[2],), a.device)
    check_segments(segments, a)
    if _checks_values(a):
        outside = decay[~((decay >= 0) & (decay < 1))]
        if outside.numel() > 0:
            raise ValueError(f"decay must be in [0, 1), got {outside[0].item()}")
    chosen = choose_backend(backend, a.device)
    h: Tensor = torch.ops.tsae_kernels.leaky_recurrence(a, decay, segments, chosen)
    return h


def _checks_values(x: Tensor) -> bool:
    """Whether values can be checked without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
