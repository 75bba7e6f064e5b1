"""Check and measure on a GPU, in three commands of under 8 minutes each.

- ``python benchmarks/gpu.py kernels``: every kernel once against float64, then times of the
  transcoder and of elementwise ops, with the time of each of their kernels.
- ``python benchmarks/gpu.py step``: whole training steps of the 7B pair, compared with the plain
  step with gradient checkpointing; repeats, and 20 random lengths with and without cuDNN attention.
- ``python benchmarks/gpu.py checks``: the kernels' tests, bitwise repeats, indices beyond 2³¹; the
  other ops and their peers; compute-sanitizer if time is left.

Each part has a share of ``--seconds``; time that one part does not use, or takes beyond its share,
is shared by the later ones. The JSON file (commit, versions, hardware, roofs, rows, bounds with
their measured values) is replaced after every row, so that a killed run leaves its rows. The run is
wrong, with exit code 1, if a check or a row of this library is; measurements continue. A row of
this library is timed only if its results are within the error budget. Parts without time, and
peers that are not installed, are listed under ``left_out`` with the reason.

The script needs torch, triton, transformers, numpy and pytest, with the packages that these
require, and no others; this package need not be installed. Tests that need more are left out.
``--only PART`` runs single parts of a command. ``--device cpu --quick`` runs a command at tiny
shapes with interpreted kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 450.0
GRACE = 0.1  # of the time, for the row in progress when the time of its part ends
NAMES = ("kernels", "step", "checks")


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    sys.path[:1] = [str(ROOT)]  # instead of this file's folder, which is a package
    from benchmarks.checkout import importable

    if options.device == "cpu" and options.quick:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    # Read by cuBLAS with its first product, for the repeated step; the size is a Hopper's default.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = Run(options, importable(), deadline)
    run.work()
    run.write(finished=True)
    for bound in run.result["bounds"]:
        verdict = "met" if bound["met"] else "MISSED"
        _say(f"{verdict}: {bound['claim']}: {bound['measured']:.3g} (bound {bound['bound']})")
    for name, why in run.result["left_out"].items():
        _say(f"left out: {name}: {why}")
    _say(f"{'right' if run.is_right else 'WRONG'}; written to {run.output}")
    return 0 if run.is_right else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=NAMES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use tiny shapes, to test this script")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="run this part only (repeatable)"
    )
    default = "benchmarks/results/<gpu>-<command>-<date>-<time>.json"
    parser.add_argument("--output", type=Path, help=f"default: {default}")
    parser.add_argument("--commit", help="commit to record if the checkout has no history")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="time limit of the run")
    return parser


class Run:
    """One run of a command: its deadline and the content of the JSON file."""

    def __init__(self, options: argparse.Namespace, env: dict[str, str], deadline: float) -> None:
        import torch

        from benchmarks import machine, parts, peers
        from benchmarks.commands import COMMANDS, Context
        from benchmarks.record import default_path
        from benchmarks.roofs import measure_roofs

        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit("No GPU available; use --device cpu --quick to test the script without one.")
        torch._dynamo.config.recompile_limit = 64  # one compilation per shape
        self.lost = False  # True after an illegal access, when the device no longer works
        self.options, self.deadline, self.end = options, deadline, deadline
        scale = parts.scale(options.device, quick=options.quick)
        roofs = measure_roofs(options.device, scale.dtype, quick=options.quick)
        context = Context(scale, options.quick, roofs, env, lambda: self.end - time.monotonic())
        self.entries = COMMANDS[options.command](context)
        names = [entry.part for entry in self.entries]
        if unknown := sorted(set(options.only or ()) - set(names)):
            expected = ", ".join(dict.fromkeys(names))
            sys.exit(f"--only: no part {', '.join(unknown)}; expected one of {expected}")
        if options.only:
            self.entries = [entry for entry in self.entries if entry.part in options.only]
        self.result: dict[str, Any] = {
            **machine.describe(options.device, options.commit),
            "command": options.command,
            "quick": options.quick,
            "roofs": roofs._asdict(),
            "parts": {},
            "seconds": {},
            "left_out": {f"peer {name}": why for name, why in peers.missing().items()},
            "failed": {},
        }
        hardware = self.result["hardware"]
        self.name = hardware.get("gpu", hardware["cpu"])
        path = default_path(f"{self.name} {options.command}", self.result["date"])
        self.output = options.output or path
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        _say(f"{self.name}: {json.dumps(self.result['roofs'])}")

    @property
    def is_right(self) -> bool:
        """Whether all rows of this library are right and no part failed or is missing by name."""
        rows = [row for part in self.result["parts"].values() for row in part]
        wrong = any(r.get("right") is False and r.get("kind", "ours") == "ours" for r in rows)
        missing = set(self.options.only or ()) & set(self.result["left_out"])
        return not (wrong or self.result["failed"] or missing)

    def work(self) -> None:
        """Run the entries in order, each until the end of its share of the time that is left."""
        for i, entry in enumerate(self.entries):
            now = time.monotonic()
            share = entry.share / sum(later.share for later in self.entries[i:])
            self.end = now + share * (self.deadline - now)
            if self.lost:
                self.result["failed"].setdefault(entry.part, "not tried: the device failed earlier")
            elif self.end <= now:
                self.leave_out(entry.part, "no time left")
            else:
                self.attempt(entry)
                seconds = self.result["seconds"]
                took = time.monotonic() - now
                seconds[entry.part] = round(seconds.get(entry.part, 0.0) + took, 2)
            self.write()

    def attempt(self, entry: Any) -> None:
        """Collect the rows of an entry; record an error outside a row, or the end of the time.

        After an error of the device, later entries are not tried.
        """
        import torch

        from benchmarks.processes import OutOfTime, interrupted_after

        grace = GRACE * self.options.seconds
        seconds = min(self.end + grace, self.deadline) - time.monotonic()
        rows = self.result["parts"].setdefault(entry.part, [])
        try:
            with interrupted_after(seconds):
                self.collect(entry, rows)
        except OutOfTime:
            self.leave_out(entry.part, f"the row after {len(rows)} rows did not end in time")
        except Exception as error:
            self.lost = isinstance(error, torch.AcceleratorError)
            self.result["failed"][entry.part] = f"{type(error).__name__}: {error}"
            _say(f"{entry.part}: {self.result['failed'][entry.part]}")

    def collect(self, entry: Any, rows: list[dict[str, Any]]) -> None:
        """Append rows until the entry's time ends; print each row and write the file."""
        from benchmarks.case import add_ratios
        from benchmarks.record import line_of
        from benchmarks.timing import synchronize

        for row in entry.rows():
            if "left_out" in row:
                self.leave_out(entry.part, row["left_out"])
                continue
            rows.append(row)
            add_ratios(rows)
            _say(line_of(row))
            self.write()
            if "error" in row:  # raises if the error came from the device
                synchronize(self.options.device)
            if time.monotonic() > self.end:
                self.leave_out(entry.part, f"stopped at its time limit after {len(rows)} rows")
                return

    def leave_out(self, name: str, why: str) -> None:
        """Record and print why a part is not complete; a part may have several reasons."""
        reasons = self.result["left_out"]
        reasons[name] = f"{reasons[name]}; {why}" if name in reasons else why
        _say(f"  {name}: {why}")

    def write(self, *, finished: bool = False) -> None:
        """Replace the JSON file atomically, so that a kill loses no results."""
        from benchmarks.bounds import bounds
        from benchmarks.record import write

        self.result["bounds"] = bounds(self.result["parts"], self.name)
        self.result |= {"right": self.is_right, "finished": finished}
        write(self.result, self.output)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    # A hanging kernel leaves the interpreter no chance to end the run.
    faulthandler.dump_traceback_later(60 + _options().parse_args().seconds, exit=True)
    sys.exit(main())
