"""Measure recompilation for changing lengths: calls with random numbers of tokens.

``python -m benchmarks.lengths NAME DEVICE [quick]`` runs one implementation with empty compiler
caches. It prints one JSON line with the seconds of the first call of each length, the seconds of a
second pass over the lengths, and the number of compilations.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers
from benchmarks.case import Inputs, Row, compiled
from benchmarks.parts import Scale, scale
from benchmarks.timing import synchronize
from fastadapt.kernels.device import runs_triton

__all__ = ["rows"]

N_LENGTHS = 20
TIMEOUT_S = 75
COMPILED = "reference compiled"
PEERS = ("eai-sparsify", "fla-core", "liger-kernel")
L0 = 10


def lengths(s: Scale) -> list[int]:
    """Return the lengths, equal for all implementations."""
    return random.Random(0).sample(range(max(1, s.T // 8), s.T), min(N_LENGTHS, s.T // 2))


def names(s: Scale) -> list[str]:
    """Return the implementations of this library, then available peers."""
    result = ["sparse"] if s.device == "cpu" else []
    if runs_triton(s.device):
        result += ["triton", "linear_kl triton"]
    result += [COMPILED] if s.backend else []
    missing = peers.missing() if s.device == "cuda" else PEERS
    return result + [name for name in PEERS if name not in missing]


def rows(s: Scale, *, quick: bool, env: dict[str, str], left: Callable[[], float]) -> Iterator[Row]:
    """Yield one row per implementation, each measured in a separate process."""
    for name in ["triton"] if quick else names(s):
        seconds = min(TIMEOUT_S, max(left(), 1.0))
        kind = "peer" if name in PEERS else "reference" if name == COMPILED else "ours"
        row: Row = {"op": "lengths in a row", "implementation": name, "kind": kind}
        with tempfile.TemporaryDirectory() as cache:
            caches = {"TRITON_CACHE_DIR": f"{cache}/t", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/i"}
            command = [sys.executable, "-m", "benchmarks.lengths", name, s.device]
            command += ["quick"] if quick else []
            options: dict[str, Any] = {"env": env | caches, "capture_output": True, "text": True}
            try:
                result = subprocess.run(command, timeout=seconds, check=False, **options)
            except subprocess.TimeoutExpired:
                yield row | {"error": f"not finished in {seconds:.0f} s"}
                continue
        if result.returncode:
            error = (result.stderr.strip().splitlines() or ["no message"])[-1]
            yield row | {"right": False, "error": error}
        else:
            yield row | json.loads(result.stdout.strip().splitlines()[-1])


def _transcoder(s: Scale, name: str) -> Callable[[int], None] | None:
    from benchmarks import transcoder_cases, transcoder_steps

    inputs = transcoder_steps.make_inputs(s.T, s.d, s.F, L0, s.dtype, s.device, 0)
    if name == COMPILED:
        assert s.backend is not None
        function = compiled(transcoder_steps.reference, s.backend, None)
        run: Callable[[Inputs], Any] = transcoder_steps.differentiated(function)
    elif name == "eai-sparsify":
        case = transcoder_cases.topk_case(s.T, s.d, s.F, s.ks[-1], s.dtype, s.device)
        if name not in case.steps:
            return None
        run = case.steps[name].run
    else:

        def run(part: Inputs) -> Any:
            T = len(part["x"])
            plan = transcoder_cases.plan_of(2 * L0 * T, T, s.F, s.dtype, s.device)
            return transcoder_steps.step(part, name, None if name == "sparse" else plan)

    def call(T: int) -> None:
        cut = {key: inputs[key][:T] for key in ("x", "residual", "g")}
        leaves = {key: t.detach().clone().requires_grad_(key != "g") for key, t in cut.items()}
        run(inputs | leaves)

    return call


def _head(s: Scale, name: str) -> Callable[[int], None] | None:
    from benchmarks import head_cases

    full = head_cases.case(1, s.T, s.head_width, s.V, s.dtype, s.device, backend=None)
    step = full.steps.get(name.removeprefix("linear_kl "))
    if step is None:
        return None
    inputs = head_cases.make_inputs(1, s.T, s.head_width, s.V, s.dtype, s.device, 0)

    def call(T: int) -> None:
        students = inputs["students"].detach()[:, :T].clone().requires_grad_()
        step.run(inputs | {"teacher": inputs["teacher"][:T], "students": students})

    return call


def main(name: str, device: str, quick: bool) -> Row:
    """Measure one implementation, in this process."""
    s = scale(device, quick=quick)
    kernels = count_kernels()
    of_head = name.startswith("linear_kl") or name in ("fla-core", "liger-kernel")
    call = (_head if of_head else _transcoder)(s, name)
    if call is None:
        return {"error": "not installed"}

    def seconds(T: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        call(T)
        synchronize(device)
        return time.perf_counter() - start

    passes = [[seconds(T) for T in lengths(s)] for _ in range(2)]
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) if s.backend else 0
    return {
        "lengths": lengths(s),
        "first_s": passes[0],
        "again_s": passes[1],
        "kernels_compiled": sum(kernels.values()),
        "most_of_one_kernel": max(kernels.values(), default=0),
        "graphs_compiled": graphs,
    }


def count_kernels() -> Counter[str]:
    """Counts by name the Triton kernels compiled (or, interpreted, none) from now on."""
    import triton

    counts: Counter[str] = Counter()

    def count(*, fn: Any, **_: Any) -> None:
        counts[f"{fn.module}.{fn.name}"] += 1

    triton.knobs.runtime.jit_post_compile_hook = count
    return counts


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(main(arguments[0], arguments[1], "quick" in arguments)))
