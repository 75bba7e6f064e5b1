"""Measure time and memory of a step on a GPU or a CPU.

On a GPU, two events bracket a step. Before the first event, the stream waits until the host has
enqueued the whole step, so that the events measure the device's work only. `wall_s` is the time of
consecutive steps including the host. Several sets of inputs are used in turn, which together should
be larger than the cache. Before short steps the GPU is kept busy briefly to raise its clocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Measurement", "measure", "measure_graph", "peak_bytes", "synchronize"]

Step = Callable[[Any], Any]
LEAST, MOST = 5, 50
SLOW_S, LEAST_OF_SLOW = 0.3, 3  # slow steps have a small spread and take much of a part's time
SHORT_S, MOST_OF_SHORT = 1e-3, 500
# An idle GPU lowers its clocks and takes milliseconds to raise them. Longer steps raise them in the
# first repeat; before short steps, the GPU is kept busy.
SELF_WARMING_S, BUSY_S = 5e-3, 0.05
# The waiting kernel counts cycles of the clock; this bound on clock rates makes waits long enough.
CYCLES_PER_S = 2.2e9
LONGEST_WAIT_S = 0.02


class Measurement(NamedTuple):
    """Seconds and bytes of one step."""

    median_s: float
    spread_s: float  #: distance between the quartiles
    wall_s: float  #: per step of consecutive steps, including the host
    repeats: int
    peak_bytes: int  #: peak of allocated memory during the step, above that before the step
    result_bytes: int  #: bytes of the returned tensors, included in the peak


def measure(
    step: Step, sets: Sequence[Any], device: str, *, seconds: float = 0.4, least: int = LEAST
) -> Measurement:
    """Run ``step`` on each of ``sets`` in turn for about ``seconds``, after a warm-up.

    Args:
        step: function of one of ``sets`` that returns tensors (in dicts and lists).
        sets: inputs; on a GPU, together larger than its L2.
        device: "cuda" or "cpu".
        seconds: measuring time, within ``least`` to 50 repeats. Steps above 0.3 s need only 3
            repeats; steps below a millisecond get up to 500.
        least: smallest number of repeats.
    """
    for inputs in [*sets, sets[0]] if device == "cuda" else sets[:1]:  # warm-up
        step(inputs)
    synchronize(device)
    start = time.perf_counter()
    step(sets[0])
    enqueued_s = time.perf_counter() - start
    synchronize(device)
    once_s = time.perf_counter() - start
    least = min(least, LEAST_OF_SLOW) if once_s > SLOW_S else least
    most = MOST_OF_SHORT if once_s < SHORT_S else MOST
    repeats = min(most, max(least, int(seconds / max(once_s, 1e-9))))
    timed = _events if device == "cuda" else _clock
    if device == "cuda" and once_s < SELF_WARMING_S:
        torch.cuda._sleep(int(BUSY_S * CYCLES_PER_S))
    times = timed(step, sets, repeats, enqueued_s)
    start = time.perf_counter()
    n = max(2, repeats // 2) if device == "cuda" else 0
    for i in range(n):
        step(sets[i % len(sets)])
    synchronize(device)
    wall_s = (time.perf_counter() - start) / n if n else statistics.median(times)
    peak, returned = peak_bytes(lambda: step(sets[0]), device)
    return Measurement(statistics.median(times), spread(times), wall_s, repeats, peak, returned)


def measure_graph(step: Step, sets: Sequence[Any], *, seconds: float = 0.2) -> float:
    """Return the median seconds of ``step`` replayed as a CUDA graph, without launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for inputs in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(inputs)
        graphs.append(graph)
    return measure(lambda graph: graph.replay(), graphs, "cuda", seconds=seconds).median_s


def spread(times: Sequence[float]) -> float:
    """Return the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return float(high - low)


def synchronize(device: str) -> None:
    """Synchronise with the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], Any], device: str) -> tuple[int, int]:
    """Return the peak of bytes that ``function`` allocates, and the bytes of returned tensors."""
    if device != "cuda":
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            results = function()
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        allocated = peak = 0
        for _, change in changes:
            allocated += change
            peak = max(peak, allocated)
        return peak, _bytes(results)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, _bytes(results)


def _bytes(results: Any) -> int:
    if isinstance(results, Tensor):
        return results.nbytes
    items = results.values() if isinstance(results, dict) else results
    return sum(map(_bytes, items)) if isinstance(results, (dict, list, tuple)) else 0


def _events(step: Step, sets: Sequence[Any], repeats: int, enqueued_s: float) -> list[float]:
    wait = int(min(LONGEST_WAIT_S, 1.5 * enqueued_s + 1e-4) * CYCLES_PER_S)
    pairs = []
    for i in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(wait)
        start.record()
        step(sets[i % len(sets)])
        end.record()
        pairs.append((start, end))
        end.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _clock(step: Step, sets: Sequence[Any], repeats: int, _: float) -> list[float]:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        step(sets[i % len(sets)])
        times.append(time.perf_counter() - start)
    return times
