"""The kernels' own tests, in a process of their own, on the device at hand."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.processes import ended

__all__ = ["needing", "run_tests"]

ROOT = Path(__file__).resolve().parent.parent
TESTS_S = 170.0


def run_tests(env: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """The kernels' quick tests. Files whose imports are not installed are left out, and named."""
    folder = ROOT / "tests" / "kernels"
    left_out = []
    if importlib.util.find_spec("hypothesis") is None:
        left_out = needing("hypothesis", folder)
    if quick:
        selected = [folder / "test_testing.py"]
        left_out = [f for f in left_out if f in selected]
    else:
        selected = [folder]
        # What is shown by compiling ahead of time needs no GPU.
        left_out.append(folder / "compiled")
    report = Path(env["PYTHONPATH"].split(os.pathsep)[0]) / "junit.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *map(str, selected), "-q", "-m", "not slow"]
    # Other versions warn of other things.
    command += ["-Wdefault", "-pno:cacheprovider", "--maxfail=5", f"--junit-xml={report}"]
    command += [f"--ignore={path}" for path in left_out]
    done = ended(command, env, TESTS_S)
    counts = {}
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        if suite is not None:
            keys = ("tests", "failures", "errors", "skipped")
            counts = {key: int(suite.get(key, 0)) for key in keys}
    names = [path.name for path in left_out]
    return {"right": done["rc"] == 0, **counts, "left_out": names, **done}


def needing(package: str, folder: Path) -> list[Path]:
    """Test files that import the package, themselves or through a file beside them."""
    sources = {path: path.read_text() for path in sorted(folder.glob("*.py"))}
    wanted = {package}
    while True:
        imports = re.compile(rf"^(?:from|import) (?:{'|'.join(sorted(wanted))})\b", re.MULTILINE)
        found = {path for path, text in sources.items() if imports.search(text)}
        if wanted >= {path.stem for path in found}:
            return sorted(path for path in found if path.name.startswith("test_"))
        wanted |= {path.stem for path in found}
