"""Kill a command at many moments, and let the disk fill up under it; report what was left.

Run as a program: ``interruptions.py PLAN.json``. The plan::

    command    arguments of `fastadapt`
    room       folder that holds all that the command writes, and nothing else
    before     folder whose contents the room has before each attempt, or null
    kills      number of SIGKILLs, spread over the moments of an undisturbed run
    full       shares of the space that the command needs, each of which a disk is limited to
    varying    patterns of the names of files whose contents hold times

The libraries are imported once; every attempt is a fork. A moment is a call that changes what is on
the disk: open for writing, fsync, rename, remove, mkdir, a write to a log, and half a safetensors
file. Prints a JSON object: ``moments``, ``kills``, ``full`` (how it was made, and how often), and
``wrong``, a list of sentences.
"""

from __future__ import annotations

import fnmatch
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PAGE = 4096
WRITES = os.O_WRONLY | os.O_RDWR


class Outcome(NamedTuple):
    """How an attempt ended: its wait status, what it said, and the moments that it had."""

    status: int
    said: str
    moments: int

    @property
    def code(self) -> int:
        return os.waitstatus_to_exitcode(self.status)


def attempt(
    command: list[str], room: Path, *, kill_at: int | None = None, limit: int | None = None
) -> Outcome:
    """Run a command in a fork that kills itself at moment ``kill_at``.

    Args:
        command: arguments of `fastadapt`.
        room: where moments count.
        kill_at: from 1; none if not given.
        limit: no file may grow beyond it.
    """
    said, counted = room.parent / "said", room.parent / "counted"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with said.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            moments = watch(room, kill_at)
            from fastadapt.cli.main import main

            code = main(command)
            sys.stdout.flush()
            sys.stderr.flush()
            counted.write_text(str(moments()))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    moments = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return Outcome(status, said.read_text(errors="replace"), moments)


def watch(room: Path, kill_at: int | None) -> Callable[[], int]:
    """Count the moments in ``room`` from now on, and kill this process at one of them."""
    import pyarrow.parquet as pq
    import safetensors.torch

    start, seen = f"{os.path.realpath(room)}/", 0

    def inside(path: Any, folder: int = -1) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fspath(path)
        path = path.decode() if isinstance(path, bytes) else path
        if folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.path.abspath(path).startswith(start)

    def moment(before: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            counts = isinstance(given[2], int) and given[2] & WRITES and inside(given[0])
        elif event in ("os.remove", "os.rmdir"):
            counts = inside(given[0], given[1])
        elif event == "os.mkdir":
            counts = inside(given[0], given[2])
        elif event == "os.rename":
            counts = inside(given[1], given[3])
        else:
            return
        if counts:
            moment()

    def of_descriptor(function: Any) -> Any:
        def stand_in(descriptor: int, *more: Any) -> Any:
            if inside(descriptor):
                moment()
            return function(descriptor, *more)

        return stand_in

    sys.addaudithook(audit)
    os.fsync, os.write = of_descriptor(os.fsync), of_descriptor(os.write)
    save, write_table = safetensors.torch.save_file, pq.ParquetWriter.write_table

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        def half() -> None:
            save(tensors, path, metadata)
            os.truncate(path, os.path.getsize(path) // 2)

        moment(half)
        save(tensors, path, metadata)

    def write_rows(self: Any, *given: Any, **more: Any) -> None:
        moment()
        write_table(self, *given, **more)

    safetensors.torch.save_file, pq.ParquetWriter.write_table = save_file, write_rows
    return lambda: seen


class Trial:
    """A command, and what it leaves when nothing comes between."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.command: list[str] = plan["command"]
        self.room = Path(plan["room"])
        self.before = Path(plan["before"]) if plan["before"] else None
        self.varying: list[str] = plan["varying"]
        self.wrong: list[str] = []
        self.reset()
        whole = attempt(self.command, self.room)
        if whole.code != 0:
            raise SystemExit(f"{self.command} ended with {whole.code}: {whole.said}")
        self.moments = whole.moments
        self.expected = self.files()
        self.need = space(self.room) - (space(self.before) if self.before else 0)
        self.largest = max(path.stat().st_size for path in self.room.rglob("*") if path.is_file())

    def reset(self) -> None:
        """Empty the room, but for what it has at first."""
        for path in list(self.room.iterdir()) if self.room.exists() else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.before is not None:
            shutil.copytree(self.before, self.room, dirs_exist_ok=True)
        self.room.mkdir(exist_ok=True)

    def files(self) -> dict[str, bytes | None]:
        """Every file's contents by its name; None of those that hold times."""
        found: dict[str, bytes | None] = {}
        for path in sorted(self.room.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(self.room))
                varies = any(fnmatch.fnmatch(name, pattern) for pattern in self.varying)
                found[name] = None if varies else path.read_bytes()
        return found

    def kill(self, moment: int) -> None:
        self.reset()
        ended = attempt(self.command, self.room, kill_at=moment)
        if ended.code != -signal.SIGKILL:
            self.wrong.append(f"kill {moment}: ended with {ended.code}: {ended.said[-300:]}")
        self.go_on(f"kill {moment}")

    def go_on(self, when: str, said: str = "") -> None:
        """Run the command again, as messages advise, and compare what is there in the end."""
        more = ["--resume"] if "--resume" in said and "--resume" not in self.command else []
        for _ in range(3):
            ended = attempt([*self.command, *more], self.room)
            if ended.code == 2 and "(--resume)" in ended.said:
                more = ["--resume"]
            elif ended.code == 2 and "(--overwrite)" in ended.said:  # the kill came after the end
                self.compare(f"{when}, finished", swept=False)
                more = ["--overwrite"]
            else:
                break
        if ended.code != 0:
            self.wrong.append(f"{when}: {more}: exit {ended.code}: {ended.said[-500:]}")
        self.compare(when)

    def compare(self, when: str, *, swept: bool = True) -> None:
        found = self.files()
        if not swept:
            found = {name: found[name] for name in found if ".tmp-" not in name}
        names = found.keys() | self.expected.keys()
        none = b"none"
        differing = [n for n in names if found.get(n, none) != self.expected.get(n, none)]
        if differing:
            self.wrong.append(f"{when}: other files than of one go: {sorted(differing)[:5]}")
        staged = [str(path) for path in self.room.rglob(".tmp-*")]
        if swept and staged:
            self.wrong.append(f"{when}: left over: {staged[:3]}")

    def fill(self, share: float) -> str:
        """Let a disk be full once the share of what is needed is written; returns how."""
        self.reset()
        with small_disk(self.room) as resize:
            if resize is None:
                how, when = "no file beyond a size", f"files of {share:.0%}"
                ended = attempt(self.command, self.room, limit=int(share * self.largest))
            else:
                how, when = "tmpfs", f"full at {share:.0%}"
                self.reset()
                room = space(self.room) + int(share * self.need) // PAGE * PAGE
                resize(max(PAGE, room))  # none would be no limit
                ended = attempt(self.command, self.room)
                resize(1 << 28)
            reasons = ["No space left on device"]
            if how != "tmpfs":  # SQLite does not say which error of the system it was
                reasons = ["File too large", "disk I/O error"]
            for good, told in (
                (ended.code == 1, f"exit {ended.code}"),
                ("Traceback" not in ended.said, "a traceback"),
                (ended.said.count("error: ") == 1, "not one error"),
                ("cannot be written" in flat(ended.said), "no word that it cannot be written"),
                (any(reason in flat(ended.said) for reason in reasons), "no reason"),
                ("again" in flat(ended.said) or "--resume" in ended.said, "no advice"),
            ):
                if not good:
                    self.wrong.append(f"{when}: {told}: {ended.said[-700:]}")
            self.go_on(when, ended.said)
        return how


def flat(text: str) -> str:
    return " ".join(text.split())


def space(folder: Path) -> int:
    """Bytes of a folder's files in whole pages."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@contextmanager
def small_disk(room: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system of its own at ``room``, to be resized; None where none may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(room)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return

    def resize(size: int) -> None:
        again = ["mount", "-o", f"remount,size={size}", str(room)]
        subprocess.run(again, check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(room)], check=True)


def main(plan: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # once, before all forks

    import fastadapt.cli.main
    import fastadapt.evaluation.comparison
    import fastadapt.features.collect
    import fastadapt.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    trial = Trial(plan)
    kills = plan["kills"]
    moments = [1 + i * (trial.moments - 1) // max(1, kills - 1) for i in range(kills)]
    for moment in moments:
        trial.kill(moment)
    how = [trial.fill(share) for share in plan["full"]]
    return {
        "moments": trial.moments,
        "kills": len(moments),
        "full": {name: how.count(name) for name in how},
        "wrong": trial.wrong,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
