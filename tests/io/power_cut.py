"""Model a disk that loses unsynced changes at a power cut; a synced folder makes its names durable.

:func:`record` runs code and records its calls of fsync and rename, each with the calling lines of
the library and the contents of the folder. :func:`faults` replays these calls on a disk that holds
only synced data, and lists inconsistent states that a power cut could leave. ``without`` removes
the syncs of one call, so that a test can check that this call is necessary.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import fastadapt

PACKAGE = Path(fastadapt.__file__).parent
SYNCS = {"fsync", "sync", "sync_file", "sync_folder", "sync_tree"}
#: Prefixes of the names of staged files, which no reader opens.
_STAGED = (".tmp-", "collecting.next")
_LOCKS = (".lock", "lock")


class Site(NamedTuple):
    """A call in the library's source that syncs."""

    file: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first}"

    def holds(self, line: tuple[str, int]) -> bool:
        return line[0] == self.file and self.first <= line[1] <= self.last


def sites() -> list[Site]:
    """Return every call in the library of a function that syncs."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in SYNCS:
                    file = path.relative_to(PACKAGE).as_posix()
                    calls.append(Site(file, node.lineno, node.end_lineno or node.lineno))
    return calls


Listing = dict[str, int]  # name -> inode


@dataclass
class Tree:
    """Contents of a folder and its subfolders by inode, at one time."""

    top: int
    folders: dict[int, Listing] = field(default_factory=dict)
    files: dict[int, tuple[int, int]] = field(default_factory=dict)  # size, time of the last change

    def follow(self, names: Sequence[str]) -> int | None:
        """Return the inode of a path, or None if the path does not exist."""
        inode: int | None = self.top
        for name in names:
            inode = None if inode is None else self.folders.get(inode, {}).get(name)
        return inode

    def take(self, other: Tree, inode: int) -> None:
        """Copy the state of a folder or file from another tree."""
        if inode in other.folders:
            self.folders[inode] = other.folders[inode]
        if inode in other.files:
            self.files[inode] = other.files[inode]

    def below(self, inode: int, path: str = "") -> Iterator[tuple[str, int]]:
        """Yield path and inode of a folder or file and of its contents, except staged ones."""
        yield path, inode
        for name, descriptors in _lasting(self.folders.get(inode, {})).items():
            yield from self.below(descriptors, f"{path}/{name}")


@dataclass
class Event:
    """A recorded call: ``sync`` of an inode or ``rename`` to a path; or the ``end``."""

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
    """Recorded calls in order. The first event holds the contents before the recorded code."""

    root: Path
    events: list[Event] = field(default_factory=list)
    descriptors: dict[int, int] = field(
        default_factory=dict
    )  # open, so that no inode is used again

    def add_event(self, kind: str, inode: int = -1, path: str = "") -> None:
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
                # SQLite syncs its file without os.fsync, so its contents are not checked.
                size = 0 if name.endswith(".sqlite") else stat.st_size
                tree.files[inode] = size, stat.st_mtime_ns
        return tree

    def _inode(self, path: str) -> int:
        inode = os.stat(path).st_ino
        if inode not in self.descriptors:
            self.descriptors[inode] = os.open(path, os.O_RDONLY)
        return inode

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def record(write: Callable[[], object], root: Path, patch: Callable) -> Recording:
    """Run ``write`` and record its calls in a folder; ``patch`` is ``monkeypatch.setattr``."""
    root = Path(os.path.realpath(root))
    recording = Recording(root)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        recording.add_event("sync", os.fstat(descriptor).st_ino, path)
        fsync(descriptor)

    def renamed(function: Callable) -> Callable:
        def wrapper(old: os.PathLike, new: os.PathLike) -> None:
            recording.add_event("before")
            function(old, new)
            recording.add_event("rename", os.stat(new).st_ino, os.fspath(new))

        return wrapper

    recording.add_event("start")
    patch(os, "fsync", synced)
    patch(os, "rename", renamed(os.rename))
    patch(os, "replace", renamed(os.replace))
    write()
    recording.add_event("end")
    recording.close()
    return recording


def faults(
    recording: Recording,
    marker: str | None,
    without: Site | None = None,
    *,
    old_counts: bool = True,
) -> list[str]:
    """Return messages about inconsistent states that a power cut could leave.

    Args:
        recording: recorded calls.
        marker: path in the folder of the file that marks the contents as complete, or None.
        old_counts: whether a marker that existed before marks the old contents as complete.
        without: a call whose syncs are ignored.
    """
    start, *events = recording.events
    disk = Tree(start.tree.top, dict(start.tree.folders), dict(start.tree.files))
    problems: list[str] = []
    synced: list[int] = []
    names = marker.split("/") if marker else []
    old = start.tree.follow(names) if marker and not old_counts else None
    for event in events:
        if marker is not None:
            problems += _half_marked(event.tree, disk, names, old)
        if event.kind == "rename" and not event.staged:
            problems += _unsafe_rename(event, disk, recording.root)
            problems += _synced_in_another_order(event, synced, names)
        if event.kind == "sync":
            problems += _out_of_order(event, disk)
            synced.append(event.inode)
            if without is None or not any(map(without.holds, event.lines)):
                disk.take(event.tree, event.inode)
    tree = events[-1].tree
    return problems + [
        f"at the end {fault}" for fault in _unsafe(tree, disk, tree.top, removed_counts=False)
    ]


def _half_marked(now: Tree, disk: Tree, marker: list[str], old: int | None) -> list[str]:
    """Check that all contents are durable once the new marker may exist after a cut."""
    if {now.follow(marker), disk.follow(marker)} <= {None, old}:
        return []
    chain, inode = set(), now.top
    for name in marker:
        chain.add((inode, name))
        inode = now.folders.get(inode, {}).get(name, -1)
    lost = _unsafe(now, disk, now.top, but=chain)
    if disk.follow(marker) is not None and disk.follow(marker[:-1]) not in now.folders:
        lost.append("its folder is removed")
    return [f"{'/'.join(marker)} may exist, and {fault}" for fault in lost]


def _unsafe_rename(event: Event, disk: Tree, root: Path) -> list[str]:
    """Check that the renamed contents, the files written in place and the folder are durable."""
    inode, problems, names = event.tree.top, [], Path(event.path).relative_to(root).parts
    for name in names[:-1]:
        if disk.folders.get(inode, {}).get(name) != event.tree.folders[inode][name]:
            problems.append(f"the name of {name} is not safe when {event.path} is put into it")
        inode = event.tree.folders[inode][name]
    lost = [*_unsafe(event.tree, disk, event.inode), *_changed(event.tree, disk)]
    return problems + [f"when {event.path} is put in place {fault}" for fault in lost]


def _out_of_order(event: Event, disk: Tree) -> list[str]:
    """Check that a file written in place is synced after the files written before are durable."""
    if event.staged or event.inode not in event.tree.files:
        return []
    return [
        f"when {event.path} is synced {fault}"
        for fault in _changed(event.tree, disk, but=event.inode)
    ]


def _synced_in_another_order(event: Event, synced: list[int], marker: list[str]) -> list[str]:
    """Check the order of syncs in a renamed folder: files, then the marker, then folders."""
    last = event.tree.follow(marker)
    ranks = {
        inode: 2 if inode in event.tree.folders else int(inode == last)
        for _, inode in event.tree.below(event.inode)
    }
    order = [ranks[inode] for inode in dict.fromkeys(synced) if inode in ranks]
    return [] if order == sorted(order) else [f"{event.path}: synced in the order {order}"]


def _changed(tree: Tree, disk: Tree, but: int = -1) -> list[str]:
    """Return messages about files whose contents are not durable."""
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
    removed_counts: bool = True,
) -> list[str]:
    """Return messages about names and contents, at and below ``top``, that a cut may revert.

    Args:
        now: current contents.
        disk: durable contents.
        top: inode of the folder or file.
        but: folder and name of entries to ignore.
        removed_counts: whether removed names must be durably removed.
    """
    problems = []
    for path, inode in now.below(top):
        if inode in now.files:
            if now.files[inode][0] and disk.files.get(inode) != now.files[inode]:
                problems.append(f"the contents of {path} are not safe")
            continue
        ours, safe = _lasting(now.folders[inode]), _lasting(disk.folders.get(inode, {}))
        for name in sorted(ours.keys() | safe.keys()):
            counts = (inode, name) not in but and (removed_counts or name in ours)
            if counts and ours.get(name) != safe.get(name):
                problems.append(f"the name {path}/{name} is not safe")
    return problems


def _lasting(listing: Listing) -> Listing:
    return {
        name: inode
        for name, inode in listing.items()
        if not name.startswith(_STAGED) and name not in _LOCKS
    }


def _lines() -> list[tuple[str, int]]:
    """Return the calling lines of the library, as file in the package and line number."""
    frame: FrameType | None
    frame, lines = sys._getframe(2), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            lines.append((path.relative_to(PACKAGE).as_posix(), frame.f_lineno))
        frame = frame.f_back
    return lines
