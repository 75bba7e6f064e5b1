"""Runs the package from this checkout, installed or not.

``kernels/<op>`` is imported as ``fastadapt.kernels.<op>``, a mapping that installation makes. A
folder of links in the shape of the installed package makes it as well, for this process and, by
their environment, for those it starts.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

__all__ = ["ROOT", "importable"]

ROOT = Path(__file__).resolve().parent.parent


def importable() -> dict[str, str]:
    """Puts the links first on the path; the environment in which subprocesses find them too."""
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
    sys.path[:0] = [str(folder), str(ROOT)]
    inherited = os.environ.get("PYTHONPATH")
    path = [str(folder), str(ROOT), *([inherited] if inherited else [])]
    # Without the safe path the working folder would come first, and in it a package without ops.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
