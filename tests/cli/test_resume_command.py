"""The printed resume command works in the shell that started the run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.cli.parser import resume_command


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a program `fastadapt` in a folder with a space in its name."""
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    program = folder / "fastadapt"
    program.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return program


@pytest.mark.parametrize("absolute", [False, True])
def test_a_program_off_the_path_is_named_by_its_path(
    installed: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    started = str(installed) if absolute else "my env/bin/fastadapt"
    monkeypatch.setattr(sys, "argv", [started, "train"])
    command = resume_command(["my run.yaml", "--overwrite", "--optimizer.lr", "5e-3"])
    assert shlex.split(command)[0] == started
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "train|my run.yaml|--optimizer.lr|5e-3|--resume|"


def test_another_fastadapt_on_the_path_is_not_taken_for_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "fastadapt"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(installed), "train"])
    assert resume_command(["organism"]) == f"'{installed}' train organism --resume"


@pytest.mark.parametrize("link", [False, True])
def test_a_program_on_the_path_is_named_by_its_name(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, link: bool
) -> None:
    folder = installed.parent
    if link:
        folder = tmp_path / "links"
        folder.mkdir()
        (folder / "fastadapt").symlink_to(installed)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(installed), "train"])
    assert resume_command(["organism", "--resume"]) == "fastadapt train organism --resume"


@pytest.mark.parametrize("embedding", ["-c", "", str(Path("/usr/lib/pytest/__main__.py"))])
def test_embedded_it_is_named_by_its_name(
    installed: Path, monkeypatch: pytest.MonkeyPatch, embedding: str
) -> None:
    monkeypatch.setattr(sys, "argv", [embedding])
    assert resume_command(["organism"]) == "fastadapt train organism --resume"
