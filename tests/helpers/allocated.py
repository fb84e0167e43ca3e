"""Memory of tensors, as torch's allocator tells it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocated(work: Callable[[], object]) -> int:
    """Most bytes of tensors that were live at once in ``work``, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
