"""Build wheel and source distribution from copies of the sources; install the wheel elsewhere."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
)


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
    return _build_wheel(_copy_sources(tmp_path_factory), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def build_wheel() -> Callable[[Path, Path], Path]:
    """Return a function that builds the wheel of one folder into another one."""
    return _build_wheel


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution of the sources on disk."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    source = _copy_sources(tmp_path_factory)
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300
    )
    (built,) = out.glob("*.tar.gz")
    return built


def _copy_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package, the tests and the files beside them to a new folder."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in ("fastadapt", "kernels", "tests"):
        ignore = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    return source


def _build_wheel(source: Path, out: Path) -> Path:
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
