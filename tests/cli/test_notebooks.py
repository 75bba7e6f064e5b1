"""The notebooks of the documentation: their stored outputs, their code, and a run of all cells."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from printed_code import lines, unresolved

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 100_000  # characters of an output
EXECUTE = ROOT / "docs" / "site" / "notebooks.py"
#: A path from the root of a machine; neither `2/17`, nor `</td>`, nor the path of a URL.
ABSOLUTE = re.compile(r"(?<![\w.<:/])/\w[\w.-]*/\w")
PROGRESS = re.compile(r"\d+%\||it/s|tok/s|\d (?:s|min|h) left\b")

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="needs the repository")


def cells(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def after(magic: str, notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rest of the first line, and the other lines, of cells that begin with a magic."""
    code = [source(cell).partition("\n") for cell in cells(notebook, "code")]
    return [
        (first.removeprefix(magic).strip(), text)
        for first, _, text in code
        if first.split()[0] == magic
    ]


def python(notebook: dict[str, Any]) -> str:
    code = map(source, cells(notebook, "code"))
    return "\n".join(text for text in code if not text.startswith("%%"))


def faults(notebook: dict[str, Any]) -> list[str]:
    """Return what stored outputs should not hold."""
    code = cells(notebook, "code")
    listed = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        listed.append("not executed in order")
    for output in (output for cell in code for output in cell["outputs"]):
        texts = {"text": output.get("text", ""), **output.get("data", {})}
        if output["output_type"] == "error":
            listed.append("error")
        if output.get("name") == "stderr":
            listed.append("stderr")
        for text in ("".join(text) for text in texts.values()):
            if len(text) > LARGEST:
                listed.append("size")
            listed += [match.group() for match in ABSOLUTE.finditer(text)]
            if PROGRESS.search(text):
                listed.append("progress")
    return listed


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return read


def test_the_stored_outputs_are_results(notebook: dict[str, Any]) -> None:
    assert faults(notebook) == []
    shown = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    assert sum("text/html" in output.get("data", {}) for output in shown) >= 4


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ({"output_type": "error", "ename": "NameError", "evalue": "", "traceback": []}, "error"),
        ({"output_type": "stream", "name": "stderr", "text": ["note"]}, "stderr"),
        ({"output_type": "stream", "name": "stdout", "text": ["x" * (LARGEST + 1)]}, "size"),
        ({"output_type": "stream", "name": "stdout", "text": ["run: /tmp/a/runs/x"]}, "/tmp/a"),
        ({"output_type": "display_data", "data": {"text/html": ["<b>'/root/x'</b>"]}}, "/root/x"),
        ({"output_type": "stream", "name": "stdout", "text": ["10%|█   | 4 it/s"]}, "progress"),
        (
            {"output_type": "stream", "name": "stdout", "text": ["step 3  2 min 9 s left"]},
            "progress",
        ),
        ({"output_type": "stream", "name": "stdout", "text": ["2/17 </td> 4 apples left ?"]}, None),
    ],
)
def test_an_output_that_is_no_result_is_reported(output: dict[str, Any], fault: str | None) -> None:
    cell = {"cell_type": "code", "execution_count": 1, "outputs": [output], "source": ["x"]}
    assert faults({"cells": [cell]}) == ([] if fault is None else [fault])
    assert "not executed in order" in faults({"cells": [{**cell, "execution_count": None}]})


def test_the_code_compiles_and_its_names_resolve(notebook: dict[str, Any]) -> None:
    code = python(notebook)
    compile(code, "notebook", "exec")
    assert unresolved(code) == []


def test_the_commands_of_cells_are_understood(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell has one command, so that its exit code is that of the cell."""
    from fastadapt.cli.main import COMMANDS, open_command
    from fastadapt.cli.train import parse_train
    from fastadapt.cli.where import parse_where

    monkeypatch.chdir(tmp_path)
    for name, text in after("%%writefile", notebook):
        Path(name).write_text(text)
    commands = after("%%bash", notebook)
    assert len(commands) >= 4
    for options, text in commands:
        assert options == ""
        (line,) = lines(text)
        program, *words = shlex.split(line)
        assert program == "fastadapt"
        n_words = 2 if " ".join(words[:2]) in COMMANDS else 1
        command, arguments = " ".join(words[:n_words]), words[n_words:]
        parsers: dict[str, Callable[[list[str]], Any]] = {
            "train": parse_train,
            "where": parse_where,
        }
        assert parsers.get(command, open_command(command).parse)(arguments)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path: Path) -> None:
    read = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join(map(source, cells(read, "markdown")))
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def run_notebooks(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("nbclient", reason="needs the extra docs")
    pytest.importorskip("ipykernel", reason="needs the extra docs")
    command = [sys.executable, str(EXECUTE), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if "TRITON" not in key}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_run(path: Path, tmp_path: Path) -> None:
    """No cell raises, and each shows results of the same kinds as those that are stored."""
    outcome = run_notebooks(path, "--output", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    new, stored = (json.loads((p / path.name).read_text("utf-8")) for p in (tmp_path, path.parent))
    assert faults(new) == []
    assert new["metadata"] == stored["metadata"]
    for ours, theirs in zip(new["cells"], stored["cells"], strict=True):
        assert ours["source"] == theirs["source"]
        kinds = [
            [(output["output_type"], sorted(output.get("data", {}))) for output in cell["outputs"]]
            for cell in (ours, theirs)
            if cell["cell_type"] == "code"
        ]
        assert kinds[:1] == kinds[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("%%bash\nfastadapt train no-such-preset", "no such preset"),
    ],
)
def test_a_cell_that_fails_ends_the_execution(code: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "failing.ipynb"
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "id": "a"}
    cell |= {"metadata": {}, "outputs": [], "source": [code]}
    failing = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(failing))
    before = path.read_bytes()
    outcome = run_notebooks(path)
    assert outcome.returncode == 1
    assert reason in outcome.stderr
    assert path.read_bytes() == before
