"""Compile what the ops launch, for a GPU that need not be there; tell what came out.

Run as a program: ``compile_ops.py TARGET DTYPE[,DTYPE...] PART [OP FILE OLD NEW ...]``: TARGET is
one of ``sm_80``, ``sm_90``, ``sm_100``, ``gfx942``; PART is ``shapes`` (every activation, plan,
direction) or ``lengths`` (20 lengths in a row). With OP FILE OLD NEW, the module ``OP/FILE.py`` is
compiled with a text replaced by another, or several. Prints one JSON object.

The ops run on CPU tensors. Triton is told of a device that is not there, and each launch compiles
exactly what it would have compiled for that device, with its specialisation and constants, and
then does not run. So nothing in a tensor means anything, and matrix products of the library are
left out.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from ttir import narrow_products

from fastadapt.kernels import device

device.runs_triton = lambda device_type: True  # before an op imports it

from calls import calls_of  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Recorder:
    """Stands for Triton's driver and for every launch."""

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
        """In place of ``JITFunction.run``: compiles, as a launch does that finds nothing cached."""
        try:
            compiled = self._compile(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # of any kind: it is this program's result
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
    """What is told of one compiled kernel."""
    source, text = compiled.src, compiled.asm["ttir"]
    # Constants are those declared, absent pointers (None), and numbers that are specialised (1).
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
            if name in named or str(kind).startswith(("*", "tensordesc"))
        },
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "shared": options.shared,
        "narrow_products": narrow_products(text),
        "dot": {"rows": int(dot[1]), "dtype": dot[2]} if dot else None,
        "wgmma": "wgmma.mma_async" in compiled.asm.get("ptx", ""),
        **resources(compiled),
    }


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, which hold what did not fit in them."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        found = [
            re.search(rf"\.{name}:\s+(\d+)", assembly)
            for name in ("vgpr_count", "private_segment_fixed_size")
        ]
    else:
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [program, "--dump-resource-usage", file.name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = [re.search(rf"\b{name}:(\d+)", output) for name in ("REG", "STACK")]
    registers, stack = (int(match[1]) for match in found if match)
    return {"registers": registers, "stack": stack}


def skip_products() -> torch.library.Library:
    """The library's matrix products on a CPU give results of the right shape, and nothing else."""

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


# --- the ops, as they are on a GPU ---------------------------------------------------------------


def multiply_as_on_a_gpu() -> None:
    """linear_kl has products accumulate in float32 on a GPU, which decides a kernel's constants."""
    from fastadapt.kernels.linear_kl import chunks

    def accumulates_wider(head: Tensor, hidden: torch.dtype, logits: torch.dtype) -> bool:
        return head.dtype == hidden and hidden.itemsize == 2 and logits == torch.float32

    chunks._accumulates_wider = accumulates_wider


def device_modules() -> list[Any]:
    """Every module with device code."""
    import fastadapt.kernels

    folders = [
        Path(importlib.import_module(f"fastadapt.kernels.{op}").__file__ or "").parent
        for op in ("transcoder", "linear_kl")
    ]
    names = [f"{f.name}.{file.stem}" for f in folders for file in sorted(f.glob("triton_*.py"))]
    return [importlib.import_module(f"{fastadapt.kernels.__name__}.{name}") for name in names]


def launched_kernels() -> list[str]:
    """Names of the kernels that some launcher launches, ``name[grid](...)``."""
    modules = device_modules()
    kernels = {k for m in modules for k, v in vars(m).items() if isinstance(v, JITFunction)}
    sources = "\n".join(inspect.getsource(m) for m in modules)
    return sorted(k for k in kernels if re.search(rf"(?<![\w.]){k}\[", sources))


def replace_text(folder: str, op: str, file: str, *texts: str) -> None:
    """Puts an edited copy of a module in its place; texts are old, new, old, new, ..."""
    package = importlib.import_module(f"fastadapt.kernels.{op}")
    source = (Path(package.__file__ or "").parent / f"{file}.py").read_text()
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{old!r} is not in {file}.py")
        source = source.replace(old, new, 1)
    edited = Path(folder) / f"{file}.py"
    edited.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file}", edited)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(package, file, module)


def main(target: str, dtypes: str, part: str, *changes: str) -> None:
    multiply_as_on_a_gpu()
    library = skip_products()
    recorder = Recorder(TARGETS[target])
    recorder.start()
    if recorder.target.backend == "hip":
        torch.version.hip = "6"  # by which launchers know it
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
