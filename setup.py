"""Maps each op folder of ``kernels/`` to ``fastadapt.kernels.<op>``.

``kernels/`` itself has no ``__init__.py``: transformers looks up a package of that name by import,
and ours must not shadow it. Everything else about the package is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ops = sorted(p.parent.name for p in Path(__file__).parent.glob("kernels/*/__init__.py"))

setup(
    packages=[*find_packages(include=["fastadapt", "fastadapt.*"]), *(f"fastadapt.kernels.{op}" for op in ops)],
    package_dir={f"fastadapt.kernels.{op}": f"kernels/{op}" for op in ops},
)
