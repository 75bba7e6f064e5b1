"""Run every op in every implementation once at small, odd sizes; compare with float64.

The cases are those of ``fastadapt doctor``, so an op added there runs here too, and a forward pass
without gradients. A Triton kernel that no case launches is an error.

``python -m benchmarks.every_kernel DEVICE`` runs all without output, for use under a sanitizer; the
exit code is 1 if a result is wrong.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Row
from benchmarks.exactness import check_claim
from benchmarks.transcoder_cases import implementations, serving_case
from fastadapt.kernels.checks import FEW, SIZES, Sizes, checks_of
from fastadapt.kernels.device import runs_triton

__all__ = ["kernels", "launches", "rows"]

TINY = Sizes(1, 7, 16, 32)  # for the interpreter
ODD = (Sizes(1, 3, 64, 131), Sizes(1, 67, 40, 200), Sizes(1, 300, 72, 520))


def rows(device: str, *, quick: bool = False) -> Iterator[Row]:
    """Yield a row per check, and a row about the kernels that were launched.

    On a GPU, bfloat16 comes first, since the paper's adapters use it.
    """
    sizes = (TINY,) if quick else (SIZES.get(device, FEW), *ODD)
    low = torch.bfloat16 if device == "cuda" else torch.float16
    all_kernels = kernels() if runs_triton(device) else {}
    with launches(all_kernels) as launched:
        for dtype in (torch.float32,) if quick else (low, torch.float32):
            for size in sizes:
                shape = {"T": size.rows * size.tokens, "d": size.width, "F": size.features}
                for check in checks_of(torch.device(device), size, dtype):
                    yield {
                        "op": check.op,
                        "implementation": check.implementation,
                        "shape": shape if check.op == "transcoder" else {},
                        "claim": f"{check.case or 'results'} in {check.dtype} within the budget",
                        "right": check.ok,
                        "share_of_budget": check.share,
                        "wrong": check.message,
                    }
            # Few features are active, so that codes are planned on a GPU too.
            serving = serving_case(3, 64, 1031, 2.0, dtype, device)
            for name in implementations(device):
                yield check_claim(
                    "serving", name, f"results in {str(dtype)[6:]}", _wrong(serving, name)
                )
            if quick:  # the interpreter is too slow for the sizes at which all kernels are launched
                return
            missing = ", ".join(sorted(set(all_kernels) - launched))
            claim = f"the cases launch all {len(all_kernels)} kernels"
            wrong = f"not launched: {missing}" if missing else ""
            yield check_claim("every kernel", str(dtype)[6:], claim, partial(str, wrong))


def _wrong(case: Case, name: str) -> Callable[[], str]:
    def message() -> str:
        try:
            case.check(name)
        except AssertionError as error:
            return str(error)
        return ""

    return message


def kernels() -> dict[str, Any]:
    """Return by name the Triton kernels of all ops that a module launches, ``name[grid](...)``."""
    import triton

    result = {}
    for path in sorted(Path(__file__).parents[1].glob("kernels/*/triton_*.py")):
        module = importlib.import_module(f"fastadapt.kernels.{path.parent.name}.{path.stem}")
        launched = set(re.findall(r"\b(\w+)\[", inspect.getsource(module)))
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.jit.KernelInterface) and name in launched:
                result[name] = value
    return result


@contextmanager
def launches(kernels: dict[str, Any]) -> Iterator[set[str]]:
    """Yield a set to which the names of launched kernels are added."""
    names: set[str] = set()
    kinds: set[Any] = set(map(type, kernels.values()))
    originals = {kind: kind.run for kind in kinds}

    def recording(run: Any) -> Any:
        def record(self: Any, *args: Any, **options: Any) -> Any:
            names.add(self.fn.__name__)
            return run(self, *args, **options)

        return record

    for kind, run in originals.items():
        kind.run = recording(run)
    try:
        yield names
    finally:
        for kind, run in originals.items():
            kind.run = run


if __name__ == "__main__":
    sys.exit(not all(row["right"] for row in rows(sys.argv[1])))
