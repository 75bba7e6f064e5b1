"""Progress of a run, drawn from its records: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from typing_extensions import Self

SECONDS_BETWEEN_LINES = 10.0
#: Training metric: how it is named in the bar.
SHOWN = {"loss": "loss", "kl": "KL", "nmse": "NMSE", "sparsity": "L1", "l0": "L0"}


class _Drawn:
    """What both kinds of progress have: a stream, its bar, and a clock.

    Args:
        stream: written to; a bar is drawn if it is a terminal.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Any = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal = stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._spoke = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress(_Drawn):
    """A sink of `fastadapt.training.train`; arguments as of its base."""

    def __init__(self, stream: TextIO, clock: Any = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._steps = 0
        self._first: tuple[float, int] | None = None  # when and at which step this process began

    def __call__(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if kind in ("start", "resume"):
            self._begin(step, record)
        elif kind == "train":
            self._step(step, record)
        elif kind == "eval":
            self._say(f"step {step}: held-out {evaluation_line(record)}")
        elif kind == "bad_batch":
            self._say(f"step {step}: skipped, {record['reason']} (rows {record['ids']})")

    def _begin(self, step: int, record: dict[str, Any]) -> None:
        self._steps = record["steps"]
        self._first = (self._clock(), step)
        if marked := record.get("with_markers"):
            from fastadapt.reporting.formatting import markers_note

            self._say(f"training data: {markers_note(marked, record['sequences'])}")
        if record["kind"] == "resume":
            self._say(f"resuming after step {step} of {self._steps}")
            for passed in record.get("passed_over", ()):
                self._say(f"passed over {passed['path']}: {passed['reason']}")
        if self._bar is None and self._is_terminal:
            self._bar = tqdm(total=self._steps, file=self._stream, unit=" step", dynamic_ncols=True)
        if self._bar is not None:
            self._bar.n = self._bar.initial = step
            self._bar.refresh()

    def _step(self, step: int, record: dict[str, Any]) -> None:
        terms = [f"{name} {_short(record[key])}" for key, name in SHOWN.items() if key in record]
        terms.append(f"{record['tokens_per_s']:,.0f} tok/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(terms), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if now - self._spoke >= SECONDS_BETWEEN_LINES or step in (1, self._steps):
            self._say(f"step {step}/{self._steps}  {'  '.join(terms)}  {self._left(step, now)}")

    def _left(self, step: int, now: float) -> str:
        from fastadapt.reporting.formatting import duration

        start, first = self._first or (now, step)
        if step <= first:
            return "? left"
        return f"{duration((now - start) / (step - first) * (self._steps - step))} left"

    def _say(self, line: str) -> None:
        self._spoke = self._clock()
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


class PrepareProgress(_Drawn):
    """A sink of `fastadapt.data.prepare.prepare`; arguments as of its base."""

    _kind = ""

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "read":
            done, fraction = record["rows"], record["fraction"]
            total = round(done / fraction) if fraction else None
            self._show("reading", done, total, f"{record['kept']:,} kept")
        else:
            self._show("writing", record["done"], record["of"], "")

    def _show(self, kind: str, done: int, total: int | None, more: str) -> None:
        if self._is_terminal:
            if self._bar is None or kind != self._kind:
                self.__exit__()
                self._bar = tqdm(
                    desc=kind, file=self._stream, unit=" rows", initial=done, dynamic_ncols=True
                )
            self._bar.total = total
            self._bar.set_postfix_str(more, refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()
        elif kind != self._kind or self._clock() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = self._clock()
            of = f" of {total:,}" if total is not None else ""
            self._stream.write(f"{kind}: {done:,}{of} rows  {more}".rstrip() + "\n")
            self._stream.flush()
        self._kind = kind


class EvalProgress(_Drawn):
    """Told by `fastadapt.evaluation.comparison` what is being done; arguments as of its base."""

    _kind = ""

    def __call__(self, kind: str, done: int, total: int) -> None:
        if self._is_terminal:
            if self._bar is None or kind != self._kind:
                self.__exit__()
                self._bar = tqdm(
                    desc=kind, file=self._stream, total=total, initial=done, dynamic_ncols=True
                )
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif kind != self._kind or self._clock() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = self._clock()
            self._stream.write(f"{kind}: {done:,} of {total:,}\n")
            self._stream.flush()
        self._kind = kind


def evaluation_line(record: dict[str, Any]) -> str:
    """The numbers of an evaluation in one line."""
    return (
        f"KL {_short(record.get('kl_adapter'))} (hybrid {_short(record.get('kl_hybrid'))}, "
        f"recovered {_short(record.get('kl_recovered_vs_hybrid'))}), "
        f"top-1 error {_short(record.get('top1_error_adapter'))} "
        f"(hybrid {_short(record.get('top1_error_hybrid'))})"
        + (f", L0 {_short(record['l0_mean'])}" if "l0_mean" in record else "")
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
