"""The modules with device code, the kernels that they launch, and edited copies of modules."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

#: Kernels whose loops sum rows of a table.
SUMS = {"sum_by_token", "sum_by_feature", "sum_further_pieces", "decode_flagged"}
#: Kernels that read rows by index.
GATHERS = SUMS | {"sampled_product", "cost_by_token"}


def device_modules() -> list[Any]:
    """Import every module with device code."""
    folders = [
        Path(importlib.import_module(f"fastadapt.kernels.{op}").__file__ or "").parent
        for op in ("transcoder", "linear_kl", "nmse", "frozen")
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


def load(name: str, path: Path) -> ModuleType:
    """Load a file as the module ``name``, in place of a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def copy_of(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """Load a copy of a module of kernels in which the text ``old`` is replaced."""
    source = Path(module.__file__ or "").read_text()
    assert source.count(old) == 1
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    return load(f"{module.__name__}_copy", path)
