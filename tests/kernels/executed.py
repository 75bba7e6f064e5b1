"""Execute the compiled kernels on a CPU, in place of Triton's interpreter.

With the environment variable FASTADAPT_IR, the tests in this folder compile every launch for a GPU
and execute the compiler's intermediate representation with ttsem. FASTADAPT_IR names a stage:
``ttir``, the kernel as Triton's frontend compiles it, or ``ttgir``, the module after every pass for
the GPU (layouts, tensor cores, tile copies). FASTADAPT_IR_TARGET is the compute capability, 90 by
default.

A launch fails its test if it leaves the storage of the tensors that it was given, if two programs
use the same bytes and one of them writes, or if an operation is undefined. Products of bfloat16
matrices, which the interpreter gets wrong, are correct here.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

STAGE = os.environ.get("FASTADAPT_IR")
TARGET = int(os.environ.get("FASTADAPT_IR_TARGET", "90"))
#: Whether a run fails that leaves a kernel out, or does not check a launch for races.
EVERY_KERNEL = os.environ.get("FASTADAPT_IR_EVERY_KERNEL") == "1"
#: Compiled kernels, whose text has another form than in Triton's own cache.
CACHE = Path(__file__).parents[2] / "build" / "triton-executed"
_open = ExitStack()  # the session, until the process ends
atexit.register(_open.close)


class Record:
    """What a process executed.

    Attributes:
        launches: number of launches by kernel.
        unchecked: launches with too many accesses to look for races.
        worst: by dtype, the largest error of an accepted result divided by its budget.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.unchecked = 0
        self.worst: dict[str, float] = {}

    def add(self, launches: dict[str, int], unchecked: int, worst: dict[str, float]) -> None:
        """Add what another process executed."""
        self.launches.update(launches)
        self.unchecked += unchecked
        for dtype, ratio in worst.items():
            self.worst[dtype] = max(ratio, self.worst.get(dtype, 0.0))

    def as_tuple(self) -> tuple[dict[str, int], int, dict[str, float]]:
        """Return the values in plain types, as arguments of :meth:`add`."""
        return dict(self.launches), self.unchecked, self.worst

    def missing(self) -> list[str]:
        """Return the kernels of the ops that were not launched."""
        from device_code import launched_kernels

        return [name for name in launched_kernels() if name not in self.launches]

    def lines(self) -> list[str]:
        """Return the record as text."""
        numbers = f"{sum(self.launches.values())} launches of {len(self.launches)} kernels"
        errors = [f"{dtype} {ratio:.2f}" for dtype, ratio in sorted(self.worst.items())]
        return [
            f"executed {STAGE} for sm_{TARGET}: {numbers}, {self.unchecked} not checked for races",
            f"largest error over its budget: {', '.join(errors)}",
            f"kernels without a launch: {', '.join(self.missing()) or 'none'}",
            *(f"  {name}: {n}" for name, n in sorted(self.launches.items())),
        ]


def start() -> Record:
    """Replace the launches of this process from now on; return their record."""
    from triton.runtime.jit import JITFunction
    from ttsem import harness, sanitize
    from ttsem._fakedriver import unstub_torch_cuda

    from fastadapt.kernels import device, testing

    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    record = Record()
    device.runs_triton = lambda device_type: True  # before an op imports the function
    compiled = harness.ir_for_launch

    def module(launch: Any, _: str, target: Any) -> str:
        return compiled(launch, STAGE or "ttir", target)

    replaceable: Any = harness
    replaceable.ir_for_launch = module
    state = _open.enter_context(sanitize.session(TARGET, "tests", cuda_is_cpu=False))
    unstub_torch_cuda()  # tensors are on the CPU, and torch says so
    execute = JITFunction.run

    def run(self: JITFunction, *args: Any, **options: Any) -> Any:
        record.launches[self.fn.__name__] += 1
        try:
            return execute(self, *args, **options)
        finally:
            record.unchecked = state.races_unchecked

    JITFunction.run = run
    measure = testing.error_budget

    def error_budget(
        actual: Tensor, oracle: Tensor, peer: Tensor | None = None
    ) -> testing.ErrorBudget:
        budget = measure(actual, oracle, peer)
        if budget.max_budget:
            worst = max(budget.max_error / budget.max_budget, budget.rms_error / budget.rms_budget)
            # A larger error fails its test, or is what a control asks for.
            if worst <= 1:
                record.add({}, 0, {str(actual.dtype).removeprefix("torch."): worst})
        return budget

    testing.error_budget = error_budget
    return record
