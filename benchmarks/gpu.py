"""Check the kernels on a GPU and measure them.

``python benchmarks/gpu.py`` takes under 8 minutes. It (a) runs the kernels' tests on the GPU and
checks bitwise repeatability, (b) measures the parts, most important first, each within its time
limit, and (c) writes one JSON file with commit, versions, hardware, roofs, rows, and bounds with
their measured values. A missed bound is recorded and is not an error. The exit code is 0 if all
checks pass, else 1.

A failed test, or tests that exceed their time, mark the whole run as wrong; measurements continue
and are reported as those of a wrong run. A row of this library is timed only if its results are
within the error budget. The JSON file is rewritten after every check and row.

The script needs torch, triton, numpy and pytest, but no installed package. ``--only PART``
(a part of parts.py, or tests, repeats, indices, lengths) runs single parts without the tests; every
row is still checked. ``step`` (whole training steps of the 7B pair) and ``sanitizer``
(compute-sanitizer over every kernel) run only if named. ``--device cpu --quick`` runs all parts at
tiny shapes with interpreted kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 460.0
REPEATS = 250
CHECKS = ("tests", "repeats", "indices", "sanitizer")
MORE = ("lengths", "step")  # parts beside those of parts.py


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    sys.path[:1] = [str(ROOT)]  # instead of this file's folder, which is a package
    from benchmarks.checkout import importable

    if options.device == "cpu" and options.quick:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    env = importable()
    from benchmarks.parts import PARTS

    names = (*PARTS, *MORE, *CHECKS)
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        sys.exit(f"--only: no part {', '.join(unknown)}; expected one of {', '.join(names)}")
    run = Run(options, env, deadline)
    run.check()
    run.measure()
    run.write(finished=True)
    for bound in run.result["bounds"]:
        verdict = "met" if bound["met"] else "MISSED"
        _say(f"{verdict}: {bound['claim']}: {bound['measured']:.3g} (bound {bound['bound']})")
    _say(f"{'right' if run.is_right else 'WRONG'}; written to {run.output}")
    return 0 if run.is_right else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use tiny shapes, to test this script")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="run this part only (repeatable)"
    )
    default = "benchmarks/results/<gpu>-<date>-<time>.json"
    parser.add_argument("--output", type=Path, help=f"default: {default}")
    parser.add_argument("--commit", help="commit to record if the checkout has no history")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="time limit of the run")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests")
    parser.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer")
    return parser


class Run:
    """One run: its deadline and the content of the JSON file."""

    def __init__(self, options: argparse.Namespace, env: dict[str, str], deadline: float) -> None:
        import torch

        from benchmarks import machine, parts, peers
        from benchmarks.record import default_path
        from benchmarks.roofs import measure_roofs

        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit("No GPU available; use --device cpu --quick to test the script without one.")
        torch._dynamo.config.recompile_limit = 64  # one compilation per shape
        self.lost = False  # True after an illegal access, when the device no longer works
        self.options, self.env, self.deadline = options, env, deadline
        self.scale = parts.scale(options.device, quick=options.quick)
        self.roofs = measure_roofs(options.device, self.scale.dtype, quick=options.quick)
        self.result: dict[str, Any] = {
            **machine.describe(options.device, options.commit),
            "quick": options.quick,
            "roofs": self.roofs._asdict(),
            "peers_missing": peers.missing(),
            "checks": {},
            "parts": {},
            "seconds": {},
            "cut_short": [],
            "failed": {},
        }
        hardware = self.result["hardware"]
        self.name = hardware.get("gpu", hardware["cpu"])
        self.output = options.output or default_path(self.name, self.result["date"])
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        _say(f"{self.name}: {json.dumps(self.result['roofs'])}")

    @property
    def is_right(self) -> bool:
        """Whether all checks and rows passed and no requested part failed."""
        checks = self.result["checks"].values()
        rows = [r for part in self.result["parts"].values() for r in part]
        wrong = any(r.get("right") is False and r.get("kind", "ours") == "ours" for r in rows)
        return all(check["right"] for check in checks) and not (self.result["failed"] or wrong)

    def wants(self, part: str) -> bool:
        """Return whether a part is requested; parts requested by name run without the tests."""
        if part == "tests" and self.options.no_tests:
            return False
        by_name = part in (self.options.only or ())
        if part == "sanitizer":
            return self.options.sanitizer or by_name
        return by_name if self.options.only or part == "step" else True

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def check(self) -> None:
        """Run the sanitizer, the tests, the repeats and the large indices."""
        from benchmarks import exactness, kernel_tests, sanitizer

        checks = self.result["checks"]
        if self.wants("sanitizer"):
            start = time.monotonic()
            for name, check in sanitizer.sanitize(self.options.device, self.env, self.left):
                checks[name] = check
                _say(f"{name}: {check.get('why') or 'exit code ' + str(check['rc'])}")
                self.write()
            self.took("sanitizer", start)
        if self.wants("tests"):
            start = time.monotonic()
            checks["tests"] = kernel_tests.run_tests(self.env, quick=self.options.quick)
            self.took("tests", start)
            self.write()
            _say(f"tests: {checks['tests']}")
        times = 2 if self.options.quick else REPEATS
        for name, rows in (
            ("repeats", lambda: exactness.repeats(self.scale, times)),
            ("indices", lambda: exactness.large_indices(self.scale)),
        ):
            if self.wants(name):
                results: list[dict[str, Any]] = []
                checks[name] = {"right": False, "rows": results}
                completed = self.attempt(name, rows, results, 60)
                checks[name]["right"] = completed and all(row["right"] for row in results)
                self.write()

    def measure(self) -> None:
        """Measure the parts until the deadline."""
        from benchmarks import lengths
        from benchmarks.parts import PARTS

        quick = self.options.quick
        parts = {name: (self.rows(p.cases(self.scale)), p.seconds) for name, p in PARTS.items()}
        rows = lengths.rows(self.scale, quick=quick, env=self.env, left=self.left)
        parts["lengths"] = rows, 100
        if self.wants("step"):  # takes minutes
            from benchmarks import whole_step

            sizes = whole_step.SMALL if quick else whole_step.PAPER
            parts["step"] = (whole_step.rows(sizes, self.options.device, self.roofs), 400)
        for name, (rows, seconds) in parts.items():
            if self.wants(name) and self.left() > 0:
                results: list[dict[str, Any]] = []
                self.result["parts"][name] = results
                self.attempt(name, functools.partial(iter, rows), results, seconds)
            elif self.wants(name):
                _say(f"{name}: no time left")
                self.result["cut_short"].append(name)

    def rows(self, cases: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of each case, and add their ratios. A failed step yields a row too."""
        from benchmarks.case import add_ratios, row

        seconds, least = (0.0, 1) if self.options.quick else (0.3, 5)
        for case in cases:
            results: list[dict[str, Any]] = []
            try:
                for name, step in case.steps.items():
                    try:
                        results.append(row(case, name, self.roofs, seconds=seconds, least=least))
                    except Exception as error:
                        failed = {"op": case.op, "implementation": name, "kind": step.kind}
                        failed |= {"shape": case.shape, "right": False}
                        results.append(failed | {"error": f"{type(error).__name__}: {error}"})
                    yield results[-1]
            finally:  # also if the part's time ends within the case
                add_ratios(results)
                case.release()

    def attempt(
        self,
        name: str,
        rows: Callable[[], Iterator[Any]],
        results: list[dict[str, Any]],
        seconds: float,
    ) -> bool:
        """Collect rows; return False after an error outside a row, which is recorded.

        After an error of the device, later parts are not tried.
        """
        import torch

        if self.lost:
            self.result["failed"][name] = "not tried: the device failed earlier"
            return False
        start = time.monotonic()
        try:
            self.collect(name, rows(), results, seconds)
        except Exception as error:
            self.lost = isinstance(error, torch.AcceleratorError)
            self.result["failed"][name] = f"{type(error).__name__}: {error}"
            _say(f"{name}: {self.result['failed'][name]}")
        self.took(name, start)
        self.write()
        return name not in self.result["failed"]

    def collect(
        self, name: str, rows: Iterator[Any], results: list[dict[str, Any]], seconds: float
    ) -> None:
        """Append rows until the part's time ends; print each row and write the file.

        A part that was requested by name may use all the time until the deadline.
        """
        from benchmarks.record import line_of
        from benchmarks.timing import synchronize

        end = self.deadline
        if not self.options.only:
            end = min(time.monotonic() + seconds, end)
        for row in rows:
            _say(line_of(row))
            results.append(row)
            self.write()
            if "error" in row:  # raises if the error came from the device
                synchronize(self.options.device)
            if time.monotonic() > end:
                _say("  time limit reached")
                self.result["cut_short"].append(name)
                return

    def took(self, name: str, start: float) -> None:
        """Record the seconds that a part took."""
        self.result["seconds"][name] = round(time.monotonic() - start, 2)

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
    sys.exit(main())
