"""The locks pin all that make installs, once and exactly."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="the lock is for Python 3.11")


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    found = [line.split("==") for line in lines if line and not line.startswith("-r ")]
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    return dict(found)


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def closure(requirements: list[str]) -> set[str]:
    """All distributions that these draw in, by the metadata of those installed."""
    seen: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or re.match(r"nvidia-|cuda-", name):  # what torch's build for CUDA brings
            continue
        seen.add(name)
        for text in importlib.metadata.distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed)
    return seen


def test_the_lock_of_the_main_job_is_complete(project, root):
    locked = pins(root / "requirements.lock")
    assert closure(project["dependencies"]) <= set(locked)
    assert (locked["torch"], locked["triton"]) == ("2.13.0", "3.7.1")


@pytest.fixture(scope="module")
def locked(root) -> dict[str, str]:
    """All that the tests have: three locks, none of which says what another does."""
    files = [pins(root / f"requirements{name}.lock") for name in ("", "-eval", "-dev")]
    assert len({name for pinned in files for name in pinned}) == sum(map(len, files))
    return files[0] | files[1] | files[2]


def test_the_lock_of_evaluations_is_complete(project, root):
    locked = pins(root / "requirements.lock") | pins(root / "requirements-eval.lock")
    extras = [
        text for name in ("eval", "features") for text in project["optional-dependencies"][name]
    ]
    assert closure([*project["dependencies"], *extras]) <= set(locked)


def test_the_lock_of_the_tests_is_complete(project, locked):
    extras = [
        text
        for name in ("eval", "features", "dev")
        for text in project["optional-dependencies"][name]
    ]
    assert closure([*project["dependencies"], *extras]) <= set(locked)


def test_what_is_locked_is_within_the_ranges(project, locked):
    extras = [
        text
        for name in ("eval", "features", "dev")
        for text in project["optional-dependencies"][name]
    ]
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier
