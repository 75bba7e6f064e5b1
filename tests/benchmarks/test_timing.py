"""Times and bytes of a step; what a GPU would be asked for, by a stand-in."""

import time

import pytest
import torch

from benchmarks import timing, transcoder_cases
from benchmarks.roofs import Roofs


def test_each_set_is_used_in_turn_within_the_time():
    seen = []
    measured = timing.measure(seen.append, ["a", "b"], "cpu", seconds=0.0, least=4)
    assert measured.repeats == 4
    assert seen == ["a", "a", *"abab", "a"]  # warm-up, length of one, timed, memory
    assert 0 < measured.median_s < 0.1
    assert measured.spread_s >= 0


def test_no_more_repeats_than_needed():
    short = timing.measure(lambda _: None, [0], "cpu", seconds=100)
    assert short.repeats == timing.MOST_OF_SHORT
    longer = timing.measure(lambda _: time.sleep(2e-3), [0], "cpu", seconds=100)
    assert longer.repeats == timing.MOST


def test_a_slow_step_is_repeated_less():
    measured = timing.measure(lambda _: time.sleep(0.31), [0], "cpu", seconds=0.3, least=5)
    assert measured.repeats == timing.LEAST_OF_SLOW
    one = timing.measure(lambda _: time.sleep(0.31), [0], "cpu", seconds=0.3, least=1)
    assert one.repeats == 1


def test_the_spread_is_that_of_the_quartiles():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == 4.0
    assert timing.spread([1.0]) == 0.0


def test_bytes_held_at_once_and_bytes_returned():
    def step() -> dict[str, torch.Tensor]:
        first = torch.ones(250_000)
        return {"sum": first + first}  # both exist, 1 MB each

    peak, returned = timing.peak_bytes(step, "cpu")
    assert 2_000_000 <= peak < 2_100_000
    assert returned == 1_000_000


class FakeGPU:
    """Records what is asked of the stream; an event's time is how many entries came before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: list[str] = []
        stream = self.stream

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                stream.append("event")
                self.place = len(stream)

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return float(end.place - self.place)

        monkeypatch.setattr(torch.cuda, "Event", Event)

        def sleep(cycles: int) -> None:
            busy = cycles >= timing.BUSY_S * timing.CYCLES_PER_S
            stream.append("busy" if busy else "wait")

        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        for name, value in (
            ("synchronize", None),
            ("reset_peak_memory_stats", None),
            ("memory_allocated", 100),
            ("max_memory_allocated", 350),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def test_events_bracket_the_step_alone_behind_a_wait(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    step = lambda _: gpu.stream.extend(["kernel", "kernel"])  # noqa: E731
    measured = timing.measure(step, [0, 1], "cuda", seconds=0.0, least=3)
    first = gpu.stream.index("busy")  # clocks go up
    assert gpu.stream[:first] == ["kernel"] * 8  # a warm-up of both sets and once more; then one
    repeat = ["wait", "event", "kernel", "kernel", "event"]
    assert gpu.stream[first : first + 16] == ["busy", *repeat * 3]
    assert measured.median_s == pytest.approx(3e-3)  # three places later, in milliseconds
    assert measured.peak_bytes == 250


def test_the_higher_floor_counts():
    roofs = Roofs(copy_bytes_per_s=100.0, gemm_flops_per_s=1000.0, dtype="bfloat16")
    assert roofs.floor_s(flops=500.0, n_bytes=10.0) == 0.5
    assert roofs.floor_s(flops=500.0, n_bytes=80.0) == 0.8


def test_sets_of_a_serving_step_exceed_the_cache_by_what_every_row_reads(monkeypatch):
    asked = []
    monkeypatch.setattr(
        transcoder_cases, "copies", lambda n_bytes, device: asked.append(n_bytes) or 2
    )
    transcoder_cases.serving_case(1, 8, 16, 1, torch.float32, "cpu")
    assert asked == [16 * 8 * 4]  # W_enc alone
