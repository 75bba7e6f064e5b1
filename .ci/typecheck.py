"""Type-checks the package under the names that it is imported by.

``kernels/<op>`` is installed as ``fastadapt.kernels.<op>``, a mapping that lives in ``setup.py``
and that mypy cannot see. So mypy is given ``build/types/fastadapt``, a folder of links in the shape
of the installed package, and its messages are written back to the real paths.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
package = root / "build" / "types" / "fastadapt"

shutil.rmtree(package, ignore_errors=True)
(package / "kernels").mkdir(parents=True)
for entry in (root / "fastadapt").iterdir():
    if entry.name not in ("kernels", "__pycache__"):
        (package / entry.name).symlink_to(entry)
for entry in (root / "fastadapt" / "kernels").glob("*.py"):
    (package / "kernels" / entry.name).symlink_to(entry)
for op in root.glob("kernels/*/__init__.py"):
    (package / "kernels" / op.parent.name).symlink_to(op.parent)

result = subprocess.run(
    [sys.executable, "-m", "mypy", *sys.argv[1:]], cwd=root, stdout=subprocess.PIPE, text=True
)
ops = "|".join(op.parent.name for op in root.glob("kernels/*/__init__.py"))
output = re.sub(rf"\bbuild/types/fastadapt/kernels/({ops})/", r"kernels/\1/", result.stdout)
sys.stdout.write(output.replace("build/types/", ""))
sys.exit(result.returncode)
