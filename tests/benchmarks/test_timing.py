"""Times and bytes of a step; requests to a GPU, recorded by a stand-in."""

import time

import pytest
import torch

from benchmarks import timing, transcoder_cases
from benchmarks.roofs import Roofs


def test_each_set_is_used_in_turn_within_the_time() -> None:
    used: list[str] = []
    measured = timing.measure(used.append, ["a", "b"], "cpu", seconds=0.0, least=4)
    assert measured.repeats == 4
    assert used == ["a", "a", *"abab", "a"]  # warm-up, length of one, timed, memory
    assert 0 < measured.median_s < 0.1
    assert measured.spread_s >= 0


def test_no_more_repeats_than_needed() -> None:
    short = timing.measure(lambda _: None, [0], "cpu", seconds=100)
    assert short.repeats == timing.MOST_OF_SHORT
    longer = timing.measure(lambda _: time.sleep(2e-3), [0], "cpu", seconds=100)
    assert longer.repeats == timing.MOST


def test_a_slow_step_is_repeated_less_often() -> None:
    measured = timing.measure(lambda _: time.sleep(0.31), [0], "cpu", seconds=0.3, least=5)
    assert measured.repeats == timing.LEAST_OF_SLOW
    single = timing.measure(lambda _: time.sleep(0.31), [0], "cpu", seconds=0.3, least=1)
    assert single.repeats == 1


def test_the_spread_is_the_distance_between_the_quartiles() -> None:
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == 4.0
    assert timing.spread([1.0]) == 0.0


def test_peak_bytes_and_returned_bytes() -> None:
    def step() -> dict[str, torch.Tensor]:
        first = torch.ones(250_000)
        return {"sum": first + first}  # both exist, 1 MB each

    peak, returned = timing.peak_bytes(step, "cpu")
    assert 2_000_000 <= peak < 2_100_000
    assert returned == 1_000_000


class FakeGPU:
    """Record requests to the stream; an event's time is the number of earlier requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: list[str] = []
        stream = self.stream

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                stream.append("event")
                self.index = len(stream)

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return float(end.index - self.index)

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


def test_events_bracket_only_the_step_after_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    step = lambda _: gpu.stream.extend(["kernel", "kernel"])  # noqa: E731
    measured = timing.measure(step, [0, 1], "cuda", seconds=0.0, least=3)
    first = gpu.stream.index("busy")  # raises the clocks
    assert gpu.stream[:first] == ["kernel"] * 8  # three warm-up steps, then one
    repeat = ["wait", "event", "kernel", "kernel", "event"]
    assert gpu.stream[first : first + 16] == ["busy", *repeat * 3]
    assert measured.median_s == pytest.approx(3e-3)  # three requests later, in milliseconds
    assert measured.peak_bytes == 250


def test_the_floor_is_the_larger_of_two() -> None:
    roofs = Roofs(copy_bytes_per_s=100.0, gemm_flops_per_s=1000.0, dtype="bfloat16")
    assert roofs.floor_s(flops=500.0, n_bytes=10.0) == 0.5
    assert roofs.floor_s(flops=500.0, n_bytes=80.0) == 0.8


def test_the_number_of_serving_sets_follows_from_the_bytes_of_w_enc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[int] = []

    def copies(n_bytes: int, device: str) -> int:
        requests.append(n_bytes)
        return 2

    monkeypatch.setattr(transcoder_cases, "copies", copies)
    transcoder_cases.serving_case(1, 8, 16, 1, torch.float32, "cpu")
    assert requests == [16 * 8 * 4]  # bytes of W_enc
