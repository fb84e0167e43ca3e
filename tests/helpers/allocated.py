"""Peak memory of tensors, measured by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocated(work: Callable[[], object]) -> int:
    """Peak bytes that ``work`` allocates in tensors."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
