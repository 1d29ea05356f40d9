"""Exact accounting of torch's memory on the CPU: every allocation and release, without noise."""

import torch


def peak_bytes(call):
    """Highest sum of bytes that `call` has allocated and not yet released; what existed before counts nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    alive = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    del result
    return highest
