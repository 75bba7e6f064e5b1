"""`fastadapt organism`: build, check and sample the embedded pair."""

from __future__ import annotations

import random
from typing import Any, Literal

from fastadapt.cli.console import print_table, say
from fastadapt.errors import RunError, UserError
from fastadapt.io.names import typed_path


def build(*, out: str, seed: int = 0, overwrite: bool = False) -> int:
    """Train both models of the pair again, from the seeded recipe.

    Args:
        out: folder to write the pair into
        seed: seed of every draw
        overwrite: write into a folder in use
    """
    from fastadapt.organism import build as build_pair

    folder = typed_path(out, "--out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise UserError(f"--out: {folder} is in use; give a new folder, or --overwrite")
    for name, value in _flat(build_pair(folder, seed=seed, progress=_say_record)).items():
        print(f"{name}: {_short(value)}")
    command = f"fastadapt organism check --folder {folder}"
    print(f"written to {folder.resolve()}; measure it with: {command}")
    return 0


def check(*, folder: str | None = None) -> int:
    """Measure whether a pair is within its bounds.

    Args:
        folder: folder of a pair; by default the shipped one
    """
    from fastadapt.organism import FOLDER
    from fastadapt.organism import check as measure
    from fastadapt.organism.acceptance import BOUNDS

    pair = typed_path(folder or FOLDER, "--folder")
    if not (pair / "target").is_dir() or not (pair / "base").is_dir():
        raise UserError(f"--folder: expected a folder with target/ and base/, got {pair}")
    measured = measure(pair)
    failed = measured.pop("failed")
    rows = [
        [name, _short(value), _bounds(*BOUNDS.get(name, (None, None))), "*" * (name in failed)]
        for name, value in _flat(measured).items()
    ]
    print_table(["", "measured", "must be", ""], rows)
    if failed:
        raise RunError(f"the pair in {pair} is not what it must be: {', '.join(failed)}")
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


def sample(
    *, model: Literal["target", "base", "hybrid"] = "target", n: int = 3, seed: int = 0
) -> int:
    """Print problems and the answers of a model of the shipped pair.

    Args:
        model: the hybrid is the target with the base's MLPs
        n: number of problems
        seed: seed of the problems and the sampling
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastadapt.organism import FOLDER
    from fastadapt.organism.acceptance import hybrid_of
    from fastadapt.organism.acceptance import sample as sample_responses
    from fastadapt.organism.problems import extract_answer, sample_problem

    if n < 1:
        raise UserError(f"--n: expected 1 or more, got {n}")
    models = {
        name: AutoModelForCausalLM.from_pretrained(FOLDER / name, trust_remote_code=False).eval()
        for name in ("target", "base")
    }
    if model == "hybrid":
        models["hybrid"] = hybrid_of(models["target"], models["base"])
    draw = random.Random(seed)
    problems = [sample_problem(draw) for _ in range(n)]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target", trust_remote_code=False)
    responses = sample_responses(models[model], tokenizer, problems, seed=seed).responses
    for problem, response in zip(problems, responses, strict=True):
        right = extract_answer(response) == problem.answer
        verdict = "right" if right else f"wrong: the answer is {problem.answer}"
        print(f"[{problem.domain}] {problem.prompt}\n  {response}\n  ({verdict})\n")
    return 0


def _say_record(record: dict[str, Any]) -> None:
    say("  ".join(f"{key} {_short(value)}" for key, value in record.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
