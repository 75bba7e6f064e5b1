"""Folders that several processes fill at once, part by part.

::

    settings.json      what all parts depend on
    .../measured.json  the result of a part, in a folder with a lock of its own
    tables.md          the tables

A process works on a part only while it holds the part's lock, and passes by the parts that others
hold. A part counts as measured if its file has the stamp of the present rules. The folder's own
lock is held for settings and results alone, for a moment.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from typing_extensions import TypedDict

from fastadapt.cli.console import say
from fastadapt.cli.progress import Progress, resume_hint, stoppable
from fastadapt.io.atomic import disk_errors, locked, make_folder, replacing, sweep_tree
from fastadapt.io.documents import Sha256, read_json, same
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.reporting.formatting import duration
from fastadapt.reporting.tables import Table, as_markdown

SETTINGS, TABLES, MEASURED = "settings.json", "tables.md", "measured.json"
_LOCK = ".lock"


class StoppedError(Exception):
    """The command was asked to stop, and what is finished is on the disk."""


class Stamp(TypedDict):
    """The rules by which a part was measured."""

    rules: Sha256


@dataclass(frozen=True)
class Part(ABC):
    """A unit of work with a folder of its own."""

    folder: Path

    @property
    @abstractmethod
    def label(self) -> str:
        """The part in messages."""

    @property
    def kind(self) -> str:
        """Parts of one kind take about the same time."""
        return ""

    @abstractmethod
    def measured(self) -> Any:
        """Return what was measured by the present rules; None if nothing was."""

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Yield whether this process holds the part; another one may be working on it.

        Raises:
            RunError: the folder cannot be written.
        """
        with ExitStack() as held:
            with disk_errors(self.folder):
                make_folder(self.folder)
                try:
                    held.enter_context(locked(self.folder / _LOCK))
                except BlockingIOError:
                    yield False
                    return
                sweep_tree(self.folder)
            yield True


P = TypeVar("P", bound=Part)


def read_measured(folder: Path, schema: Any, rules: str) -> Any:
    """Return a part's result; None if it was measured by other rules, or not yet.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / MEASURED
    if not has_file(path) or read_json(path, Stamp)["rules"] != rules:
        return None
    return read_json(path, schema)


def fill(out: Path, parts: Sequence[P], work: Callable[[P, Progress, Event], None]) -> bool:
    """Do the work of each part that is not measured, and that no other process works on.

    Args:
        out: the output folder, for messages.
        parts: the parts, in the order of the work.
        work: measures a part, and writes the result into its folder. It is called with the part,
            which this process holds, with what shows progress, and with an event after which it
            raises :class:`StoppedError`.

    Returns:
        Whether all parts were passed; false if the command was asked to stop.
    """
    pace = _Pace(parts)
    try:
        with stoppable() as (stop, progress):
            for part in parts:
                with part.claimed() as is_ours:
                    if not is_ours:
                        say(f"{part.label}: another process is at it")
                    elif part.measured() is None:
                        began = time.monotonic()
                        work(part, progress, stop)
                        pace.finished(part, time.monotonic() - began)
                if stop.is_set():
                    raise StoppedError
    except StoppedError:
        print(f"Stopped; finished parts are saved in {out}.")
        print(resume_hint())
        return False
    return True


class _Pace:
    """Estimates the time to the end from the finished parts of each kind."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def finished(self, part: Part, seconds: float) -> None:
        """Note a finished part, and say how many are left."""
        self._seconds[part.kind].append(seconds)
        left = Counter(each.kind for each in self._parts if each.measured() is None)
        if left:
            say(f"{part.label}: done in {duration(seconds)}; {self._words(left)}")

    def _words(self, left: Counter[str]) -> str:
        words = f"{left.total()} of {len(self._parts)} parts left"
        means = {kind: sum(each) / len(each) for kind, each in self._seconds.items()}
        if left.keys() <= means.keys():
            seconds = sum(n * means[kind] for kind, n in left.items())
            return f"{words}, {duration(seconds)} for one process"
        return words


def missing(parts: Sequence[P], *, is_summary: bool) -> list[P]:
    """Return the parts that are not measured; say which, and how to go on.

    Args:
        parts: the parts.
        is_summary: whether the command only writes tables of what is measured.
    """
    unmeasured = [part for part in parts if part.measured() is None]
    if unmeasured:
        print(f"Not measured yet: {'; '.join(part.label for part in unmeasured)}.")
        if not is_summary:
            print("Another process is at it, which will write the tables; or run this again.")
    return unmeasured


def open_folder(
    workspace: Workspace,
    settings: Mapping[str, Any],
    *,
    is_part: Callable[[str], bool],
    clash: str,
    is_new: bool = True,
    noun: str = "benchmark",
) -> None:
    """Write the settings of a new folder, or check those of an older one.

    Args:
        workspace: the output folder and its files, of which :data:`SETTINGS` is the marker.
        settings: what the parts depend on. Parts of another ``training`` are not mixed; those of
            another ``measuring`` are measured again.
        is_part: whether a name in the folder is that of parts.
        clash: why a folder with other ``training`` is refused, for the message.
        is_new: whether the folder may be new.
        noun: what the folder holds, for messages.

    Raises:
        UserError: the folder has other files, or parts that depend on other settings; or it has
            none, and may not be new.
    """
    names = workspace.names()
    foreign = [name for name in names if name not in workspace.replaced and not is_part(name)]
    if foreign or (names and SETTINGS not in names):
        reason = f"holds files that are not of this {noun}"
        raise workspace.foreign(reason, foreign or names)
    if not names and not is_new:
        raise workspace.refusal(f"holds no {noun}; leave out --summary to run one")
    path = workspace.folder / SETTINGS
    with held(workspace.folder):
        workspace.sweep()
        before = read_json(path, dict[str, Any]) if has_file(path) else None
        if before is not None and not same(before.get("training"), settings["training"]):
            raise workspace.refusal(clash)
        if not same(before, settings):
            write(path, settings)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's own lock, after waiting for a process that holds it for a moment.

    Raises:
        RunError: the folder cannot be written.
    """
    with ExitStack() as stack, disk_errors(folder):
        make_folder(folder)
        while True:
            try:
                stack.enter_context(locked(folder / _LOCK))
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def write(path: Path, values: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with disk_errors(path), replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def write_results(out: Path, name: str, result: Mapping[str, Any], shown: Sequence[Table]) -> None:
    """Write a result as JSON, with the given name, and its tables, under the folder's lock."""
    with held(out):
        write(out / name, result)
        write_text(out / TABLES, as_markdown(shown))


def digest_of_code(files: Sequence[str], *facts: object) -> str:
    """Return the SHA-256 of code without comments, docstrings and layout, and of more facts.

    It stands for rules of measuring, so that no change of them is forgotten.

    Args:
        files: paths of modules.
        facts: values that the rules take from elsewhere.
    """
    sha256 = hashlib.sha256(repr(facts).encode())
    for file in files:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                body[:] = [each for each in body if not _is_text(each)]
        sha256.update(ast.unparse(tree).encode())
    return sha256.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
