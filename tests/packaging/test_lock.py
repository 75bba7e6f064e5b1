"""The lock files pin every installed distribution exactly once."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="the lock is for Python 3.11")


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    entries = [line.split("==") for line in lines if line and not line.startswith("-r ")]
    names = [name for name, _ in entries]
    assert len(set(names)) == len(names)
    return dict(entries)


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def closure(requirements: list[str]) -> set[str]:
    """Return all distributions that the requirements need, by installed metadata."""
    names: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in names or re.match(r"nvidia-|cuda-", name):  # needed by torch's CUDA build only
            continue
        names.add(name)
        for text in importlib.metadata.distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed)
    return names


def test_the_lock_of_the_main_job_is_complete(project: dict[str, Any], root: Path) -> None:
    locked = pins(root / "requirements.lock")
    assert closure(project["dependencies"]) <= set(locked)
    assert (locked["torch"], locked["triton"]) == ("2.13.0", "3.7.1")
    assert "duckdb" in locked  # docs/first-hour.md goes on after `make train`: features select


@pytest.fixture(scope="module")
def locked(root: Path) -> dict[str, str]:
    """Return the pins of the three disjoint lock files of the tests."""
    files = [pins(root / f"requirements{name}.lock") for name in ("", "-eval", "-dev")]
    assert len({name for pinned in files for name in pinned}) == sum(map(len, files))
    return files[0] | files[1] | files[2]


def test_the_lock_of_evaluations_is_complete(project: dict[str, Any], root: Path) -> None:
    locked = pins(root / "requirements.lock") | pins(root / "requirements-eval.lock")
    extras = [
        text for name in ("eval", "features") for text in project["optional-dependencies"][name]
    ]
    assert closure([*project["dependencies"], *extras]) <= set(locked)


def test_the_lock_of_the_tests_is_complete(project: dict[str, Any], locked: dict[str, str]) -> None:
    extras = [
        text
        for name in ("eval", "features", "dev")
        for text in project["optional-dependencies"][name]
    ]
    assert closure([*project["dependencies"], *extras]) <= set(locked)


def test_the_lock_of_the_site_has_what_the_extra_names(project: dict[str, Any], root: Path) -> None:
    """The packages lie beside those of the runtime, and repeat none of them."""
    site = pins(root / "requirements-docs.lock")
    for text in project["optional-dependencies"]["docs"]:
        requirement = Requirement(text)
        assert site[canonicalize_name(requirement.name)] in requirement.specifier
    assert not site.keys() & pins(root / "requirements.lock").keys()
    evaluation = pins(root / "requirements-eval.lock")
    shared = site.keys() & evaluation.keys()
    assert {name: site[name] for name in shared} == {name: evaluation[name] for name in shared}


def test_locked_versions_are_within_the_ranges(
    project: dict[str, Any], locked: dict[str, str]
) -> None:
    extras = [
        text
        for name in ("eval", "features", "dev")
        for text in project["optional-dependencies"][name]
    ]
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier
