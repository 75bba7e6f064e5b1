"""Build the wheel from a copy of the sources, and install it in a separate folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Return a function that runs Python code in a subprocess and returns the output."""

    def run(code: str, *options: str, cwd: Path, path: Path | None = None) -> str:
        # Without these variables, coverage does not start in the subprocess, where it would add
        # imports, time and a path.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE_", "PYTHON"))}
        if path is not None:
            env["PYTHONPATH"] = str(path)
        result = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the sources on disk, without network access."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastadapt", "kernels"):
        ignore = shutil.ignore_patterns(".*")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a folder that also holds Hugging Face's ``kernels``."""
    import importlib.metadata

    target = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--target", target, wheel)
    distribution = importlib.metadata.distribution("kernels")
    for file in distribution.files or ():
        if file.parts[0].startswith("kernels") and "__pycache__" not in file.parts:
            copy = target / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), copy)
    return target


def _pip(command: str, *arguments: object) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", command]
    subprocess.run([*pip, "--no-index", *map(str, arguments)], check=True, timeout=300)
