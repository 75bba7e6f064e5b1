"""Maps each op folder of ``kernels/`` to ``fastadapt.kernels.<op>``.

``kernels/`` itself has no ``__init__.py``: transformers looks up a package of that name by import,
and ours must not shadow it. Everything else about the package is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ops = {f"fastadapt.kernels.{p.parent.name}": p.parent for p in root.glob("kernels/*/__init__.py")}

setup(
    packages=[*find_packages(include=["fastadapt", "fastadapt.*"]), *sorted(ops)],
    package_dir={name: folder.relative_to(root).as_posix() for name, folder in ops.items()},
)
