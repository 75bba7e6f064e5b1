"""Checks the kernels on a GPU and measures them.

``python benchmarks/gpu.py``, in under 8 minutes: (a) the kernels' own tests on the GPU, and the
same bits over many repeats; (b) the measurements, most important first, each part within its time;
(c) one JSON with commit, versions, hardware, roofs, rows, and what was promised against what was
measured. A bound that is missed is recorded, never an error. Exit code 0: all right; 1: something
is wrong (see the JSON).

A test that fails, or tests that do not end in time, leave the run wrong for good, and what is
measured all the same is reported as a wrong run's: a row of ours is timed only if it is right on
its own inputs. The JSON is written after every check and row.

Works from a checkout with torch, triton, numpy and pytest; nothing needs to be installed.
``--only PART`` (of parts.py, or tests, repeats, indices, lengths) measures parts alone, without
the tests; each row still checks its own inputs. ``step``, whole training steps of the 7B pair, and
``sanitizer``, compute-sanitizer over every kernel, come only when they are named. ``--device cpu
--quick`` runs the whole path at tiny shapes, kernels interpreted.
"""

from __future__ import annotations

import argparse
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
MORE = ("lengths", "step")  # parts of more than kernels


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    sys.path[:1] = [str(ROOT)]  # not the folder of this file, which is a package of its own
    from benchmarks.checkout import importable

    if options.device == "cpu" and options.quick:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    env = importable()
    from benchmarks.parts import PARTS

    names = (*PARTS, *MORE, *CHECKS)
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        sys.exit(f"--only: no part {', '.join(unknown)}; there are {', '.join(names)}")
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
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test this script")
    parser.add_argument("--only", action="append", metavar="PART", help="this part (repeatable)")
    default = "benchmarks/results/<gpu>-<date>-<time>.json"
    parser.add_argument("--output", type=Path, help=f"default: {default}")
    parser.add_argument("--commit", help="recorded where the checkout has no history")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests to another run")
    parser.add_argument("--sanitizer", action="store_true", help="compute-sanitizer as well")
    return parser


class Run:
    """One run: its clock, and everything that goes into the JSON."""

    def __init__(self, options: argparse.Namespace, env: dict[str, str], deadline: float) -> None:
        import torch

        from benchmarks import machine, parts, peers
        from benchmarks.record import default_path
        from benchmarks.roofs import measure_roofs

        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit("No GPU here; --device cpu --quick tries the script out without one.")
        torch._dynamo.config.recompile_limit = 64  # one compilation per shape, of many
        self.lost = False  # after an illegal access nothing runs on the device any more
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
        """Nothing that ran was wrong, and nothing that was requested failed to run."""
        checks = self.result["checks"].values()
        rows = [r for part in self.result["parts"].values() for r in part]
        wrong = any(r.get("right") is False and r.get("kind", "ours") == "ours" for r in rows)
        return all(check["right"] for check in checks) and not (self.result["failed"] or wrong)

    def wants(self, part: str) -> bool:
        """Whether this part was requested; parts requested by name come without the tests."""
        if part == "tests" and self.options.no_tests:
            return False
        by_name = part in (self.options.only or ())
        if part == "sanitizer":
            return self.options.sanitizer or by_name
        return by_name if self.options.only or part == "step" else True

    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.monotonic()

    def check(self) -> None:
        """The sanitizer, tests, repeats and large indices."""
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
                ended = self.attempt(name, rows, results, 60)
                checks[name]["right"] = ended and all(row["right"] for row in results)
                self.write()

    def measure(self) -> None:
        """Every part, until time is up."""
        from benchmarks import lengths
        from benchmarks.parts import PARTS

        quick = self.options.quick
        parts = {name: (self.rows(p.cases(self.scale)), p.seconds) for name, p in PARTS.items()}
        rows = lengths.rows(self.scale, quick=quick, env=self.env, left=self.left)
        parts["lengths"] = rows, 100
        if self.wants("step"):  # minutes of its own
            from benchmarks import whole_step

            sizes = whole_step.SMALL if quick else whole_step.PAPER
            parts["step"] = (whole_step.rows(sizes, self.options.device, self.roofs), 400)
        for name, (rows, seconds) in parts.items():
            if self.wants(name) and self.left() > 0:
                into = self.result["parts"][name] = []
                self.attempt(name, lambda rows=rows: rows, into, seconds)
            elif self.wants(name):
                _say(f"{name}: no time left")
                self.result["cut_short"].append(name)

    def rows(self, cases: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The rows of each case, with the ratios between them. One step's failure is a row."""
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
            finally:  # also where the time was up in its midst
                add_ratios(results)
                case.release()

    def attempt(
        self,
        name: str,
        rows: Callable[[], Iterator[Any]],
        into: list[dict[str, Any]],
        seconds: float,
    ) -> bool:
        """Whether no error came from outside a row. One from the device itself is the last."""
        import torch

        if self.lost:
            self.result["failed"][name] = "not tried: the device no longer answers"
            return False
        start = time.monotonic()
        try:
            self.collect(name, rows(), into, seconds)
        except Exception as error:
            self.lost = isinstance(error, torch.AcceleratorError)
            self.result["failed"][name] = f"{type(error).__name__}: {error}"
            _say(f"{name}: {self.result['failed'][name]}")
        self.took(name, start)
        self.write()
        return name not in self.result["failed"]

    def collect(
        self, name: str, rows: Iterator[Any], into: list[dict[str, Any]], seconds: float
    ) -> None:
        """As many rows as fit; a line of each, and each is on the disk.

        A part that was requested by name may take what is left of the whole.
        """
        from benchmarks.record import line_of
        from benchmarks.timing import synchronize

        end = self.deadline
        if not self.options.only:
            end = min(time.monotonic() + seconds, end)
        for row in rows:
            _say(line_of(row))
            into.append(row)
            self.write()
            if "error" in row:  # one that left the device dead comes out here
                synchronize(self.options.device)
            if time.monotonic() > end:
                _say("  the time is up")
                self.result["cut_short"].append(name)
                return

    def took(self, name: str, start: float) -> None:
        """Records how long a part took."""
        self.result["seconds"][name] = round(time.monotonic() - start, 2)

    def write(self, *, finished: bool = False) -> None:
        """All that is known, as valid JSON in place of what was there: a kill loses nothing."""
        from benchmarks.bounds import bounds
        from benchmarks.record import write

        self.result["bounds"] = bounds(self.result["parts"], self.name)
        self.result |= {"right": self.is_right, "finished": finished}
        write(self.result, self.output)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
