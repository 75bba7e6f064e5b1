"""Compile the kernels that the ops launch for a GPU target without a GPU; print a report.

Usage: ``compile_ops.py TARGET DTYPE[,DTYPE...] PART [OP FILE OLD NEW ...]``. TARGET is one of
``sm_80``, ``sm_90``, ``sm_100``, ``gfx942``. PART is ``shapes`` (every activation, plan and
direction) or ``lengths`` (20 lengths). With OP FILE OLD NEW, the module ``OP/FILE.py`` is compiled
with each text OLD replaced by the following NEW. The program prints one JSON object.

The ops run on CPU tensors. A stand-in driver names the target device to Triton. Each launch
compiles the kernel exactly as for that device, with its specialisation and constants, but does not
run the kernel. Values of tensors are therefore arbitrary, and matrix products are skipped.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import sass
import torch
import triton
from device_code import SUMS, launched_kernels, load
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from ttir import narrow_products

from fastadapt.kernels import device

device.runs_triton = lambda device_type: True  # before an op imports the function

from calls import calls_of  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Recorder:
    """Stand in for Triton's driver, and record launches as compilations."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.case = ""
        self.compiled: dict[int, tuple[str, JITFunction, Any]] = {}
        self.failures: list[dict[str, str]] = []
        self._compile = JITFunction.run

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launch(
        self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        """Compile the kernel as a launch without cache does; replaces ``JITFunction.run``."""
        try:
            compiled = self._compile(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # any failure belongs to the report
            text = f"{type(error).__name__}: {error}\n{error.__cause__ or ''}"
            failure = {"kernel": kernel.fn.__name__, "case": self.case, "error": text}
            self.failures.append(failure)
            return
        self.compiled.setdefault(id(compiled), (self.case, kernel, compiled))

    def start(self) -> None:
        driver.set_active(self)
        recorder = self

        def run(self: JITFunction, *args: Any, **options: Any) -> None:
            recorder.launch(self, *args, **options)

        JITFunction.run = run


def describe(case: str, kernel: JITFunction, compiled: Any) -> dict[str, Any]:
    """Return the report's entry of a compiled kernel."""
    source, text, cubin = compiled.src, compiled.asm["ttir"], compiled.asm.get("cubin")
    # Constants: declared ones, absent pointers (None), and specialised numbers (1).
    named = {kernel.arg_names[path[0]]: value for path, value in source.constants.items()}
    declared = [kernel.arg_names[index] for index in kernel.constexprs]
    options = compiled.metadata
    dot = re.search(r"tt\.dot .* tensor<(\d+)x\d+x(\w+)> \* .*", text)
    return {
        "kernel": kernel.fn.__name__,
        "case": case,
        "constants": {name: named[name] for name in declared},
        "pointers": {
            name: kind
            for name, kind in source.signature.items()
            if name not in declared and named.get(name) is None
            if name in named or str(kind).startswith("*")
        },
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "shared": options.shared,
        "narrow_products": narrow_products(text),
        "dot": {"rows": int(dot[1]), "dtype": dot[2]} if dot else None,
        "wgmma": "wgmma.mma_async" in compiled.asm.get("ptx", ""),
        "loops": sass.loops(cubin) if cubin and kernel.fn.__name__ in SUMS else [],
        **resources(compiled),
    }


def resources(compiled: Any) -> dict[str, int]:
    """Return a thread's registers, and the bytes of its stack, which hold spilled registers."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        matches = [
            re.search(rf"\.{name}:\s+(\d+)", assembly)
            for name in ("vgpr_count", "private_segment_fixed_size")
        ]
    else:
        output = sass.dump("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
        matches = [re.search(rf"\b{name}:(\d+)", output) for name in ("REG", "STACK")]
    registers, stack = (int(match[1]) for match in matches if match)
    return {"registers": registers, "stack": stack}


def skip_products() -> torch.library.Library:
    """Replace the CPU's matrix products by functions that return uninitialised results."""

    def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)

    def product_out(a: Tensor, b: Tensor, *_: Any, out: Tensor) -> Tensor:
        return out

    def sum_of(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
        return product(a, b)

    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", product, "CPU")
    library.impl("mm.out", product_out, "CPU")
    library.impl("mm.dtype", product, "CPU")
    library.impl("mm.dtype_out", product_out, "CPU")
    library.impl("addmm", sum_of, "CPU")
    library.impl("addmm_", lambda out, *_, **__: out, "CPU")
    return library


# --- the ops as on a GPU --------------------------------------------------------------------------


def multiply_as_on_a_gpu() -> None:
    """Make linear_kl use a GPU's products, whose dtypes determine constants of its kernels."""
    from fastadapt.kernels.linear_kl import chunks

    def accumulates_wider(
        head_VD: Tensor, hidden_dtype: torch.dtype, logits_dtype: torch.dtype
    ) -> bool:
        inputs_match = head_VD.dtype == hidden_dtype and hidden_dtype.itemsize == 2
        return inputs_match and logits_dtype == torch.float32

    chunks._accumulates_wider = accumulates_wider


def replace_text(folder: str, op: str, file: str, *texts: str) -> None:
    """Replace a module by an edited copy; texts are old, new, old, new, ..."""
    package = importlib.import_module(f"fastadapt.kernels.{op}")
    source = (Path(package.__file__ or "").parent / f"{file}.py").read_text()
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{old!r} is not in {file}.py")
        source = source.replace(old, new, 1)
    edited = Path(folder) / f"{file}.py"
    edited.write_text(source)
    setattr(package, file, load(f"{package.__name__}.{file}", edited))


def main(target: str, dtypes: str, part: str, *changes: str) -> None:
    multiply_as_on_a_gpu()
    library = skip_products()
    recorder = Recorder(TARGETS[target])
    recorder.start()
    with tempfile.TemporaryDirectory() as folder:
        if changes:
            replace_text(folder, *changes)
        for name in dtypes.split(","):
            for recorder.case, call in calls_of(part, getattr(torch, name)):
                call()
        launched = launched_kernels()
    del library
    record = {
        "target": target,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "launched": launched,
        "kernels": [describe(*entry) for entry in recorder.compiled.values()],
        "failures": recorder.failures,
    }
    json.dump(record, sys.stdout, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
