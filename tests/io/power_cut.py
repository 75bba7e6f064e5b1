"""What a power cut may leave: a model of a disk, where a name is safe once its folder is synced.

:func:`record` keeps the calls of fsync and rename of a piece of code, each with the lines of this
library that led to it and with what was in the folder then. :func:`faults` goes through them with a
disk that has only what was synced, and tells what a cut could leave. A line that syncs can be taken
away afterwards (``without``), so that a test can ask whether it is needed.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fastadapt

PACKAGE = Path(fastadapt.__file__).parent
SYNCS = {"fsync", "sync", "sync_file", "sync_folder", "sync_tree"}
#: How names begin of what is not there for anyone yet.
_STAGED = (".tmp-", "collecting.next")
_LOCKS = (".lock", "lock")


class Site(NamedTuple):
    """A call that syncs, in the source of the library."""

    file: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first}"

    def holds(self, line: tuple[str, int]) -> bool:
        return line[0] == self.file and self.first <= line[1] <= self.last


def sites() -> list[Site]:
    """Every call in the library of a function that syncs."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in SYNCS:
                    file = path.relative_to(PACKAGE).as_posix()
                    found.append(Site(file, node.lineno, node.end_lineno or node.lineno))
    return found


Listing = dict[str, int]  # name -> inode


@dataclass
class Tree:
    """What is in a folder and below, by inode, at a moment."""

    top: int
    folders: dict[int, Listing] = field(default_factory=dict)
    files: dict[int, tuple[int, int]] = field(default_factory=dict)  # size, time of the last change

    def follow(self, names: Sequence[str]) -> int | None:
        """The inode at the end of a path; None where there is none."""
        inode: int | None = self.top
        for name in names:
            inode = None if inode is None else self.folders.get(inode, {}).get(name)
        return inode

    def take(self, other: Tree, inode: int) -> None:
        """Take over what another tree has of a folder or file."""
        if inode in other.folders:
            self.folders[inode] = other.folders[inode]
        if inode in other.files:
            self.files[inode] = other.files[inode]

    def below(self, inode: int, path: str = "") -> Iterator[tuple[str, int]]:
        """Path and inode of a folder or file and of what is in it, but for what is staged."""
        yield path, inode
        for name, held in _lasting(self.folders.get(inode, {})).items():
            yield from self.below(held, f"{path}/{name}")


@dataclass
class Event:
    """A call: ``sync`` of an inode, ``rename`` to a path, or the ``end``."""

    kind: str
    inode: int
    path: str
    lines: list[tuple[str, int]]
    tree: Tree

    @property
    def staged(self) -> bool:
        return any(part.startswith(_STAGED) for part in Path(self.path).parts)


@dataclass
class Recording:
    """The calls, in order, after a first event that has what was there before."""

    root: Path
    events: list[Event] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # open, so that no inode is used again

    def note(self, kind: str, inode: int = -1, path: str = "") -> None:
        self.events.append(Event(kind, inode, path, _lines(), self._look()))

    def _look(self) -> Tree:
        tree = Tree(os.stat(self.root).st_ino)
        for parent, folders, files in os.walk(self.root):
            listing = tree.folders.setdefault(self._inode(parent), {})
            for name in folders:
                listing[name] = self._inode(os.path.join(parent, name))
            for name in files:
                path = os.path.join(parent, name)
                listing[name] = inode = self._inode(path)
                stat = os.stat(path)
                # SQLite syncs its file itself, out of sight of os.fsync: its contents do not count.
                size = 0 if name.endswith(".sqlite") else stat.st_size
                tree.files[inode] = size, stat.st_mtime_ns
        return tree

    def _inode(self, path: str) -> int:
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)


def record(write: Callable[[], object], root: Path, patch: Callable) -> Recording:
    """What a piece of code does in a folder; ``patch`` is ``monkeypatch.setattr``."""
    root = Path(os.path.realpath(root))
    recording = Recording(root)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        recording.note("sync", os.fstat(descriptor).st_ino, path)
        fsync(descriptor)

    def renamed(function: Callable) -> Callable:
        def stand_in(old: os.PathLike, new: os.PathLike) -> None:
            recording.note("before")
            function(old, new)
            recording.note("rename", os.stat(new).st_ino, os.fspath(new))

        return stand_in

    recording.note("start")
    patch(os, "fsync", synced)
    patch(os, "rename", renamed(os.rename))
    patch(os, "replace", renamed(os.replace))
    write()
    recording.note("end")
    recording.close()
    return recording


def faults(
    recording: Recording,
    marker: str | None,
    without: Site | None = None,
    *,
    old_counts: bool = True,
) -> list[str]:
    """What a cut could leave that must not be.

    Args:
        recording: of a piece of code.
        marker: path, in the folder, of the file that says that all is whole; None if there is none.
        old_counts: whether a marker that was there before says so, too, of what was there before.
        without: a call whose syncs are left out.
    """
    start, *events = recording.events
    disk = Tree(start.tree.top, dict(start.tree.folders), dict(start.tree.files))
    wrong: list[str] = []
    synced: list[int] = []
    names = marker.split("/") if marker else []
    old = start.tree.follow(names) if marker and not old_counts else None
    for event in events:
        if marker is not None:
            wrong += _half_marked(event.tree, disk, names, old)
        if event.kind == "rename" and not event.staged:
            wrong += _unsafe_rename(event, disk, recording.root)
            wrong += _synced_in_another_order(event, synced, names)
        if event.kind == "sync":
            wrong += _out_of_order(event, disk)
            synced.append(event.inode)
            if without is None or not any(map(without.holds, event.lines)):
                disk.take(event.tree, event.inode)
    tree = events[-1].tree
    return wrong + [f"at the end {told}" for told in _unsafe(tree, disk, tree.top, gone=False)]


def _half_marked(now: Tree, disk: Tree, marker: list[str], old: int | None) -> list[str]:
    """Where the marker is there, or may be after a cut, all else must be safe; not for the old."""
    if {now.follow(marker), disk.follow(marker)} <= {None, old}:
        return []
    chain, inode = set(), now.top
    for name in marker:
        chain.add((inode, name))
        inode = now.folders.get(inode, {}).get(name, -1)
    told = _unsafe(now, disk, now.top, but=chain)
    if disk.follow(marker) is not None and disk.follow(marker[:-1]) not in now.folders:
        told.append("what was beside it is gone")
    return [f"{'/'.join(marker)} may be there, and {one}" for one in told]


def _unsafe_rename(event: Event, disk: Tree, root: Path) -> list[str]:
    """What takes its place is safe within, as is all that was written in place, and its folder."""
    inode, wrong, names = event.tree.top, [], Path(event.path).relative_to(root).parts
    for name in names[:-1]:
        if disk.folders.get(inode, {}).get(name) != event.tree.folders[inode][name]:
            wrong.append(f"the name of {name} is not safe when {event.path} is put into it")
        inode = event.tree.folders[inode][name]
    told = [*_unsafe(event.tree, disk, event.inode), *_changed(event.tree, disk)]
    return wrong + [f"when {event.path} is put in place {one}" for one in told]


def _out_of_order(event: Event, disk: Tree) -> list[str]:
    """Of files that are written in place, one is synced when those before it are safe."""
    if event.staged or event.inode not in event.tree.files:
        return []
    return [
        f"when {event.path} is synced {told}"
        for told in _changed(event.tree, disk, but=event.inode)
    ]


def _synced_in_another_order(event: Event, synced: list[int], marker: list[str]) -> list[str]:
    """Of a folder with the marker in it the files are synced, the marker last, and then folders."""
    last = event.tree.follow(marker)
    ranks = {
        inode: 2 if inode in event.tree.folders else int(inode == last)
        for _, inode in event.tree.below(event.inode)
    }
    found = [ranks[inode] for inode in dict.fromkeys(synced) if inode in ranks]
    return [] if found == sorted(found) else [f"{event.path}: synced in the order {found}"]


def _changed(tree: Tree, disk: Tree, but: int = -1) -> list[str]:
    """Files of other contents than those that are safe."""
    return [
        f"the contents of {path} are not safe"
        for path, inode in tree.below(tree.top)
        if inode != but and inode in tree.files and tree.files[inode][0]
        if disk.files.get(inode) != tree.files[inode]
    ]


def _unsafe(
    now: Tree,
    disk: Tree,
    top: int,
    *,
    but: set[tuple[int, str]] = frozenset(),  # type: ignore[assignment]
    gone: bool = True,
) -> list[str]:
    """Names and contents, of a folder or file and below, that a cut may take back.

    Args:
        now: what is there.
        disk: what is safe.
        top: inode of the folder or file.
        but: names in folders that do not count.
        gone: whether names that were removed count, too.
    """
    wrong = []
    for path, inode in now.below(top):
        if inode in now.files:
            if now.files[inode][0] and disk.files.get(inode) != now.files[inode]:
                wrong.append(f"the contents of {path} are not safe")
            continue
        ours, safe = _lasting(now.folders[inode]), _lasting(disk.folders.get(inode, {}))
        for name in sorted(ours.keys() | safe.keys()):
            counts = (inode, name) not in but and (gone or name in ours)
            if counts and ours.get(name) != safe.get(name):
                wrong.append(f"the name {path}/{name} is not safe")
    return wrong


def _lasting(listing: Listing) -> Listing:
    return {
        name: inode
        for name, inode in listing.items()
        if not name.startswith(_STAGED) and name not in _LOCKS
    }


def _lines() -> list[tuple[str, int]]:
    """The lines of the library that are at work, as file in the package and number."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append((path.relative_to(PACKAGE).as_posix(), frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return found
