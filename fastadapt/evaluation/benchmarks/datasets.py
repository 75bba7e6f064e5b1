r"""The questions of the benchmarks, as prompts: from a local folder, the hub, or the embedded pair.

Prompts of mathematics and of GPQA are worded as in Evalchemy, which the published figures were made
with. They are rendered in the family's form here, BOS included, so that any harness gets the text
that the model is to see. Few-shot examples stand before the question, in the same user turn, each
with its worked solution where the data has one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.data.rendering import render_parts
from fastadapt.data.sources import SUFFIXES, read_files, reading_hub, require_columns
from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.organism import QUESTIONS

Row = dict[str, Any]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: what kind it is, and where its questions are.

    Attributes:
        kind: ``math``, ``choice`` or ``organism``.
        repetitions: responses per question, as published.
        hub: dataset, configuration and split on the hub.
        question, answer, solution: its columns; ``solution``, for few-shot examples, may be absent.
        wrong: columns of the wrong options.
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
        """Those that the data must have."""
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
}


def dataset(
    benchmark: str,
    family: str = "r1-distill",
    data: str | None = None,
    few_shot: int = 0,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """What lm-eval calls for a task's questions (``custom_dataset``): ``{"test": Dataset}``.

    Args:
        benchmark: a key of ``BENCHMARKS``.
        family: of the rendering, see :mod:`fastadapt.data.rendering`.
        data: folder with ``<benchmark>.jsonl`` or ``.parquet``; None asks the hub.
        few_shot: worked examples in the prompt.
        seed: of the order of options and of the choice of examples.

    Returns:
        Rows of ``id, question, answer, prompt`` (rendered) and, of GPQA, ``order``: which option of
        the data stands under A, B, C, D (0 is the right one).
    """
    import datasets

    rows = questions(benchmark, family=family, data=data, few_shot=few_shot, seed=seed)
    return {"test": datasets.Dataset.from_list(rows)}


def questions(
    benchmark: str, *, family: str, data: str | None, few_shot: int, seed: int
) -> list[Row]:
    """The rows of :func:`dataset`.

    Raises:
        UserError: no such benchmark, no data, a column that is missing, or too few examples.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: expected one of {', '.join(BENCHMARKS)}")
    if few_shot < 0:
        raise UserError(f"few_shot: expected 0 or more, got {few_shot}")
    kind = BENCHMARKS[benchmark].kind
    if kind == "organism":
        rows, examples = _organism(benchmark)
    else:
        rows = [_asked(benchmark, i, row, seed) for i, row in enumerate(_read(benchmark, data))]
        examples = rows
    if few_shot > len(examples) - (examples is rows):
        raise UserError(f"few_shot: {benchmark} has {len(examples)} examples, {few_shot} wanted")
    for row in rows:
        draw = random.Random(f"{seed}/{benchmark}/{row['id']}/examples")
        others = [e for e in examples if e["id"] != row["id"]] if few_shot else []
        shown = [f"{e['asked']} {e['worked']}" for e in draw.sample(others, few_shot)]
        asked = "\n\n".join([*shown, row["asked"]])
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "?"}]
        row["prompt"] = render_parts(turns, family)[0]
    hidden = ("asked", "worked")
    return [{k: v for k, v in row.items() if k not in hidden} for row in rows]


def _asked(benchmark: str, number: int, row: Row, seed: int) -> Row:
    """A question as it is put, its answer, and its worked solution."""
    of = BENCHMARKS[benchmark]
    where = f"benchmark {benchmark}, row {number + 1}"
    question, answer, *wrong = (_text(row[column], f"{where}: {column!r}") for column in of.columns)
    new = {"id": f"{benchmark}/{number}", "question": question}
    solution = row.get(of.solution)
    solution = "" if solution in (None, "") else _text(solution, f"{where}: {of.solution!r}")
    if of.kind == "math":
        asked = f"Problem: {question}\nMark your solution with \\boxed\nAnswer:"
        boxed = f"\\boxed{{{answer}}}"
        return {
            **new,
            "answer": answer,
            "asked": asked,
            "worked": solution if "\\boxed" in solution else f"{solution} {boxed}".strip(),
        }
    options = [answer, *wrong]
    # One generator per question, seeded by the question: a seed for all of them alone would put
    # the right option under the same letter each time.
    order = list(range(len(options)))
    random.Random(f"{seed}/{benchmark}/{question}").shuffle(order)
    letter = LETTERS[order.index(0)]
    listed = "\n".join(f"{name}: {options[i]}" for name, i in zip(LETTERS, order, strict=True))
    asked = (
        "Return your final response within \\boxed{} and only include the letter choice "
        f"(A, B, C, or D) as your final response.\nProblem: {question}\nOptions: {listed}\nAnswer:"
    )
    worked = f"{solution} \\boxed{{{letter}}}".strip()
    return {**new, "answer": letter, "order": order, "asked": asked, "worked": worked}


def _text(value: Any, where: str) -> str:
    """A cell of a benchmark's data, where numbers may stand for themselves."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, str) or (number and math.isfinite(value))):
        got = "null" if value is None else type(value).__name__ if not number else value
        raise UserError(f"{where}: expected text or a number, got {got}")
    text = str(value)
    if text_or_none(text) is None:
        raise UserError(f"{where} is not UTF-8")
    if not text.strip():
        raise UserError(f"{where} is empty")
    return text.strip()


def _read(benchmark: str, data: str | None) -> Sequence[Row]:
    """The rows of a benchmark's data, local where there is a folder, else of the hub."""
    of = BENCHMARKS[benchmark]
    assert of.hub is not None
    name, configuration, split = of.hub
    columns = ", ".join(repr(column) for column in of.columns)
    fetch = (
        f"fetch the dataset {name}{f' ({configuration})' if configuration else ''}, split "
        f"{split!r}, with the columns {columns}"
    )
    if data is not None:
        folder = typed_path(data, "benchmarks.data")
        files = [f for suffix in SUFFIXES if (f := folder / f"{benchmark}{suffix}").is_file()]
        if not files:
            raise UserError(
                f"benchmark {benchmark}: no {benchmark}.jsonl or {benchmark}.parquet in {folder}; "
                f"{fetch}, and save it there"
            )
        rows = [r.values for r in read_files(files[:1], of.columns, (of.solution,))]
    else:
        import datasets

        try:
            with reading_hub(name, split, None):
                loaded = datasets.load_dataset(name, configuration, split=split)
        except UserError as error:
            raise UserError(
                f"benchmark {benchmark}: {error}. If the hub cannot be reached from here: {fetch} "
                f"where it can, save it as {benchmark}.jsonl, and give its folder as "
                "benchmarks.data"
            ) from None
        require_columns(loaded.column_names, of.columns, f"{name} ({split})")
        rows = list(loaded)
    if not rows:
        raise UserError(f"benchmark {benchmark}: its data has no row")
    return rows


def _organism(benchmark: str) -> tuple[list[Row], list[Row]]:
    """Return the held-out test problems of a benchmark of the embedded pair, and worked ones."""
    rows: dict[str, list[Row]] = {"test": [], "train": []}
    for row in _embedded_problems():
        if row["benchmark"] == benchmark:
            of_split = rows[row["split"]]
            of_split.append(
                {
                    "id": f"{benchmark}/{row['split']}{len(of_split)}",
                    "question": row["question"],
                    "answer": row["answer"],
                    "asked": row["question"],
                    "worked": row["worked"],
                }
            )
    return rows["test"], rows["train"]


@cache
def _embedded_problems() -> list[Row]:
    """Return the pair's problems; the target was not trained on those of the test split."""
    return [row.values for row in read_files([QUESTIONS], ("benchmark", "split", "question"))]
