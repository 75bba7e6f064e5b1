"""Make the package importable from this checkout without installation.

An installation maps ``kernels/<op>`` to ``fastadapt.kernels.<op>``. A folder of links with the
layout of the installed package does the same for this process and its subprocesses. In the folder,
``msgspec`` is a stand-in if it is not installed.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

__all__ = ["ROOT", "importable"]

ROOT = Path(__file__).resolve().parent.parent


def importable() -> dict[str, str]:
    """Put the folder of links first on the path; return the environment for subprocesses."""
    folder = Path(tempfile.mkdtemp(prefix="fastadapt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "fastadapt"
    (package / "kernels").mkdir(parents=True)
    for entry in (ROOT / "fastadapt").iterdir():
        if entry.name not in ("kernels", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    for entry in (ROOT / "fastadapt" / "kernels").glob("*.py"):
        (package / "kernels" / entry.name).symlink_to(entry)
    for op in ROOT.glob("kernels/*/__init__.py"):
        (package / "kernels" / op.parent.name).symlink_to(op.parent)
    if importlib.util.find_spec("msgspec") is None:
        (folder / "msgspec.py").symlink_to(ROOT / "benchmarks" / "without_msgspec.py")
    sys.path[:0] = [str(folder), str(ROOT)]
    inherited = os.environ.get("PYTHONPATH")
    path = [str(folder), str(ROOT), *([inherited] if inherited else [])]
    # Without PYTHONSAFEPATH, the working folder would come first; its package has no ops.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
