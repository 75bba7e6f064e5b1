"""Run directory: locking, start and resumption, configuration and metrics.

::

    config.yaml     the whole configuration
    metrics.jsonl   one record per line, in the order of events
    checkpoints/    see fastadapt.training.checkpoint
    adapter/        the trained adapters
    summary.json    the final numbers
    report.html     the numbers as a page
    changes.json    and changes.html: what the adapter changed (fastadapt.effects.changes)
    tensorboard/    and wandb/, run-id.txt: files of sinks (fastadapt.training.logs.sinks)
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

from fastadapt.data.rendered import AUTO
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
from fastadapt.models.sources.pair_sources import Sources
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
    """Keys that every record of ``metrics.jsonl`` has."""

    kind: str
    step: Count


CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
SUMMARY = "summary.json"
REPORT = "report.html"
CHANGES = ("changes.json", "changes.html")
TENSORBOARD = "tensorboard"
WANDB = "wandb"
RUN_ID = "run-id.txt"
_LOCK = ".lock"
#: Last sentences of an error of the disk.
RESUME_HINT = "Checkpoints are intact. Re-run the same command with --resume."
_FOLDERS = (CHECKPOINTS, ADAPTER, TENSORBOARD, WANDB)
#: Files of a run except its configuration. An overwrite removes these and no others.
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
    *CHANGES,
)


def _workspace(folder: Path) -> Workspace:
    return Workspace(
        folder,
        "run.output",
        "training in",
        replaced=(CONFIG, METRICS, SUMMARY, ADAPTER, REPORT, *CHANGES, RUN_ID),
        written=_WRITTEN,
        marker=CONFIG,
    )


@contextmanager
def open_run(config: TrainConfig, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Lock ``run.output`` for this process and yield the folder, whose files are unchanged.

    Raises:
        UserError: the path is not a folder, cannot be created, is in use by another process, holds
            a run (without ``resume`` or ``overwrite``), holds no run to resume or to overwrite, or
            holds a run whose configuration differs.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run, --overwrite removes it: choose one")
    folder = typed_path(config.run.output, "run.output")
    workspace = _workspace(folder)
    _check_contents(workspace, config, resume=resume, overwrite=overwrite)
    with workspace.claimed():
        yield folder


def start_afresh(folder: Path, config: TrainConfig) -> None:
    """Remove the files of an earlier run from the folder, then write the configuration.

    See :meth:`fastadapt.io.workspace.Workspace.start`.
    """
    _workspace(folder).start(lambda staged: save_config(config, staged))


def sweep(folder: Path) -> list[Path]:
    """Remove incomplete files that killed processes left; the caller holds the lock.

    Returns:
        The removed paths.

    Raises:
        RunError: a file cannot be removed.
    """
    return _workspace(folder).sweep()


class MetricsLog:
    """Writer of ``metrics.jsonl``, which passes every record to sinks.

    Args:
        path: the file, to which records are appended and flushed one at a time.
        sinks: functions that are called with every record, in order.
        recorded: on ranks other than 0, the ``recorded`` of rank 0. Such a log only counts records
            and writes nothing.
    """

    def __init__(
        self, path: Path, sinks: Sequence[Sink] = (), recorded: set[tuple[str, int]] | None = None
    ) -> None:
        self._sinks = tuple(sinks)
        self._path = path
        self._silent = recorded is not None
        #: (kind, step) of every record.
        self.recorded = recorded or {(r["kind"], r["step"]) for r in read_records(path)}
        try:
            self._file = FileIO(os.devnull, "a") if self._silent else open_appended(path)
        except OSError as error:
            raise RunError(cannot_write(path, error, RESUME_HINT)) from error

    def write(self, kind: str, step: int, **values: Any) -> Record:
        """Append a record and return it. Numbers that are not finite become null, as in JSON."""
        record = {"kind": kind, "step": step, **_finite(values)}
        self.recorded.add((kind, step))
        if self._silent:
            return record
        left = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
        with disk_errors(self._path, RESUME_HINT):
            while left:
                left = left[self._file.write(left) :]
        for sink in self._sinks:
            sink(record)
        return record

    def has(self, kind: str, step: int) -> bool:
        """Return whether the log has a record of this kind and step."""
        return (kind, step) in self.recorded

    def sync(self) -> None:
        """Write all records to the disk (fsync)."""
        if self._silent:
            return
        with disk_errors(self._path, RESUME_HINT):
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_log(path: Path, sinks: Sequence[Sink], ranks: Ranks) -> MetricsLog:
    """Return this rank's log; only that of rank 0 writes."""
    on_main = [MetricsLog(path, sinks)] if ranks.is_main else []
    recorded = ranks.on_main(lambda: on_main[0].recorded)
    return on_main[0] if on_main else MetricsLog(path, recorded=recorded)


def read_records(path: Path) -> list[Record]:
    """Return the records of a metrics file, without a last line that a kill cut short.

    Numbers that are not finite become null.
    """
    records = []
    for line in path.read_bytes().splitlines() if has_file(path) else ():
        with suppress(DocumentError):
            records.append(_finite(parse_line(line, str(path), RecordKey)))
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Remove the records after ``step``, which the resumed run writes again."""
    retained = [record for record in read_records(path) if record["step"] <= step]
    with disk_errors(path, RESUME_HINT), replacing(path) as staged:
        staged.write_text(
            "".join(json.dumps(record) + "\n" for record in retained), encoding="utf-8"
        )


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
                f"run.output: {path} is a link to {os.readlink(path)}, which is not a folder. "
                "Nothing was changed. Create that folder, or remove the link."
            )
    if resume:
        if not has_file(folder / CONFIG):
            raise UserError(f"--resume: {folder} holds no run; omit --resume to start one")
        _check_same_config(folder, config)
    elif not names:
        return  # empty, or the run was killed before its first write
    elif not _looks_like_a_run(folder):
        raise workspace.foreign("is not empty and does not look like a run", names)
    elif not overwrite:
        steps = list_checkpoints(folder / CHECKPOINTS)
        reached = f"at step {steps[-1][0]}" if steps else "without a checkpoint"
        raise UserError(
            f"run.output: {folder} holds another run, {reached}. Resume that run (--resume), "
            "remove it (--overwrite), or choose another folder (--run.output)."
        )


def _looks_like_a_run(folder: Path) -> bool:
    """Return whether a folder holds files of a run; added files do not matter."""
    marks = (_LOCK, METRICS, CHECKPOINTS)
    if not (folder / CONFIG).is_file() or not any((folder / name).exists() for name in marks):
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
    pair = replace(before.pair, trust_remote_code=trusted)
    before = replace(before, pair=Sources.find(pair).located()).located()
    if config.data.family == AUTO:  # the run's form, see trainer
        config = replace(config, data=replace(config.data, family=before.data.family))
    differing = differences(config, before)
    if differing:
        changes = "; ".join(f"{key}: {new!r}, was {old!r}" for key, (new, old) in differing.items())
        raise UserError(
            f"--resume: the run in {folder} was started with other values ({changes}). Pass "
            "the old values, or start a new run with another --run.output."
        )
