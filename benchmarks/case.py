"""Cases: an op with shapes, its implementations, oracle and cost; and the rows measured of a case.

A row's results are compared with the oracle before the row is timed. Steps use several sets of
inputs in turn. Inputs that a step overwrote, as liger-kernel's SwiGLU does, are made anew before
the next step, and the row says so. Tables and plots show the names of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.profiling import kernel_times
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
    "bits",
    "cast",
    "compiled",
    "copies",
    "describe",
    "overwritten",
    "row",
    "shares",
]

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Row = dict[str, Any]
Truth = Callable[[Inputs, torch.dtype], Results]


@dataclass(frozen=True)
class Cost:
    """Work of a step, independent of the implementation."""

    flops: float  #: operations of the matrix products, by the op's FLOP formulas
    n_bytes: float  #: bytes if every input is read once and every result is written once


@dataclass(frozen=True)
class Step:
    """An implementation to time. A ``floor`` computes only part of the work and is not checked."""

    run: Callable[[Inputs], Any]
    kind: str = "ours"  #: "ours", "reference", "peer" or "floor"
    note: str = ""  #: difference in meaning from the case
    truth: Truth | None = None  #: oracle, if not the case's
    cost: Cost | None = None  #: cost, if not the case's
    graph: bool = False  #: also time the step replayed as a CUDA graph
    beside: Callable[[Inputs], Any] | None = None  #: on a CPU, step timed alternately with this one


@dataclass(frozen=True)
class Case:
    """An op with shapes and dtype, its implementations and its oracle.

    ``truth(inputs, dtype)`` is the oracle for float64, and the oracle's peer for the case's dtype.
    Inputs can be large. They are generated at first use and stay in memory until :meth:`release`.
    ``make`` returns equal inputs at every call.
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
        """Sets of inputs, which steps share."""
        sets = self.make()
        self.__dict__["_sums"] = [_checksums(inputs) for inputs in sets]
        return sets

    @cached_property
    def cost(self) -> Cost:
        """Cost of steps without a cost."""
        return self.weigh(self.sets)

    @cached_property
    def _expected(self) -> dict[Truth, tuple[Results, Results]]:
        return {}

    def check(self, name: str) -> None:
        """Raise AssertionError unless the step's results on the first set are within the budget."""
        step = self.steps[name]
        truth = step.truth or self.truth
        if truth not in self._expected:
            self._expected.clear()  # results are large: store those of one oracle
            inputs = self.sets[0]
            self._expected[truth] = truth(inputs, torch.float64), truth(inputs, self.dtype)
        oracle, peer = self._expected[truth]
        actual = step.run(self.sets[0])
        missing = set(oracle) - set(actual)
        if step.kind != "peer" and missing:
            raise AssertionError(f"{name}: missing results: {', '.join(sorted(missing))}")
        for key, result in actual.items():
            assert_close(result, oracle[key], peer[key], name=f"{name}: {key}")

    def split(self) -> tuple[Case, Case]:
        """Return the case without, and with only, steps that take long to compile, and peers."""
        late = {n for n, s in self.steps.items() if s.kind == "peer" or n.endswith(" compiled")}
        return self.only(*(self.steps.keys() - late)), self.only(*late)

    def only(self, *names: str) -> Case:
        """Return the case with only the named steps; unknown names are ignored."""
        return replace(self, steps={n: step for n, step in self.steps.items() if n in names})

    def restore(self) -> list[str]:
        """Free inputs that a step overwrote, so that they are made anew; return their names."""
        if "sets" not in self.__dict__:
            return []
        pairs = zip(self.sets, self.__dict__["_sums"], strict=True)
        changed = {
            name
            for inputs, sums in pairs
            for name, now in _checksums(inputs).items()
            if not torch.equal(now, sums[name])
        }
        if changed:
            del self.__dict__["sets"], self.__dict__["_sums"]
        return sorted(changed)

    def release(self) -> None:
        """Free inputs and expected results."""
        for name in ("sets", "_sums", "_expected"):
            self.__dict__.pop(name, None)
        if self.device == "cuda":  # make the memory available to other processes
            torch.cuda.empty_cache()

    @property
    def label(self) -> str:
        """The shape as one line of text."""
        return " ".join(f"{key}={value}" for key, value in self.shape.items())


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return the inputs with all floating tensors but scalars in ``dtype``; leaves stay leaves."""
    changed = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            value = value.detach().to(dtype).requires_grad_(value.requires_grad)
        changed[key] = value
    return changed


def bits(tensor: Tensor) -> Tensor:
    """Return the bits as integers, since NaN does not equal NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def _checksums(inputs: Inputs) -> dict[str, Tensor]:
    """Return sums of the bits along the last dimension, of every tensor."""
    return {
        name: bits(value).sum(-1, dtype=torch.int64)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def compiled(function: Callable[..., Any], backend: str, dynamic: bool | None) -> Any:
    """Return ``function``, compiled at its first call, once per process."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _compile(function, backend, dynamic)(*args, **kwargs)

    return call


@cache
def _compile(function: Callable[..., Any], backend: str, dynamic: bool | None) -> Any:
    return torch.compile(function, backend=backend, dynamic=dynamic)


def copies(set_bytes: int, device: str) -> int:
    """Return the number of sets of inputs that together exceed three times the cache."""
    if device != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    return max(2, min(8, -(-3 * cache // max(set_bytes, 1))))


def row(case: Case, name: str, roofs: Roofs, *, seconds: float = 0.4, least: int = LEAST) -> Row:
    """Check and time one step; of floors and this library's steps, list the kernels' times.

    An implementation of this library with wrong results is not timed; a peer or a reference is
    timed and labelled. Errors of a peer and out-of-memory errors of any step are recorded in the
    row. A step that overwrites its inputs is labelled, and wrong unless it is a peer.
    """
    try:
        result = _checked_and_timed(case, name, roofs, seconds, least)
    except torch.AcceleratorError:
        raise  # the device no longer works
    except Exception:
        case.restore()
        raise
    return result | overwritten(case, name)


def overwritten(case: Case, name: str) -> Row:
    """Restore inputs that the step overwrote; return the fields of its row that say so."""
    changed = case.restore()
    if not changed:
        return {}
    wrong = {"right": False, "wrong": f"overwrites {', '.join(changed)}"}
    return {"overwrites": changed} | (wrong if case.steps[name].kind != "peer" else {})


def _checked_and_timed(case: Case, name: str, roofs: Roofs, seconds: float, least: int) -> Row:
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
            if step.kind in ("ours", "floor"):
                run = partial(step.run, case.sets[0])
                result["kernels"] = kernel_times(run, case.device)
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
        except RuntimeError as error:  # the step cannot be captured
            result["no_graph"] = str(error)
    return result | shares(step.cost or case.cost, result.get("graph_s", timed.median_s), roofs)


def describe(case: Case, name: str) -> Row:
    """Return the fields of a row that do not depend on a measurement."""
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
    """Return the fractions of the product rate, of the copy bandwidth, and of the binding roof."""
    return {
        "flops": cost.flops,
        "bytes": cost.n_bytes,
        "share_of_gemm": cost.flops / seconds / roofs.gemm_flops_per_s,
        "share_of_copy": cost.n_bytes / seconds / roofs.copy_bytes_per_s,
        "share_of_roof": roofs.floor_s(cost.flops, cost.n_bytes) / seconds,
    }


def add_ratios(rows: Sequence[Row]) -> None:
    """Add to each row its speed relative to every reference, peer and floor of its shape."""
    for row in rows:
        if "median_s" in row:
            row["times_as_fast_as"] = {
                other["implementation"]: other["median_s"] / row["median_s"]
                for other in rows
                if other["kind"] != "ours"
                and other is not row
                and "median_s" in other
                and (other["op"], other["shape"]) == (row["op"], row["shape"])
            }
