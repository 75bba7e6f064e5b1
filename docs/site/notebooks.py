"""Execute the notebooks of ``docs/notebooks`` and store their outputs: ``make notebooks``.

Each notebook runs from its first cell to its last in an empty folder. Results alone are stored:
what commands print to standard error is progress. Colours and times are left out, and paths in the
folder become relative, so that the same machine writes the same file.
"""

from __future__ import annotations

import argparse
import os
import re
import sysconfig
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SECONDS = 1800  # of a cell, on a busy machine
#: Of the kernel's description, what does not depend on the version of Python.
LANGUAGE = ("name", "file_extension", "mimetype", "pygments_lexer")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_TIME = re.compile(r"(?<=training tokens in )[^\n]+")


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run all cells in an empty folder; return the notebook with their results.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception, or a command in a
            ``%%bash`` cell failed.
    """
    with TemporaryDirectory() as name:
        folder = Path(name).resolve() / "work"
        folder.mkdir()
        environment = {
            **os.environ,
            "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])),
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": name,  # no history beside the user's
        }
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        manager = client.create_kernel_manager()
        manager.transport, manager.ip = "ipc", f"{name}/kernel"  # no port of this machine
        return cleaned(client.execute(env=environment), folder)


def cleaned(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Leave out progress, colours, times, and the folder in which the notebook ran."""
    language = notebook.metadata.language_info
    notebook.metadata.language_info = {key: language[key] for key in LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            results = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [_without(output, f"{folder}/") for output in _joined(results)]
    return notebook


def _joined(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Join what a cell printed, which arrives in parts that end anywhere."""
    for is_text, parts in groupby(outputs, lambda output: output.output_type == "stream"):
        if is_text:
            text = "".join(part.text for part in parts)
            yield nbformat.v4.new_output("stream", name="stdout", text=text)
        else:
            yield from parts


def _without(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return _TIME.sub("…", _COLOUR.sub("", value.replace(folder, "")))
    if isinstance(value, list):
        return [_without(each, folder) for each in value]
    if isinstance(value, dict):
        return NotebookNode({key: _without(each, folder) for key, each in value.items()})
    return value


def main() -> None:
    """Execute notebooks; write each over itself, or into the folder ``--output``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", type=Path)
    parser.add_argument("--output", metavar="FOLDER", type=Path)
    typed = parser.parse_args()
    for path in typed.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        executed = execute(nbformat.read(path, as_version=4))
        nbformat.write(executed, (typed.output or path.parent) / path.name)
        print(path)


if __name__ == "__main__":
    main()
