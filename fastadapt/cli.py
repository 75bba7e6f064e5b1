"""The command line; the only place that prints.

Results go to standard output, progress and errors to standard error. Exit code 0: done, or stopped
by a signal with everything saved; 1: a failure on the way; 2: what was asked cannot be done.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadapt.errors import RunError, UserError
from fastadapt.options import (
    USAGE,
    doctor_parser,
    nearest,
    organism_parser,
    parse_train,
    resume_command,
    train_parser,
)
from fastadapt.ranks import leads, leave, tells


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what is no one's mistake keeps its traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return leave(_dispatch(arguments))
    except (UserError, RunError) as error:
        if tells(error):
            _print_error(str(error))
        return error.exit_code
    except SystemExit as end:  # --help
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _dispatch(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"fastadapt {version('fastadapt')}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (see fastadapt --help)")
    return COMMANDS[name](rest)


def _print_error(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red"), Text(message), sep="", end="\n")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    # A pipe has no width: lines there are as long as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i and not left else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


# --- train ----------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """`fastadapt train`."""
    if {"-h", "--help"} & set(argv):
        train_parser().print_help()
        return 0
    config, flags = parse_train(argv)
    if flags.print_config:
        import yaml

        from fastadapt.training.config import to_dict

        print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    if flags.dry_run:
        return _print_plan(config)

    from fastadapt.progress import Progress
    from fastadapt.training.trainer import train as run_training

    _quiet_transformers()
    _say("Loading models and data ...")
    with Progress(sys.stderr) as progress:
        summary = run_training(
            config, resume=flags.resume, overwrite=flags.overwrite, sinks=[progress]
        )
    if not leads():
        return 0
    if summary["interrupted"]:
        return _stopped(summary, argv)
    _print_summary(summary)
    return 0


def _quiet_transformers() -> None:
    """No bars of transformers' own, which would cross ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(message: str) -> None:
    if leads():
        print(message, file=sys.stderr, flush=True)


def _stopped(summary: dict[str, Any], argv: list[str]) -> int:
    """A signal came and everything is saved: say how to go on."""
    from fastadapt.training.report import write_report

    print(f"Stopped at step {summary['step']} of {summary['steps']}; everything up to it is saved.")
    print(f"Go on with:  {resume_command(argv)}")
    print(f"So far:      {write_report(summary['output'])}")
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    from fastadapt.training.records import comparison, duration, number, percent

    print()
    _print_table(*comparison(summary))
    print()
    recovered = percent(summary.get("kl_recovered_vs_hybrid"))
    print(f"The adapter recovers {recovered} of the hybrid's KL to the target.")
    l0 = ", ".join(number(v) for v in summary.get("l0_per_layer") or [])
    print(f"L0 per layer: {l0}")
    print(f"{number(summary['tokens'])} training tokens in {duration(summary['wall_s'])}")
    print(f"adapter: {summary['adapter']}")
    print(f"report:  {Path(summary['report']).resolve()}")


def _print_plan(config: Any) -> int:
    from fastadapt.training.interrupt import free_memory
    from fastadapt.training.plan import gib, plan

    planned = plan(config)
    for title, sizes in (("memory, by part", planned.parts), ("by phase", planned.phases)):
        _print_table([title, "at most"], [[name, gib(size)] for name, size in sizes.items()])
        print()
    print(f"Peak: {gib(planned.peak_bytes)}, in {planned.peak_phase}; {free_memory()}.")
    print(f"Sequences of up to {planned.tokens_per_sequence:,} tokens.", end=" ")
    known = f"{planned.steps:,} steps" if planned.steps else "Steps: not known without the data"
    print(f"{known}; {planned.parameters:,} trained parameters.")
    return 0


# --- organism and doctor --------------------------------------------------------------------------


def organism(argv: list[str]) -> int:
    """`fastadapt organism`."""
    if not argv:
        organism_parser().print_help()
        return 0
    typed = organism_parser().parse_args(argv)
    _quiet_transformers()
    options = typed[typed.subcommand]
    return ORGANISM[typed.subcommand](options)


def _organism_build(options: Any) -> int:
    from fastadapt.organism import build

    out = Path(options.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise UserError(f"--out: {out} is in use; give a new folder, or --overwrite")
    for name, value in _flat(build(out, seed=options.seed, progress=_say_record)).items():
        print(f"{name}: {_short(value)}")
    print(f"written to {out.resolve()}; measure it with: fastadapt organism check --folder {out}")
    return 0


def _organism_check(options: Any) -> int:
    from fastadapt.organism import FOLDER, check
    from fastadapt.organism.acceptance import BOUNDS

    folder = Path(options.folder or FOLDER)
    if not (folder / "target").is_dir() or not (folder / "base").is_dir():
        raise UserError(f"--folder: expected a folder with target/ and base/, got {folder}")
    measured = check(folder)
    failed = measured.pop("failed")
    rows = [
        [name, _short(value), _bounds(*BOUNDS.get(name, (None, None))), "*" * (name in failed)]
        for name, value in _flat(measured).items()
    ]
    _print_table(["", "measured", "must be", ""], rows)
    if failed:
        raise RunError(f"the pair in {folder} is not what it must be: {', '.join(failed)}")
    return 0


def _bounds(low: float | None, high: float | None) -> str:
    return " ".join(
        f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _organism_sample(options: Any) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastadapt.organism import FOLDER
    from fastadapt.organism.acceptance import hybrid_of, sample
    from fastadapt.organism.problems import extract_answer, sample_problem

    if options.n < 1:
        raise UserError(f"--n: expected 1 or more, got {options.n}")
    of = {n: AutoModelForCausalLM.from_pretrained(FOLDER / n).eval() for n in ("target", "base")}
    model = hybrid_of(of["target"], of["base"]) if options.model == "hybrid" else of[options.model]
    draw = random.Random(options.seed)
    problems = [sample_problem(draw) for _ in range(options.n)]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    responses = sample(model, tokenizer, problems, seed=options.seed).responses
    for problem, response in zip(problems, responses, strict=True):
        right = extract_answer(response) == problem.answer
        verdict = "right" if right else f"wrong: the answer is {problem.answer}"
        print(f"[{problem.domain}] {problem.prompt}\n  {response}\n  ({verdict})\n")
    return 0


def _say_record(record: dict[str, Any]) -> None:
    _say("  ".join(f"{key} {_short(value)}" for key, value in record.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def doctor(argv: list[str]) -> int:
    """`fastadapt doctor`."""
    options = doctor_parser().parse_args(argv)

    from fastadapt.doctor import diagnose

    diagnosis = diagnose()
    if options.json:
        print(json.dumps(diagnosis, indent=2))
    else:
        _print_diagnosis(diagnosis)
    return 0 if diagnosis["ok"] else RunError.exit_code


def _print_diagnosis(diagnosis: dict[str, Any]) -> None:
    from fastadapt.doctor import summary

    _print_table(["hardware", ""], list(map(list, diagnosis["hardware"].items())), left=True)
    print()
    found = [[name, found or "not installed"] for name, found in diagnosis["versions"].items()]
    _print_table(["versions", ""], found, left=True)
    print()
    chosen = [[c["what"], c["choice"], c["why"]] for c in diagnosis["choices"]]
    _print_table(["auto means", "", "because"], chosen, left=True)
    print()
    _print_table(
        ["kernel", "", "", "", "cases", "check", "of the allowed error"],
        summary(diagnosis["checks"]),
        left=True,
    )
    for note in diagnosis["notes"]:
        print(f"\n{note}")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "organism": organism,
    "doctor": doctor,
}
ORGANISM = {"build": _organism_build, "check": _organism_check, "sample": _organism_sample}
