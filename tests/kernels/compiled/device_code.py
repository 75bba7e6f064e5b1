"""The modules with device code, and the kernels that they launch."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any


def device_modules() -> list[Any]:
    """Import every module with device code."""
    folders = [
        Path(importlib.import_module(f"fastadapt.kernels.{op}").__file__ or "").parent
        for op in ("transcoder", "linear_kl")
    ]
    names = [f"{f.name}.{file.stem}" for f in folders for file in sorted(f.glob("triton_*.py"))]
    return [importlib.import_module(f"fastadapt.kernels.{name}") for name in names]


def launched_kernels() -> list[str]:
    """Return the names of kernels with a launch ``name[grid](...)`` in a module."""
    from triton.runtime.jit import JITFunction

    modules = device_modules()
    kernels = {k for m in modules for k, v in vars(m).items() if isinstance(v, JITFunction)}
    sources = "\n".join(inspect.getsource(m) for m in modules)
    return sorted(k for k in kernels if re.search(rf"(?<![\w.]){k}\[", sources))
