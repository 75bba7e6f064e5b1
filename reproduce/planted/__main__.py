"""Run the benchmark of planted differences: ``python -m reproduce.planted``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.cli.console import print_error, print_table, quiet_transformers, say
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import disk_errors, replacing, sweep_tree
from fastadapt.io.documents import read_json, same
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.reporting.tables import as_markdown

#: Files of the output folder beside ``seed0``, ``seed1``, ...
SETTINGS, RESULT, TABLES = "settings.json", "planted.json", "tables.md"
SCHEMA_VERSION = 1


def main(argv: list[str]) -> int:
    """Run the benchmark, or resume it; return the exit code."""
    import torch

    from reproduce.planted.organisms import SIZES, StoppedError
    from reproduce.planted.scores import tables

    parser = argparse.ArgumentParser(
        prog="python -m reproduce.planted",
        description="Plant differences in models, and count which of them each method names. The "
        "same command resumes after a stop.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/planted"), help="folder to write")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 2 or more")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="small: for tests")
    options = parser.parse_args(argv)
    if options.seeds < 2:
        raise UserError(f"--seeds: expected 2 or more, for intervals, got {options.seeds}")
    quiet_transformers()
    torch.set_num_threads(1)  # as the preset's; equal bits need equal threads
    with stoppable() as (stop, progress):
        try:
            with _opened(options) as folder:
                result = _run(folder, options, progress, stop)
        except StoppedError:
            print(f"Stopped; finished parts are saved in {options.out}.")
            print(resume_hint())
            return 0
    for table in tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n" if table.note else "")
    for name in (RESULT, TABLES):
        print(f"{name}: {(options.out / name).resolve()}")
    return 0


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Path]:
    """Claim the output folder; refuse one with other files or another size."""
    files = (SETTINGS, RESULT, TABLES)
    workspace = Workspace(options.out, "--out", "writing to", files, marker=SETTINGS)
    names = workspace.names()
    foreign = [n for n in names if n not in files and not n.removeprefix("seed").isdecimal()]
    if foreign or (names and SETTINGS not in names):
        raise workspace.foreign("holds files that are not of this benchmark", foreign or names)
    settings = settings_of(options.size)
    with workspace.claimed() as folder, workspace.disk_errors():
        sweep_tree(folder)
        path = folder / SETTINGS
        if not has_file(path):
            _write(path, settings)
        elif not same(read_json(path), settings):
            raise workspace.refusal(
                "holds a benchmark of another size, or of other planted texts; give the same "
                "--size, or a new folder"
            )
        yield folder


def settings_of(size: str) -> dict[str, Any]:
    """Return what a folder's parts depend on: sizes, and the SHA-256 of some planted texts."""
    from reproduce.planted.differences import Planted
    from reproduce.planted.organisms import SIZES

    words = [text.words for text in islice(Planted.draw(0).texts("settings"), 100)]
    sha256 = hashlib.sha256(repr(words).encode()).hexdigest()
    return {"size": size, **asdict(SIZES[size]), "texts": sha256}


def _run(
    folder: Path, options: argparse.Namespace, progress: Callable[..., None], stop: Event
) -> dict[str, Any]:
    from reproduce.planted.measure import measure
    from reproduce.planted.organisms import ROLES, SIZES, Maker, StoppedError
    from reproduce.planted.scores import Measured, summarise, tables

    size, seeds = SIZES[options.size], list[dict[str, Measured]]()
    for seed in range(options.seeds):
        maker = Maker(folder / f"seed{seed}", seed, size, progress, stop)
        measured: dict[str, Measured] = {}
        for role in ROLES:
            path = maker.folder / role / "described.json"
            if not has_file(path):
                store = maker.make(role)
                say(f"seed {seed}, {role}: units of every method")
                _write(path, measure(maker, role, store))
            if stop.is_set():
                raise StoppedError
            measured[role] = read_json(path, Measured)
        seeds.append(measured)
    settings = {"seeds": options.seeds, **settings_of(options.size)}
    versions = {name: version(name) for name in ("fastadapt", "torch", "transformers")}
    result = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "versions": versions,
        **summarise(seeds),
    }
    _write(folder / RESULT, result)
    with disk_errors(folder), replacing(folder / TABLES) as staged:
        staged.write_text(as_markdown(tables(result)), encoding="utf-8")
    return result


def _write(path: Path, values: Any) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(path), replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, RunError) as error:
        print_error(str(error))
        sys.exit(error.exit_code)
