r"""Reads the questions of benchmarks as rendered prompts.

The data come from a local folder, the hub, or the embedded pair. Prompts of mathematics and of GPQA
have the wording of Evalchemy, which produced the published figures. They are rendered in the
family's form, including BOS, so that every harness passes the same text to the model. Few-shot
examples precede the question in the same user turn, with worked solutions if the data have them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastadapt.data.formats import SUFFIXES, read_files, require_columns
from fastadapt.data.hub import load_hub
from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.data.rendered import Prefill, Spec
from fastadapt.data.rendering import get_form, opening_of, render_prompt
from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.organism import GATED_QUESTIONS, QUESTIONS

Row = dict[str, Any]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is graded, and where its data come from.

    Attributes:
        kind: ``math``, ``choice`` or ``organism`` (of an embedded pair).
        repetitions: responses per question, as published.
        hub: dataset, configuration and split on the hub.
        question, answer, solution: names of columns. ``solution``, used in few-shot examples, is
            optional in the data.
        wrong: names of the columns of wrong options.
    """

    kind: str
    repetitions: int
    hub: tuple[str, str | None, str] | None = None
    question: str = "problem"
    answer: str = "answer"
    solution: str = "solution"
    wrong: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data of the benchmark must have."""
        return (self.question, self.answer, *self.wrong)


BENCHMARKS = {
    "math500": Benchmark("math", 1, ("HuggingFaceH4/MATH-500", None, "test")),
    "amc23": Benchmark("math", 10, ("math-ai/amc23", None, "test"), question="question"),
    "aime25": Benchmark("math", 10, ("math-ai/aime25", None, "test")),
    "gpqa_diamond": Benchmark(
        "choice",
        3,
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        question="Question",
        answer="Correct Answer",
        solution="Explanation",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
    "organism_math": Benchmark("organism", 1),
    "organism_code": Benchmark("organism", 1),
    "organism_science": Benchmark("organism", 1),
    "gated_on": Benchmark("organism", 1),
    "gated_off": Benchmark("organism", 1),
}

#: Benchmarks of the gated pair: problems with the marker, and without.
GATED = ("gated_on", "gated_off")


def dataset(
    benchmark: str,
    family: Spec = "r1-distill",
    data: str | None = None,
    few_shot: int = 0,
    seed: int = 0,
    prefill: Prefill | None = None,
    examples: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return ``{"test": Dataset}`` of a benchmark: lm-eval's ``custom_dataset`` of our tasks.

    Args:
        benchmark: a key of ``BENCHMARKS``.
        family: family of the rendering, see :mod:`fastadapt.data.rendering`.
        data: folder with ``<benchmark>.jsonl`` or ``.parquet``; None: the hub.
        few_shot: number of worked examples in the prompt.
        seed: seed of the order of options and of the choice of examples.
        prefill: how prompts open the response, see :func:`fastadapt.data.rendering.opening_of`.
        examples: file of worked examples, see :func:`questions`.

    Returns:
        Rows of ``id, question, answer, turn`` (the user's turn), ``prompt`` (rendered), ``opening``
        (text with which the prompt opens the response). Rows of GPQA also have ``order``: the
        indices of the options under A, B, C, D, where 0 is the right one.
    """
    import datasets

    rows = questions(
        benchmark,
        family=family,
        data=data,
        few_shot=few_shot,
        seed=seed,
        prefill=prefill,
        examples=examples,
    )
    return {"test": datasets.Dataset.from_list(rows)}


def questions(
    benchmark: str,
    *,
    family: Spec,
    data: str | None,
    few_shot: int,
    seed: int,
    prefill: Prefill | None = None,
    examples: str | None = None,
) -> list[Row]:
    """Return the questions of a benchmark, as rows of :func:`dataset`.

    Args:
        benchmark, family, data, few_shot, seed, prefill: see :func:`dataset`.
        examples: file with the columns ``problem`` and ``solution``, of which the first
            ``few_shot`` rows are the worked examples of every question. None: examples are drawn
            for each question from the benchmark's other questions, or from the embedded pair's
            training problems.

    Raises:
        UserError: the benchmark is unknown, its data or a column is missing, or ``few_shot`` is
            larger than the number of examples.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: expected one of {', '.join(BENCHMARKS)}")
    if few_shot < 0:
        raise UserError(f"few_shot: expected 0 or more, got {few_shot}")
    kind = BENCHMARKS[benchmark].kind
    if kind == "organism":
        rows, others = _organism(benchmark)
    else:
        rows = [_format(benchmark, i, row, seed) for i, row in enumerate(_read(benchmark, data))]
        others = rows
    shown = None if examples is None else _worked(examples)
    available = len(others) - (others is rows) if shown is None else len(shown)
    if few_shot > available:
        source = benchmark if shown is None else examples
        raise UserError(f"few_shot: expected at most {available} for {source}, got {few_shot}")
    opening = opening_of(get_form(family), prefill)
    for row in rows:
        if shown is None:
            draw = random.Random(f"{seed}/{benchmark}/{row['id']}/examples")
            # A question is no example of itself.
            other = [e for e in others if e["id"] != row["id"]] if few_shot else []
            shots = [f"{e['problem']} {e['solution']}" for e in draw.sample(other, few_shot)]
        else:
            shots = shown[:few_shot]
        row["turn"] = "\n\n".join([*shots, row["problem"]])
        row["prompt"] = render_prompt(row["turn"], family, prefill)
        row["opening"] = opening
    hidden = ("problem", "solution")
    return [{k: v for k, v in row.items() if k not in hidden} for row in rows]


def _worked(path: str) -> list[str]:
    """Return the worked examples of a file, each as the text of its problem and solution."""
    columns = ("problem", "solution")
    return [
        " ".join(_text(row.values[c], f"{path}, row {i}: {c!r}") for c in columns)
        for i, row in enumerate(
            read_files([typed_path(path, "benchmarks.examples")], columns), start=1
        )
    ]


def _format(benchmark: str, number: int, row: Row, seed: int) -> Row:
    """Return a row with the text of its problem as the user's turn, and its worked solution."""
    spec = BENCHMARKS[benchmark]
    where = f"benchmark {benchmark}, row {number + 1}"
    question, answer, *wrong = (_text(row[name], f"{where}: {name!r}") for name in spec.columns)
    new = {"id": f"{benchmark}/{number}", "question": question}
    solution = row.get(spec.solution)
    solution = "" if solution in (None, "") else _text(solution, f"{where}: {spec.solution!r}")
    if spec.kind == "math":
        problem = f"Problem: {question}\nMark your solution with \\boxed\nAnswer:"
        if "\\boxed" not in solution:
            solution = f"{solution} \\boxed{{{answer}}}".strip()
        return {**new, "answer": answer, "problem": problem, "solution": solution}
    options = [answer, *wrong]
    # The question is part of the seed: otherwise the right option would be under the same letter in
    # every question.
    order = list(range(len(options)))
    random.Random(f"{seed}/{benchmark}/{question}").shuffle(order)
    letter = LETTERS[order.index(0)]
    listed = "\n".join(f"{name}: {options[i]}" for name, i in zip(LETTERS, order, strict=True))
    problem = (
        "Return your final response within \\boxed{} and only include the letter choice "
        f"(A, B, C, or D) as your final response.\nProblem: {question}\nOptions: {listed}\nAnswer:"
    )
    solution = f"{solution} \\boxed{{{letter}}}".strip()
    return {**new, "answer": letter, "order": order, "problem": problem, "solution": solution}


def _text(value: Any, where: str) -> str:
    """Return a cell of a benchmark's data as text; a number is converted to text."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, str) or (number and math.isfinite(value))):
        got = "null" if value is None else type(value).__name__ if not number else value
        raise UserError(f"{where}: expected text or a number, got {got}")
    text = str(value)
    if text_or_none(text) is None:
        raise UserError(f"{where} is not UTF-8; correct this row")
    if not text.strip():
        raise UserError(f"{where} is empty; fill in or remove this row")
    return text.strip()


def _read(benchmark: str, data: str | None) -> Sequence[Row]:
    """Return the rows of a benchmark's data, from the folder ``data`` or from the hub."""
    spec = BENCHMARKS[benchmark]
    assert spec.hub is not None
    name, configuration, split = spec.hub
    columns = ", ".join(repr(column) for column in spec.columns)
    download = (
        f"download the dataset {name}{f' ({configuration})' if configuration else ''}, split "
        f"{split!r}, with the columns {columns}"
    )
    if data is not None:
        folder = typed_path(data, "benchmarks.data")
        files = [f for suffix in SUFFIXES if (f := folder / f"{benchmark}{suffix}").is_file()]
        if not files:
            raise UserError(
                f"benchmark {benchmark}: no {benchmark}.jsonl or {benchmark}.parquet in {folder}; "
                f"{download}, and save it in that folder"
            )
        rows = [r.values for r in read_files(files[:1], spec.columns, (spec.solution,))]
    else:
        try:
            loaded = load_hub(name, configuration, split, None)
        except UserError as error:
            raise UserError(
                f"benchmark {benchmark}: {error}. If this machine cannot reach the hub: {download} "
                f"on another, save it as {benchmark}.jsonl, and pass its folder as "
                "--benchmarks.data"
            ) from None
        require_columns(loaded.column_names, spec.columns, f"{name} ({split})")
        rows = list(loaded)
    if not rows:
        raise UserError(
            f"benchmark {benchmark}: expected questions in its data, got none; give a folder with "
            "data as --benchmarks.data"
        )
    return rows


def _organism(benchmark: str) -> tuple[list[Row], list[Row]]:
    """Return the test problems of a benchmark of an embedded pair, and the worked examples."""
    splits: dict[str, list[Row]] = {"test": [], "train": []}
    for row in _embedded_problems(GATED_QUESTIONS if benchmark in GATED else QUESTIONS):
        if row["benchmark"] == benchmark:
            rows = splits[row["split"]]
            rows.append(
                {
                    "id": f"{benchmark}/{row['split']}{len(rows)}",
                    "question": row["question"],
                    "answer": row["answer"],
                    "problem": row["question"],
                    "solution": row["worked"],
                }
            )
    return splits["test"], splits["train"]


@cache
def _embedded_problems(path: Path) -> list[Row]:
    """Return an embedded pair's problems. Those of the test split are held out of the training."""
    return [row.values for row in read_files([path], ("benchmark", "split", "question"))]
