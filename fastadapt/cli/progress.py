"""Progress of a long command, and the signals that end it: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

    from typing_extensions import Self

SECONDS_BETWEEN_LINES = 10.0
#: Training metric: its name in the bar.
SHOWN = {
    "loss": "loss",
    "kl": "KL",
    "nmse": "NMSE",
    "sparsity": "penalty",
    "sparsity_weight": "λ",
    "l0": "L0",
}
_RECENT = 50  # records whose mean is the time of a step


class Progress:
    """Shows the progress of a long command.

    Call it with a task and two counts, or pass :meth:`record` as a sink to
    `fastadapt.training.trainer.train` or `fastadapt.data.prepare.prepare`.

    Args:
        stream: written to; a bar is drawn if it is a terminal.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Any = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal = stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._task: str | None = None
        self._last_line = clock()
        self._steps = 0
        self._pace = Pace(clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(
        self, task: str, done: int, total: int | None, *, unit: str = "", note: str = ""
    ) -> None:
        """Show that ``done`` of ``total`` items of a task are done; None: total unknown."""
        if self._is_terminal:
            self._draw(task, done, total, unit=unit or "it", note=note).refresh()
        elif task != self._task or self._is_due():
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            self.write(f"{task}: {count}{unit}  {note}".rstrip())
        self._task = task

    def write(self, line: str) -> None:
        """Write a line at once, above the bar where one is drawn."""
        self._last_line = self._clock()
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def record(self, record: dict[str, Any]) -> None:
        """Show a record of a training run or of a selection of conversations."""
        kind, step = record["kind"], record.get("step", 0)
        self._pace.record(record)
        if kind in ("start", "resume"):
            for note in record.get("notes", ()):
                self.write(f"note: {note}")
            self._begin(step, record)
        elif kind == "train":
            self._step(step, record)
        elif kind == "eval":
            self.write(f"step {step}: held-out {evaluation_line(record)}")
            self._hint(record)
        elif kind == "bad_batch":
            self.write(f"step {step}: skipped, {record['reason']} (rows {record['ids']})")
        elif kind == "read":
            rows, fraction = record["rows"], record["fraction"]
            total = round(rows / fraction) if fraction else None
            self("reading", rows, total, unit=" rows", note=f"{record['kept']:,} kept")
        elif kind == "write":
            self("writing", record["done"], record["of"], unit=" rows")

    def _draw(self, task: str, done: int, total: int | None, *, unit: str, note: str) -> tqdm[Any]:
        if self._bar is None or task != self._task:
            self.__exit__()
            self._bar = tqdm(
                desc=task or None,
                file=self._stream,
                total=total,
                unit=unit,
                initial=done,
                dynamic_ncols=True,
            )
        self._bar.total = total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        self._task = task
        return self._bar

    def _is_due(self) -> bool:
        return bool(self._clock() - self._last_line >= SECONDS_BETWEEN_LINES)

    def _begin(self, step: int, record: dict[str, Any]) -> None:
        self._steps = record["steps"]
        if reason := record.get("no_template"):
            from fastadapt.data.inspection import form_name

            self.write(f"data.family auto is {form_name(record['family'])}: {reason}")
        sources = record.get("sources", ())
        if len(sources) < 2:
            self._markers("training data", record)
        for source in sources:
            self._source(source)
        if held_out := record.get("held_out_source"):
            self._source({**held_out, "source": f"held-out data, {held_out['source']}"})
        if n := record.get("held_out_in_training"):
            self.write(
                f"hint: {n:,} of {record['held_out_sequences']:,} held-out sequences are training "
                "sequences, too, so that held-out results are too good; check data.train and "
                "data.validation"
            )
        if record["kind"] == "resume":
            self.write(f"resuming after step {step} of {self._steps}")
            for passed in record.get("passed_over", ()):
                self.write(f"passed over {passed['path']}: {passed['reason']}")
        if self._is_terminal:
            bar = self._draw("", step, self._steps, unit=" step", note="")
            bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            bar.initial = step
            bar.refresh()

    def _markers(self, name: str, counts: dict[str, Any]) -> None:
        if marked := counts.get("with_markers"):
            from fastadapt.reporting.formatting import markers_note

            self.write(f"{name}: {markers_note(marked, counts['sequences'])}")

    def _source(self, source: dict[str, Any]) -> None:
        """Write a source's share in a mixture, what is not read, and the rows that are left out."""
        name, read = source["source"], source["read"]
        if "share" in source:
            self.write(f"{name}: {source['share']:.1%} of the training tokens")
            self._markers(name, source)
        if unread := source.get("unread"):
            self.write(f"{name}: not read: {', '.join(unread)}")
        if n := source["bad"]:
            first = source["examples"][0]
            lost = f"{n:,} of {read:,} rows cannot be read and are left out"
            self.write(f"{name}: {lost}; the first: {first}")
        if n := source.get("too_long"):
            lost = f"{n:,} of {read:,} texts have more than data.max_tokens tokens"
            self.write(f"{name}: {lost} and are left out")
        if n := source["beyond_model"]:
            self.write(
                f"{name}: {n:,} of {read:,} texts are longer than the model can read and are left "
                "out"
            )

    def _step(self, step: int, record: dict[str, Any]) -> None:
        terms = [f"{name} {_short(record[key])}" for key, name in SHOWN.items() if key in record]
        terms.append(f"{record['tokens_per_s']:,.0f} tok/s")
        if self._is_terminal:
            terms.insert(0, f"{self._time_left(step)} left")
            self._draw("", step, self._steps, unit=" step", note=", ".join(terms))
        elif self._is_due() or step in (1, self._steps):
            left = self._time_left(step)
            self.write(f"step {step}/{self._steps}  {'  '.join(terms)}  {left} left")

    def _time_left(self, step: int) -> str:
        from fastadapt.reporting.formatting import duration

        seconds = self._pace.seconds_left(step, self._steps)
        return "?" if seconds is None else duration(seconds)

    def _hint(self, record: dict[str, Any]) -> None:
        """Write, before the first step, why training may be pointless on these models and data."""
        if record["step"] == 0:
            from fastadapt.training.logs.hints import hints

            for line in hints(record):
                self.write(f"hint: {line}")


class Pace:
    """Estimate the time of a step and of an evaluation from the times of a run's records.

    The first step of a process is left out if others are known, since it loads and compiles, and so
    are evaluations: those to come are added at their own time and distance.

    Args:
        clock: seconds, monotonic.

    Example:
        >>> now = iter([0, 60, 65, 66, 67])  # evaluation: 60 s; first step: 5 s; then 1 s each
        >>> pace = Pace(lambda: next(now))
        >>> kinds = ["start", "eval", "train", "train", "train"]
        >>> for kind, step in zip(kinds, [0, 0, 1, 2, 3]):
        ...     pace.record({"kind": kind, "step": step})
        >>> pace.seconds_left(3, 100)  # 97 steps, and the last evaluation
        157.0
    """

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, int] | None = None  # time and step of the last record
        self._taken: list[tuple[float, int]] = []  # seconds and steps between two records
        self._evaluated: list[int] = []  # steps of the evaluations
        self._evaluation = 0.0  # seconds of the last one

    def record(self, record: dict[str, Any]) -> None:
        """Note the time of a record of a run."""
        kind, step, now = record["kind"], record.get("step", 0), float(self._clock())
        if kind in ("start", "resume"):
            self._taken = []
        elif self._last is not None:
            seconds, steps = now - self._last[0], step - self._last[1]
            if kind == "train" and steps > 0:
                self._taken.append((seconds, steps))
            elif kind == "eval" and steps == 0:
                self._evaluation = seconds
        if kind == "eval":
            self._evaluated.append(step)
        self._last = now, step

    def seconds_left(self, step: int, steps: int) -> float | None:
        """Return the seconds from ``step`` to the end of ``steps``; None before the second step."""
        taken = self._taken[1:][-_RECENT:]
        if step == steps:
            return self._evaluation
        if not taken:
            return None
        pace = sum(seconds for seconds, _ in taken) / sum(n for _, n in taken)
        distance = self._evaluated[-1] - self._evaluated[-2] if len(self._evaluated) > 1 else 0
        to_come = (steps - step) // distance if distance > 0 else 1
        return pace * (steps - step) + self._evaluation * to_come


@contextmanager
def stoppable() -> Iterator[tuple[Event, Progress]]:
    """Yield an event that Ctrl-C and SIGTERM set, and the :class:`Progress` of a command."""
    from fastadapt.training.signals import stop_on_signals

    with stop_on_signals(None) as (stop, _), Progress(sys.stderr) as progress:
        yield stop, progress


def resume_hint(*, overwrite: bool = False) -> str:
    """Return a hint to resume a stopped command, without ``--overwrite``, which restarts it."""
    return f"Re-run the same command{' without --overwrite' if overwrite else ''} to resume."


def evaluation_line(record: dict[str, Any]) -> str:
    """Format a record of an evaluation during training as one line."""
    return (
        f"KL {_short(record.get('kl_adapter'))} (hybrid {_short(record.get('kl_hybrid'))}, "
        f"recovered {_short(record.get('kl_recovered_vs_hybrid'))}), "
        f"top-1 error {_short(record.get('top1_error_adapter'))} "
        f"(hybrid {_short(record.get('top1_error_hybrid'))})"
        + (f", L0 {_short(record['l0_mean'])}" if "l0_mean" in record else "")
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
