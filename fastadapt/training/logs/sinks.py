"""Metric sinks beside ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio.

A sink is a copy of ``metrics.jsonl``. A new sink first gets all records in the file, then each new
record. Its earlier contents are deleted, or, on a server whose series only grow, skipped by their
row numbers. A resumed run therefore continues its series without gaps or repeated values, and a
sink that is added at the resumption has the whole history.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.io.names import has_file
from fastadapt.training.config import TrainConfig, to_dict
from fastadapt.training.run_dir import (
    METRICS,
    RESUME_HINT,
    RUN_ID,
    TENSORBOARD,
    Record,
    Sink,
    read_records,
)

PROJECT = "fastadapt"
#: Kinds of records that sinks get, in their order within a step.
SERIES = ("train", "eval")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_sinks(names: tuple[str, ...]) -> None:
    """Check that the packages of the sinks are installed.

    Raises:
        UserError: a package is not installed; the message names the extra to install.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"run.sinks: {name} is not installed; "
                f"install the extra: pip install 'fastadapt[{name}]'"
            )


@contextmanager
def open_sinks(config: TrainConfig, folder: Path) -> Iterator[list[Sink]]:
    """Yield the sinks of ``run.sinks``. Each opens at its first record and closes at the end."""
    check_sinks(config.run.sinks)
    with ExitStack() as stack:
        yield [_Lazy(OPENERS[name], config, folder, stack) for name in config.run.sinks]


def scalars(record: Record) -> dict[str, float]:
    """Return a record's numbers except ``step``: ``kind/name``, or ``kind/name/index`` in a list.

    Values that are null (not finite) or not a number are omitted.

    Example:
        >>> scalars({"kind": "train", "step": 3, "loss": 0.5, "l0_per_layer": [2.0, None]})
        {'train/loss': 0.5, 'train/l0_per_layer/0': 2.0}
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if name in ("kind", "step"):
            continue
        parts = enumerate(value) if isinstance(value, list) else [("", value)]
        for i, part in parts:
            if isinstance(part, (int, float)) and not isinstance(part, bool):
                numbers[f"{record['kind']}/{name}" + (f"/{i}" if i != "" else "")] = part
    return numbers


#: Writes the numbers of a record of a series.
_Write = Callable[[Record], None]


class _Lazy:
    """Sink that opens at its first record, so that ranks without records open none."""

    def __init__(
        self,
        opener: Callable[[TrainConfig, Path, ExitStack], _Write],
        config: TrainConfig,
        folder: Path,
        stack: ExitStack,
    ) -> None:
        self._opener, self._arguments, self._folder = opener, (config, folder, stack), folder
        self._write: _Write | None = None

    def __call__(self, record: Record) -> None:
        records = [record]
        if self._write is None:
            self._write = self._opener(*self._arguments)
            records = read_records(self._folder / METRICS)  # ends with this record
        for each in records:
            if each["kind"] in SERIES:
                self._write(each)


def _tensorboard(config: TrainConfig, folder: Path, stack: ExitStack) -> _Write:
    from torch.utils.tensorboard import SummaryWriter

    logs = folder / TENSORBOARD
    for old in logs.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(logs))
    stack.callback(writer.close)

    def write(record: Record) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])

    return write


def _wandb(config: TrainConfig, folder: Path, stack: ExitStack) -> _Write:
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            settings=wandb.Settings(console="off"),
        )
    except wandb.errors.Error as error:
        raise RunError(f"run.sinks: wandb cannot be opened: {error}") from error
    stack.callback(run.finish)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    # The row number follows from step and kind. On a resumption, rows that the server already has
    # are skipped by their number, since its series only grow.
    first = run.step if run.resumed else 0

    def write(record: Record) -> None:
        row = len(SERIES) * record["step"] + SERIES.index(record["kind"])
        if row >= first:
            run.log({"step": record["step"], **scalars(record)}, step=row, commit=True)

    return write


def _trackio(config: TrainConfig, folder: Path, stack: ExitStack) -> _Write:
    import trackio

    name = f"{folder.resolve().name}-{_run_id(folder)}"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results only
        with contextlib.suppress(ValueError):  # raised for a project without runs
            for old in trackio.Api().runs(project):
                if old.name == name:
                    old.delete()
        run = trackio.init(project=project, name=name, config=to_dict(config), embed=False)
    stack.callback(run.finish)

    def write(record: Record) -> None:
        run.log(scalars(record), step=record["step"])

    return write


def _run_id(folder: Path) -> str:
    """Return the run's identifier on servers: 8 hexadecimal digits, drawn once and saved.

    Raises:
        UserError: the file holds anything else.
    """
    file = folder / RUN_ID
    if not has_file(file):
        with disk_errors(file, RESUME_HINT), replacing(file) as staged:
            staged.write_text(uuid.uuid4().hex[:8] + "\n")
    with file.open("rb") as opened:
        name = opened.read(10).decode("utf-8", errors="replace")
    if not re.fullmatch(r"[0-9a-f]{8}\n?", name):
        raise UserError(
            f"{file}: expected 8 hexadecimal digits, got {name!r}; remove the file for new series"
        )
    return name.strip()


OPENERS: dict[str, Callable[[TrainConfig, Path, ExitStack], _Write]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
