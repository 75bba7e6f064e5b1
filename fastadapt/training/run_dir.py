"""The run directory: who may write into it, and the files in it that are no checkpoint.

::

    config.yaml     the whole configuration
    metrics.jsonl   one record per line, in the order of events
    checkpoints/    see fastadapt.training.checkpoint
    adapter/        the trained adapters
    summary.json    the final numbers
    report.html     the same, to look at
    tensorboard/    and wandb/, run-id.txt: what sinks keep here (fastadapt.training.logs.sinks)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import (
    cannot_write,
    disk_errors,
    open_appended,
    replacing,
)
from fastadapt.io.documents import Count, DocumentError, parse_line
from fastadapt.io.names import has_file, typed_path
from fastadapt.io.workspace import Workspace
from fastadapt.training.checkpoint import list_checkpoints
from fastadapt.training.config import (
    TrainConfig,
    differences,
    load_config,
    recorded_trust,
    save_config,
)

Record = dict[str, Any]
Sink = Callable[[Record], None]


class RecordKey(TypedDict):
    """What every record of ``metrics.jsonl`` holds."""

    kind: str
    step: Count


CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
SUMMARY = "summary.json"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
RUN_ID = "run-id.txt"
_LOCK = ".lock"
#: What the message of a full disk ends with.
GO_ON = "Checkpoints are intact: go on with --resume."
_FOLDERS = (CHECKPOINTS, ADAPTER, TENSORBOARD, WANDB)
#: Everything that a run writes but its configuration; an overwrite removes this and nothing else.
_WRITTEN = (
    f"{CHECKPOINTS}/step-*",
    f"{CHECKPOINTS}/.tmp-*",
    f"{ADAPTER}/fastadapt.json",
    f"{ADAPTER}/layer_*.safetensors",
    f"{TENSORBOARD}/events.out.tfevents.*",
    f"{WANDB}/*",
    RUN_ID,
    METRICS,
    SUMMARY,
    REPORT,
)


def _workspace(folder: Path) -> Workspace:
    return Workspace(
        folder,
        "run.output",
        "training in",
        replaced=(CONFIG, METRICS, SUMMARY, ADAPTER, REPORT, RUN_ID),
        written=_WRITTEN,
        marker=CONFIG,
    )


@contextmanager
def open_run(config: TrainConfig, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Claim ``run.output`` for this process; nothing in it is changed yet.

    Raises:
        UserError: it is no folder or cannot be made, is in use by another process, holds another
            run (without ``resume`` or ``overwrite``), holds none to resume or overwrite, or holds
            one of another configuration.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite removes it: choose one")
    folder = typed_path(config.run.output, "run.output")
    workspace = _workspace(folder)
    _check_contents(workspace, config, resume=resume, overwrite=overwrite)
    with workspace.claimed():
        yield folder


def start_afresh(folder: Path, config: TrainConfig) -> None:
    """Remove what an earlier run wrote into the folder, and write the configuration of this one.

    See :meth:`fastadapt.io.workspace.Workspace.start`.
    """
    _workspace(folder).start(lambda staged: save_config(config, staged))


def sweep(folder: Path) -> list[Path]:
    """Remove what kills left half-written beside the run's files; the caller holds the run.

    Raises:
        RunError: it cannot be removed.
    """
    return _workspace(folder).sweep()


class MetricsLog:
    """``metrics.jsonl``, and whoever else wants the records.

    Args:
        path: the file; records are appended, each flushed.
        sinks: called with every record, in order.
        seen: of a rank that does not lead: the ``seen`` of the one that does. It keeps count with
            the leader, and writes and tells nothing.
    """

    def __init__(
        self, path: Path, sinks: Sequence[Sink] = (), seen: set[tuple[str, int]] | None = None
    ) -> None:
        self._sinks = tuple(sinks)
        self._path = path
        self._silent = seen is not None
        #: Kind and step of every record.
        self.seen = seen or {(r["kind"], r["step"]) for r in read_records(path)}
        try:
            self._file = FileIO(os.devnull, "a") if self._silent else open_appended(path)
        except OSError as error:
            raise RunError(cannot_write(path, error, GO_ON)) from error

    def write(self, kind: str, step: int, **values: Any) -> Record:
        """Append a record. Numbers that are not finite become null, which JSON can say."""
        record = {"kind": kind, "step": step, **_finite(values)}
        self.seen.add((kind, step))
        if self._silent:
            return record
        left = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
        with disk_errors(self._path, GO_ON):
            while left:
                left = left[self._file.write(left) :]
        for sink in self._sinks:
            sink(record)
        return record

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a record of this kind and step."""
        return (kind, step) in self.seen

    def sync(self) -> None:
        """Return once all records are on the disk."""
        if self._silent:
            return
        with disk_errors(self._path, GO_ON):
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_log(path: Path, sinks: Sequence[Sink], ranks: Ranks) -> MetricsLog:
    """The log of each rank: rank 0 writes, the others keep count with it."""
    held = [MetricsLog(path, sinks)] if ranks.is_main else []
    seen = ranks.on_main(lambda: held[0].seen)
    return held[0] if held else MetricsLog(path, seen=seen)


def read_records(path: Path) -> list[Record]:
    """Return the whole records of a metrics file; a line that a kill cut short is left out.

    Numbers that are not finite are null, as this library writes them.
    """
    records = []
    for line in path.read_bytes().splitlines() if has_file(path) else ():
        with suppress(DocumentError):
            records.append(_finite(parse_line(line, str(path), RecordKey)))
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Take back what was recorded after ``step``, so that the steps to come are recorded once."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    with disk_errors(path, GO_ON), replacing(path) as staged:
        staged.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _check_contents(
    workspace: Workspace, config: TrainConfig, *, resume: bool, overwrite: bool
) -> None:
    folder, names = workspace.folder, workspace.names()
    for path in (folder / name for name in _FOLDERS):
        if path.is_symlink() and not path.is_dir():
            raise UserError(
                f"run.output: {path} is a link to {os.readlink(path)}, which is no folder; nothing "
                "was touched. Make that folder, or remove the link."
            )
    if resume:
        if not has_file(folder / CONFIG):
            raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
        _check_same_config(folder, config)
    elif all(name in _WRITTEN for name in names):
        return  # empty, or a run that was killed before it began
    elif not _looks_like_a_run(folder):
        raise workspace.foreign("is not empty and does not look like a run", names)
    elif not overwrite:
        steps = list_checkpoints(folder / CHECKPOINTS)
        reached = f"at step {steps[-1][0]}" if steps else "without a checkpoint"
        raise UserError(
            f"run.output: {folder} holds another run, {reached}. Go on with it (--resume), remove "
            "it (--overwrite), or give another folder (--run.output)."
        )


def _looks_like_a_run(folder: Path) -> bool:
    """Whether the traces of a run are there; files that someone added to it do not matter."""
    traces = (_LOCK, METRICS, CHECKPOINTS)
    if not (folder / CONFIG).is_file() or not any((folder / name).exists() for name in traces):
        return False
    try:
        load_config(folder / CONFIG)
    except UserError:
        return False
    return True


def _check_same_config(folder: Path, config: TrainConfig) -> None:
    before = load_config(folder / CONFIG)
    trusted = recorded_trust(folder / CONFIG)
    if trusted and not config.pair.trust_remote_code:
        raise UserError(
            f"--resume: the run in {folder} was trained with code that comes with "
            f"{config.pair.target} or {config.pair.base}. To run that code again, type "
            "--pair.trust_remote_code true"
        )
    before = replace(before, pair=replace(before.pair, trust_remote_code=trusted))
    differing = differences(config, before)
    if differing:
        told = "; ".join(f"{key}: {new!r}, was {old!r}" for key, (new, old) in differing.items())
        raise UserError(
            f"--resume: the run in {folder} has another configuration ({told}). Give the old "
            "values, or start another run with another --run.output."
        )
