"""Build, check and sample an embedded pair: ``python -m reproduce.organism COMMAND``."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastadapt.cli.console import print_table, quiet_transformers, say
from fastadapt.errors import RunError, UserError
from reproduce.command import run


def main(argv: list[str]) -> int:
    """Run a command; return its exit code."""
    options = _parser().parse_args(argv)
    quiet_transformers()
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "build": _build,
        "check": _check,
        "sample": _sample,
    }
    return commands[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.organism", description="The embedded model pairs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train both models from the seeded recipe")
    build.add_argument("--out", type=Path, required=True, help="folder to write the pair to")
    build.add_argument("--seed", type=int, default=0, help="seed of all random draws")
    build.add_argument("--overwrite", action="store_true", help="write to a folder in use")
    check = commands.add_parser(
        "check", help="compare a pair's measurements with the acceptance bounds"
    )
    check.add_argument("--folder", type=Path, help="folder of a pair; default: the shipped pair")
    check.add_argument("--n", type=int, default=500, help="number of test problems, at most 500")
    sample = commands.add_parser("sample", help="print problems and a model's answers")
    sample.add_argument(
        "--model",
        choices=("target", "base", "hybrid"),
        default="target",
        help="model to sample; the hybrid is the target with the base's MLPs",
    )
    sample.add_argument("--n", type=int, default=3, help="number of problems")
    sample.add_argument("--seed", type=int, default=0, help="seed of problems and sampling")
    for command in (build, check, sample):
        command.add_argument(
            "--pair", choices=("organism", "gated"), default="organism", help="which pair"
        )
    return parser


def _build(options: Any) -> int:
    from reproduce.organism.pairs import PAIRS
    from reproduce.organism.recipe import build

    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise UserError(f"--out: {out} is in use; give a new folder, or pass --overwrite")
    pair = PAIRS[options.pair]
    for name, value in build(out, seed=options.seed, progress=_say_record, pair=pair).items():
        print(f"{name}: {_short(value)}")
    print(f"written to {out.resolve()}")
    print(f"check with: python -m reproduce.organism check --pair {options.pair} --folder {out}")
    return 0


def _check(options: Any) -> int:
    from reproduce.organism.acceptance import BOUNDS_OF, check
    from reproduce.organism.pairs import PAIRS
    from reproduce.organism.recipe import N_TEST

    if not 1 <= options.n <= N_TEST:
        raise UserError(f"--n: expected 1 to {N_TEST}, got {options.n}")
    pair = PAIRS[options.pair]
    folder, bounds = options.folder or pair.folder, BOUNDS_OF[pair.name]
    if not (folder / "target").is_dir() or not (folder / "base").is_dir():
        raise UserError(f"--folder: expected a folder with target/ and base/, got {folder}")
    measured = check(folder, pair, n_problems=options.n)
    failed = measured.pop("failed")
    rows = [
        [name, _short(value), _bounds(*bounds.get(name, (None, None))), "*" * (name in failed)]
        for name, value in measured.items()
    ]
    print_table(["quantity", "measured", "bound", "missed"], rows)
    if failed:
        raise RunError(f"the pair in {folder} misses acceptance bounds: {', '.join(failed)}")
    return 0


def _bounds(low: float | None, high: float | None) -> str:
    return " ".join(
        f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None
    )


def _sample(options: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastadapt.evaluation.benchmarks.grading import stated_answer
    from reproduce.organism.acceptance import hybrid_of, sample
    from reproduce.organism.pairs import PAIRS
    from reproduce.organism.recipe import CONFIGS

    if options.n < 1:
        raise UserError(f"--n: expected 1 or more, got {options.n}")
    pair = PAIRS[options.pair]
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            pair.folder / name, trust_remote_code=False, dtype=torch.float32
        ).eval()
        for name in ("target", "base")
    }
    models["hybrid"] = hybrid_of(models["target"], models["base"])
    model = models[options.model]
    draw = random.Random(options.seed)
    problems = [pair.draw(draw) for _ in range(options.n)]
    tokenizer = AutoTokenizer.from_pretrained(pair.folder / "target", trust_remote_code=False)
    longest = CONFIGS[pair.name].max_tokens
    responses = sample(
        model, tokenizer, problems, max_new_tokens=longest, seed=options.seed
    ).responses
    for problem, response in zip(problems, responses, strict=True):
        right = stated_answer(response) == problem.answer
        verdict = "right" if right else f"wrong: the answer is {problem.answer}"
        print(f"[{problem.domain}] {problem.prompt}\n  {response}\n  ({verdict})\n")
    return 0


def _say_record(record: dict[str, Any]) -> None:
    say("  ".join(f"{key} {_short(value)}" for key, value in record.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
