"""docs/other-libraries.md lists uses of other libraries' private names, and tested versions."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

#: Libraries with non-public submodules; every import from a submodule must be listed.
LISTED = {"huggingface_hub", "lm_eval", "torchao", "transformers", "vllm"}
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(root: Path) -> set[str]:
    """Return the names of attributes, functions and classes that this project defines."""
    names = set()
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def sources(root: Path) -> list[Path]:
    folders = ("fastadapt", "kernels", "benchmarks", "reproduce")
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def uses(root: Path) -> Iterator[tuple[str, str]]:
    """Yield file and name of every import of and access to possibly non-public names."""
    known = defined_names(root) | NAMED_TUPLES
    for path in sources(root):
        place = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                parts = node.module.split(".")
                if parts[0] in ("fastadapt", "benchmarks", "__future__"):
                    continue
                private = any(map(is_private, [*parts, *(alias.name for alias in node.names)]))
                if private or (parts[0] in LISTED and len(parts) > 1):
                    yield from ((place, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known:
                yield place, node.attr


def test_the_page_names_every_use(root: Path) -> None:
    page = (root / "docs" / "other-libraries.md").read_text(encoding="utf-8")
    used = set(uses(root))
    assert len(used) >= 20
    missing = {(place, name) for place, name in used if not re.search(rf"\b{name}\b", page)}
    assert not missing


def test_the_page_names_existing_files(root: Path) -> None:
    page = (root / "docs" / "other-libraries.md").read_text(encoding="utf-8")
    for place in re.findall(r"`((?:fastadapt|kernels|tests|benchmarks)/[\w/.]*)`", page):
        assert (root / place).exists(), place


def newest_tested(root: Path) -> dict[str, Version]:
    page = (root / "docs" / "other-libraries.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    return {row[0]: Version([v for v in row[1:] if v[0].isdigit()][-1]) for row in rows}


def test_upper_bounds_follow_tested_versions(root: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    tested, bounded = newest_tested(root), 0
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        for bound in (s for s in requirement.specifier if s.operator == "<"):
            bounded += 1
            last = tested[requirement.name]
            release = [*last.release, 0, 0][:3]
            following = {
                ".".join(map(str, [*release[:i], release[i] + 1])) for i in range(len(release))
            }
            assert bound.version in following, f"{text}: the newest tested version is {last}"
    assert bounded >= 10


def test_this_environment_is_within_the_bounds(root: Path) -> None:
    import transformers

    assert Version(transformers.__version__) <= newest_tested(root)["transformers"]
    assert sys.version_info >= (3, 10)
