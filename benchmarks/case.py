"""One op on one set of shapes: who computes it, what is right, what it costs; and its rows.

A row is first shown to be right on its own inputs, then timed. Inputs come in several sets, used in
turn. Names of steps are what tables and plots show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofs import Roofs
from benchmarks.timing import LEAST, measure, measure_graph
from fastadapt.kernels.testing import assert_close

__all__ = [
    "Case",
    "Cost",
    "Inputs",
    "Results",
    "Row",
    "Step",
    "add_ratios",
    "cast",
    "compiled",
    "copies",
    "describe",
    "row",
    "shares",
]

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Row = dict[str, Any]
Truth = Callable[[Inputs, torch.dtype], Results]


@dataclass(frozen=True)
class Cost:
    """What a step must do, whoever computes it."""

    flops: float  #: of the matrix products, by the op's own formulas
    n_bytes: float  #: every input read once, every result written once


@dataclass(frozen=True)
class Step:
    """Something to time. A ``floor`` is not checked: it is a part of the work, alone."""

    run: Callable[[Inputs], Any]
    kind: str = "ours"  #: "ours", "reference", "peer" or "floor"
    note: str = ""  #: how its meaning differs, if it does
    truth: Truth | None = None  #: what is right, where that is not the case's
    cost: Cost | None = None  #: where that is not the case's
    graph: bool = False  #: also time it replayed as a CUDA graph
    beside: Callable[[Inputs], Any] | None = None  #: on a CPU, timed in turn with this, in pairs


@dataclass(frozen=True)
class Case:
    """``truth(inputs, dtype)``: float64 is the oracle, the case's own dtype the oracle's peer.

    Inputs, which may be large, are made when first needed, and held until :meth:`release`.
    """

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype
    device: str
    make: Callable[[], Sequence[Inputs]]
    steps: dict[str, Step]
    truth: Truth
    weigh: Callable[[Sequence[Inputs]], Cost]
    facts: Callable[[Sequence[Inputs]], dict[str, Any]] = lambda _: {}  # recorded with every row

    @cached_property
    def sets(self) -> Sequence[Inputs]:
        """The inputs."""
        return self.make()

    @cached_property
    def cost(self) -> Cost:
        """Of a step that says nothing of its own."""
        return self.weigh(self.sets)

    @cached_property
    def _expected(self) -> dict[Truth, tuple[Results, Results]]:
        return {}

    def check(self, name: str) -> None:
        """Raises AssertionError unless the step's results are right on the first set."""
        step = self.steps[name]
        truth = step.truth or self.truth
        if truth not in self._expected:
            self._expected.clear()  # one at a time: they are large
            inputs = self.sets[0]
            self._expected[truth] = truth(inputs, torch.float64), truth(inputs, self.dtype)
        oracle, peer = self._expected[truth]
        actual = step.run(self.sets[0])
        missing = set(oracle) - set(actual)
        if step.kind != "peer" and missing:
            raise AssertionError(f"{name}: results without {', '.join(sorted(missing))}")
        for key, result in actual.items():
            assert_close(result, oracle[key], peer[key], name=f"{name}: {key}")

    def only(self, *names: str) -> Case:
        """With some of its steps (those that it has)."""
        return replace(self, steps={n: step for n, step in self.steps.items() if n in names})

    def release(self) -> None:
        """Frees inputs and what was compared with."""
        for name in ("sets", "_expected"):
            self.__dict__.pop(name, None)
        if self.device == "cuda":  # to those who come in processes of their own, too
            torch.cuda.empty_cache()

    @property
    def label(self) -> str:
        """The shape in one line."""
        return " ".join(f"{key}={value}" for key, value in self.shape.items())


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same inputs, all floating tensors but scalars in ``dtype``; leaves stay leaves."""
    changed = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            value = value.detach().to(dtype).requires_grad_(value.requires_grad)
        changed[key] = value
    return changed


def compiled(function: Callable[..., Any], backend: str, dynamic: bool | None) -> Any:
    """``function``, compiled at its first call, once for the whole process."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _compile(function, backend, dynamic)(*args, **kwargs)

    return call


@cache
def _compile(function: Callable[..., Any], backend: str, dynamic: bool | None) -> Any:
    return torch.compile(function, backend=backend, dynamic=dynamic)


def copies(set_bytes: int, device: str) -> int:
    """How many sets of inputs it takes to be larger than the cache, thrice."""
    if device != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    return max(2, min(8, -(-3 * cache // max(set_bytes, 1))))


def row(case: Case, name: str, roofs: Roofs, *, seconds: float = 0.4, least: int = LEAST) -> Row:
    """Checks and times one step. Ours is not timed if it is wrong; others are, and labelled.

    A peer that fails says how in its row. Running out of memory is a result, whoever does.
    """
    step = case.steps[name]
    result = describe(case, name)
    with warnings.catch_warnings():
        if step.kind == "peer":
            warnings.simplefilter("ignore")
        try:
            result["right"] = None if step.kind == "floor" else _is_right(case, name, result)
            if result["right"] is False and step.kind == "ours":
                return result
            timed = measure(step.run, case.sets, case.device, seconds=seconds, least=least)
        except torch.OutOfMemoryError:
            return result | {"error": "out of memory"}
        except Exception as error:
            if step.kind != "peer":
                raise
            return result | {"error": f"{type(error).__name__}: {error}"}
    result |= timed._asdict()
    if step.graph:
        try:
            result["graph_s"] = measure_graph(step.run, case.sets)
        except RuntimeError as error:  # it cannot be captured
            result["no_graph"] = str(error)
    return result | shares(step.cost or case.cost, result.get("graph_s", timed.median_s), roofs)


def describe(case: Case, name: str) -> Row:
    """What a row says before anything ran."""
    step = case.steps[name]
    result: Row = {
        "op": case.op,
        "implementation": name,
        "kind": step.kind,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        **case.facts(case.sets),
    }
    return result | ({"note": step.note} if step.note else {})


def _is_right(case: Case, name: str, result: Row) -> bool:
    try:
        case.check(name)
    except AssertionError as error:
        result["wrong"] = str(error)
        return False
    return True


def shares(cost: Cost, seconds: float, roofs: Roofs) -> Row:
    """How close to the roof of products, to that of copies, and to the one that counts."""
    return {
        "flops": cost.flops,
        "bytes": cost.n_bytes,
        "share_of_gemm": cost.flops / seconds / roofs.gemm_flops_per_s,
        "share_of_copy": cost.n_bytes / seconds / roofs.copy_bytes_per_s,
        "share_of_roof": roofs.floor_s(cost.flops, cost.n_bytes) / seconds,
    }


def add_ratios(rows: Sequence[Row]) -> None:
    """To each row of a case: how many times as fast it is as every row that is no ours."""
    others = {r["implementation"]: r for r in rows if r["kind"] != "ours" and "median_s" in r}
    for r in rows:
        if "median_s" in r:
            r["times_as_fast_as"] = {
                name: other["median_s"] / r["median_s"]
                for name, other in others.items()
                if other is not r
            }
