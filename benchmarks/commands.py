"""The three commands of gpu.py: lists of parts, checks first, then the most important rows.

Entries of a list share the run's time in proportion to their ``share``. Two entries may yield rows
of the same part: implementations that take long to compile, and peers, come after this library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import every_kernel, exactness, kernel_tests, lengths, sanitizer
from benchmarks.case import Case, Row, row
from benchmarks.parts import PARTS, Scale
from benchmarks.roofs import Roofs

__all__ = ["COMMANDS", "Context", "Entry", "measured"]

REPEATS = 250


class Context(NamedTuple):
    """What the entries of a command need."""

    scale: Scale
    quick: bool
    roofs: Roofs
    env: dict[str, str]  #: environment of subprocesses
    left: Callable[[], float]  #: returns the seconds left to the entry that runs


class Entry(NamedTuple):
    """A generator of rows of a part, and its share of the run's time."""

    part: str
    rows: Callable[[], Iterator[Row]]
    share: float


def kernels(c: Context) -> list[Entry]:
    """Every kernel once; times of the transcoder and of elementwise ops, with their kernels'."""
    early, late = partial(_cases, c, 0), partial(_cases, c, 1)
    every = partial(every_kernel.rows, c.scale.device, quick=c.quick)
    return [
        Entry("every kernel", every, 110),
        early("transcoder", 90),
        early("block", 40),
        late("transcoder", 90),
        late("block", 50),
        early("shapes", 70),
    ]


def step(c: Context) -> list[Entry]:
    """Whole steps of a pair: agreement with the plain step, times, random lengths, repeats."""
    # Unlike the other commands, this one imports transformers and the trainer.
    from benchmarks import whole_step

    sizes = whole_step.SMALL if c.quick else whole_step.PAPER
    bench = whole_step.StepBench(sizes, c.scale.device, c.roofs)
    return [
        Entry("agreement", bench.agreement, 60),
        Entry("step", bench.plain, 80),
        Entry("step", bench.ours, 120),
        Entry("repeated step", bench.repeated, 40),
        Entry("random lengths", bench.random_lengths, 180),
    ]


def checks(c: Context) -> list[Entry]:
    """Tests, repeats and large indices; the other ops and their peers; the sanitizer."""
    early, late = partial(_cases, c, 0), partial(_cases, c, 1)
    times = 2 if c.quick else REPEATS
    run: dict[str, Any] = {"quick": c.quick, "env": c.env, "left": c.left}
    return [
        Entry("tests", partial(kernel_tests.rows, **run), 120),
        Entry("repeats", lambda: exactness.repeats(c.scale, times), 50),
        Entry("indices", lambda: exactness.large_indices(c.scale), 30),
        early("linear_kl", 40),
        early("topk", 15),
        early("serving", 25),
        early("sweep", 40),
        late("linear_kl", 40),
        late("topk", 15),
        late("sweep", 30),
        Entry("lengths", lambda: lengths.rows(c.scale, **run), 45),
        Entry("sanitizer", lambda: sanitizer.rows(c.scale.device, c.env, c.left), 60),
    ]


COMMANDS: dict[str, Callable[[Context], list[Entry]]] = {
    function.__name__: function for function in (kernels, step, checks)
}


def _cases(c: Context, half: int, part: str, share: float) -> Entry:
    def rows() -> Iterator[Row]:
        yield from measured(c, (case.split()[half] for case in PARTS[part](c.scale)))

    return Entry(part, rows, share)


def measured(c: Context, cases: Iterable[Case]) -> Iterator[Row]:
    """Yield the rows of each case. A failed step yields a row too."""
    seconds, least = (0.0, 1) if c.quick else (0.3, 5)
    for case in cases:
        try:
            for name, step in case.steps.items():
                try:
                    yield row(case, name, c.roofs, seconds=seconds, least=least)
                except torch.AcceleratorError:
                    raise  # the device no longer works
                except Exception as error:
                    failed: dict[str, Any] = {"op": case.op, "implementation": name}
                    failed |= {"kind": step.kind, "shape": case.shape, "right": False}
                    yield failed | {"error": f"{type(error).__name__}: {error}"}
        finally:  # also if the time ends within the case
            case.release()
