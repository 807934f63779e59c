"""Bytes of CPU memory that a call takes at its highest, from torch's own allocator."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], Any]) -> int:
    """The largest sum of what was allocated and not yet freed, of whatever thread.

    Example:
        >>> peak(lambda: torch.empty(1000) + torch.empty(1000))
        12000
    """
    call_once = [call]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call_once.pop()()
    events = [(event.start_ns(), event.nbytes()) for event in recorded.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    del kept
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most
