"""Interrupt a command by kills and full disks, resume it, and compare the files that it writes.

Usage: ``interruptions.py PLAN.json``. The plan::

    command    arguments of `fastadapt`
    workdir    folder of all files that the command writes, without other files
    before     folder whose contents are copied to the workdir before each attempt, or null
    kills      number of SIGKILLs, spread over the moments of an uninterrupted run
    full       sizes of the disk, as fractions of the space that the command needs
    varying    patterns of the names of files that contain times

The libraries are imported once, and every attempt is a fork. A moment is a call that changes the
disk: open for writing, fsync, rename, remove, mkdir, a write to a log, or half a safetensors file.
The program prints a JSON object: ``moments``, ``kills``, ``full`` (number of attempts by the way of
limiting the disk), and ``faults``, a list of messages.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
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
LOCK = "/lock", b""  # end of the name, contents
WRITES = os.O_WRONLY | os.O_RDWR


class Outcome(NamedTuple):
    """Wait status, output and number of moments of an attempt."""

    status: int
    output: str
    moments: int

    @property
    def code(self) -> int:
        return os.waitstatus_to_exitcode(self.status)


def attempt(
    command: list[str], workdir: Path, *, kill_at: int | None = None, limit: int | None = None
) -> Outcome:
    """Run a command in a fork that kills itself at moment ``kill_at``.

    Args:
        command: arguments of `fastadapt`.
        workdir: folder whose changes count as moments.
        kill_at: moment, counted from 1; None for no kill.
        limit: largest size of a file in bytes.
    """
    output, counted = workdir.parent / "said", workdir.parent / "counted"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            count = watch(workdir, kill_at)
            from fastadapt.cli.main import main

            code = main(command)
            sys.stdout.flush()
            sys.stderr.flush()
            counted.write_text(str(count()))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    moments = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return Outcome(status, output.read_text(errors="replace"), moments)


def watch(workdir: Path, kill_at: int | None) -> Callable[[], int]:
    """Count the moments in ``workdir``, and kill this process at moment ``kill_at``."""
    import pyarrow.parquet as pq
    import safetensors.torch

    start, seen = f"{os.path.realpath(workdir)}/", 0

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

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = (
                isinstance(arguments[2], int) and arguments[2] & WRITES and inside(arguments[0])
            )
        elif event in ("os.remove", "os.rmdir"):
            counts = inside(arguments[0], arguments[1])
        elif event == "os.mkdir":
            counts = inside(arguments[0], arguments[2])
        elif event == "os.rename":
            counts = inside(arguments[1], arguments[3])
        else:
            return
        if counts:
            moment()

    def counted_call(function: Any) -> Any:
        def wrapper(descriptor: int, *more: Any) -> Any:
            if inside(descriptor):
                moment()
            return function(descriptor, *more)

        return wrapper

    sys.addaudithook(audit)
    os.fsync, os.write = counted_call(os.fsync), counted_call(os.write)
    save, write_table = safetensors.torch.save_file, pq.ParquetWriter.write_table

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        def half() -> None:
            save(tensors, filename, metadata)
            os.truncate(filename, os.path.getsize(filename) // 2)

        moment(half)
        save(tensors, filename, metadata)

    def write_rows(self: Any, *arguments: Any, **more: Any) -> None:
        moment()
        write_table(self, *arguments, **more)

    safetensors.torch.save_file, pq.ParquetWriter.write_table = save_file, write_rows
    return lambda: seen


class Trial:
    """A command, and the files of an uninterrupted run of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.command: list[str] = plan["command"]
        self.workdir = Path(plan["workdir"])
        self.before = Path(plan["before"]) if plan["before"] else None
        self.varying: list[str] = plan["varying"]
        self.faults: list[str] = []
        self.reset()
        whole = attempt(self.command, self.workdir)
        if whole.code != 0:
            raise SystemExit(f"{self.command} ended with {whole.code}: {whole.output}")
        self.moments = whole.moments
        self.expected = self.files()
        self.need = space(self.workdir) - (space(self.before) if self.before else 0)
        self.largest = max(
            path.stat().st_size for path in self.workdir.rglob("*") if path.is_file()
        )

    def reset(self) -> None:
        """Restore the contents that the workdir has before each attempt."""
        for path in list(self.workdir.iterdir()) if self.workdir.exists() else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.before is not None:
            shutil.copytree(self.before, self.workdir, dirs_exist_ok=True)
        self.workdir.mkdir(exist_ok=True)

    def files(self) -> dict[str, bytes | None]:
        """Return the contents of every file by name; None for files that contain times."""
        contents: dict[str, bytes | None] = {}
        for path in sorted(self.workdir.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(self.workdir))
                varies = any(fnmatch.fnmatch(name, pattern) for pattern in self.varying)
                contents[name] = None if varies else path.read_bytes()
        return contents

    def kill(self, moment: int) -> None:
        self.reset()
        ended = attempt(self.command, self.workdir, kill_at=moment)
        if ended.code != -signal.SIGKILL:
            self.faults.append(f"kill {moment}: ended with {ended.code}: {ended.output[-300:]}")
        self.resume(f"kill {moment}")

    def resume(self, when: str, output: str = "") -> None:
        """Run the command again as its messages advise, and compare its files."""
        more = ["--resume"] if "--resume" in output and "--resume" not in self.command else []
        for _ in range(3):
            ended = attempt([*self.command, *more], self.workdir)
            if ended.code == 2 and "(--resume)" in ended.output:
                more = ["--resume"]
            elif ended.code == 2 and "(--overwrite)" in ended.output:  # the kill came after the end
                self.compare(f"{when}, finished", swept=False)
                more = ["--overwrite"]
            else:
                break
        if ended.code != 0:
            self.faults.append(f"{when}: {more}: exit {ended.code}: {ended.output[-500:]}")
        self.compare(when)

    def compare(self, when: str, *, swept: bool = True) -> None:
        """Compare the files; those that no command has ``swept`` may include an empty lock."""
        contents = self.files()
        if not swept:
            left = [n for n, text in contents.items() if ".tmp-" in n or (n[-5:], text) == LOCK]
            contents = {name: contents[name] for name in contents if name not in left}
        names = contents.keys() | self.expected.keys()
        none = b"none"
        differing = [n for n in names if contents.get(n, none) != self.expected.get(n, none)]
        if differing:
            self.faults.append(f"{when}: files differ: {sorted(differing)[:5]}")
        staged = [str(path) for path in self.workdir.rglob(".tmp-*")]
        if swept and staged:
            self.faults.append(f"{when}: left over: {staged[:3]}")

    def fill(self, share: float) -> str:
        """Run the command on a disk of a fraction of the needed space; return the kind of limit."""
        self.reset()
        with small_disk(self.workdir) as resize:
            if resize is None:
                limits, when = "no file beyond a size", f"files of {share:.0%}"
                ended = attempt(self.command, self.workdir, limit=int(share * self.largest))
            else:
                limits, when = "tmpfs", f"full at {share:.0%}"
                self.reset()
                size = space(self.workdir) + int(share * self.need) // PAGE * PAGE
                resize(max(PAGE, size))  # a size of 0 would be no limit
                ended = attempt(self.command, self.workdir)
                resize(1 << 28)
            reasons = ["No space left on device"]
            if limits != "tmpfs":  # SQLite does not name the system's error
                reasons = ["File too large", "disk I/O error"]
            for is_right, fault in (
                (ended.code == 1, f"exit {ended.code}"),
                ("Traceback" not in ended.output, "a traceback"),
                (ended.output.count("error: ") == 1, "not one error"),
                ("cannot be written" in flat(ended.output), "no 'cannot be written'"),
                (any(reason in flat(ended.output) for reason in reasons), "no reason"),
                (
                    re.search(r"again|--resume|[Rr]e-run", flat(ended.output)) is not None,
                    "no advice",
                ),
            ):
                if not is_right:
                    self.faults.append(f"{when}: {fault}: {ended.output[-700:]}")
            self.resume(when, ended.output)
        return limits


def flat(text: str) -> str:
    return " ".join(text.split())


def space(folder: Path) -> int:
    """Return the bytes of a folder's files, rounded up to whole pages."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@contextmanager
def small_disk(workdir: Path) -> Iterator[Callable[[int], None] | None]:
    """Mount a file system and yield a function that resizes it, or None if mounting failed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(workdir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return

    def resize(size: int) -> None:
        again = ["mount", "-o", f"remount,size={size}", str(workdir)]
        subprocess.run(again, check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(workdir)], check=True)


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
    limits = [trial.fill(share) for share in plan["full"]]
    return {
        "moments": trial.moments,
        "kills": len(moments),
        "full": {name: limits.count(name) for name in limits},
        "faults": trial.faults,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
