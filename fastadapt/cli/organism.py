"""`fastadapt organism`: build, check and sample the embedded pair."""

from __future__ import annotations

import random
from typing import Any

from fastadapt.cli.console import print_table, quiet_transformers, say
from fastadapt.cli.options.parser import organism_parser
from fastadapt.errors import RunError, UserError
from fastadapt.io.names import typed_path


def organism(argv: list[str]) -> int:
    """`fastadapt organism`."""
    if not argv:
        organism_parser().print_help()
        return 0
    typed = organism_parser().parse_args(argv)
    quiet_transformers()
    options = typed[typed.subcommand]
    return COMMANDS[typed.subcommand](options)


def _build(options: Any) -> int:
    from fastadapt.organism import build

    out = typed_path(options.out, "--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise UserError(f"--out: {out} is in use; give a new folder, or --overwrite")
    for name, value in _flat(build(out, seed=options.seed, progress=_say_record)).items():
        print(f"{name}: {_short(value)}")
    print(f"written to {out.resolve()}; measure it with: fastadapt organism check --folder {out}")
    return 0


def _check(options: Any) -> int:
    from fastadapt.organism import FOLDER, check
    from fastadapt.organism.acceptance import BOUNDS

    folder = typed_path(options.folder or FOLDER, "--folder")
    if not (folder / "target").is_dir() or not (folder / "base").is_dir():
        raise UserError(f"--folder: expected a folder with target/ and base/, got {folder}")
    measured = check(folder)
    failed = measured.pop("failed")
    rows = [
        [name, _short(value), _bounds(*BOUNDS.get(name, (None, None))), "*" * (name in failed)]
        for name, value in _flat(measured).items()
    ]
    print_table(["", "measured", "must be", ""], rows)
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


def _sample(options: Any) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastadapt.organism import FOLDER
    from fastadapt.organism.acceptance import hybrid_of, sample
    from fastadapt.organism.problems import extract_answer, sample_problem

    if options.n < 1:
        raise UserError(f"--n: expected 1 or more, got {options.n}")
    of = {
        name: AutoModelForCausalLM.from_pretrained(FOLDER / name, trust_remote_code=False).eval()
        for name in ("target", "base")
    }
    model = hybrid_of(of["target"], of["base"]) if options.model == "hybrid" else of[options.model]
    draw = random.Random(options.seed)
    problems = [sample_problem(draw) for _ in range(options.n)]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target", trust_remote_code=False)
    responses = sample(model, tokenizer, problems, seed=options.seed).responses
    for problem, response in zip(problems, responses, strict=True):
        right = extract_answer(response) == problem.answer
        verdict = "right" if right else f"wrong: the answer is {problem.answer}"
        print(f"[{problem.domain}] {problem.prompt}\n  {response}\n  ({verdict})\n")
    return 0


def _say_record(record: dict[str, Any]) -> None:
    say("  ".join(f"{key} {_short(value)}" for key, value in record.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


COMMANDS = {"build": _build, "check": _check, "sample": _sample}
