"""Type-check the package and its tests under the names that they are imported by.

``kernels/<op>`` is installed as ``fastadapt.kernels.<op>``, a mapping of ``setup.py`` that mypy
cannot see, and tests import their helpers from the folders of pytest's ``pythonpath``. So mypy
reads ``build/types``, a folder of links in the shape of what is imported; its messages are printed
with the real paths.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

root = Path(__file__).resolve().parent.parent
types = root / "build" / "types"
package = types / "fastadapt"

shutil.rmtree(types, ignore_errors=True)
(package / "kernels").mkdir(parents=True)
for entry in (root / "fastadapt").iterdir():
    if entry.name not in ("kernels", "__pycache__"):
        (package / entry.name).symlink_to(entry)
for entry in (root / "fastadapt" / "kernels").glob("*.py"):
    (package / "kernels" / entry.name).symlink_to(entry)
for op in root.glob("kernels/*/__init__.py"):
    (package / "kernels" / op.parent.name).symlink_to(op.parent)

settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]
shared = {root / folder for folder in settings["ini_options"]["pythonpath"]}
helpers = {}
for path in sorted(
    file
    for top in ("tests", "benchmarks", "reproduce", "examples")
    for file in (root / top).rglob("*.py")
):
    link = types / path.relative_to(root)
    if path.parent in shared and not path.name.startswith(("test_", "conftest")):
        link = types / path.name
        helpers[path.name] = path.relative_to(root)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(path)

result = subprocess.run(
    [sys.executable, "-m", "mypy", *sys.argv[1:]],
    cwd=root,
    env={**os.environ, "MYPYPATH": str(types)},
    stdout=subprocess.PIPE,
    text=True,
)
ops = "|".join(op.parent.name for op in root.glob("kernels/*/__init__.py"))
output = re.sub(rf"\bbuild/types/fastadapt/kernels/({ops})/", r"kernels/\1/", result.stdout)
for name, path in helpers.items():
    output = output.replace(f"build/types/{name}", str(path))
sys.stdout.write(output.replace("build/types/", ""))
sys.exit(result.returncode)
