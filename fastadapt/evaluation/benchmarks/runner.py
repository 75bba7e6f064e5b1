"""Does the model still reason: benchmarks of many questions, each answered at length.

``run_benchmarks`` samples, judges and counts; every response is kept, so an interrupted run goes on
where it stopped, and every row is, so intervals can be drawn over questions later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.data.rendering import get_family
from fastadapt.data.tokens import encode
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.datasets import BENCHMARKS, questions
from fastadapt.evaluation.benchmarks.grading import (
    HESITATION_WORDS,
    hesitations,
    letter_is_right,
    math_is_right,
    stated_is_right,
)
from fastadapt.evaluation.generation.responses import Finish
from fastadapt.evaluation.generation.sampling import (
    Progress,
    Request,
    Response,
    SamplingConfig,
    Speed,
    check_requests,
    context_of,
    vocabulary_of,
)
from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.io.documents import Count, DocumentError, parse_line
from fastadapt.io.files import open_regular
from fastadapt.organism import NAMES

JUDGES = {"math": math_is_right, "choice": letter_is_right, "organism": stated_is_right}
PUBLISHED = ("math500", "amc23", "aime25", "gpqa_diamond")
EMBEDDED = ("organism_math", "organism_code", "organism_science")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Which benchmarks, and how they are asked.

    Args:
        tasks: names of benchmarks; where none is given, those of :func:`tasks_of` the pair.
        data: folder with ``<task>.jsonl`` or ``<task>.parquet``; None asks the hub. The embedded
            pair's need none.
        family: of the rendering.
        few_shot: worked examples in the prompt.
        seed: of the order of GPQA's options and the choice of examples.
        repetitions: responses per question, in place of the published number.
        limit: the first so many questions of each.
        hesitation_words: words and phrases that count as hesitation.
        sampling: how responses are sampled.
    """

    tasks: tuple[str, ...] = ()
    data: str | None = None
    family: str = "r1-distill"
    few_shot: int = 0
    seed: int = 0
    repetitions: int | None = None
    limit: int | None = None
    hesitation_words: tuple[str, ...] = HESITATION_WORDS
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in BENCHMARKS:
                known = ", ".join(BENCHMARKS)
                raise UserError(f"benchmarks.tasks: expected some of {known}, got {task!r}")
        get_family(self.family)
        for name in ("repetitions", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"benchmarks.{name}: expected 1 or more, got {value}")
        if self.few_shot < 0:
            raise UserError(f"benchmarks.few_shot: expected 0 or more, got {self.few_shot}")

    def fingerprint(self, model: str) -> str:
        """SHA-256 of what the responses of a model (its own fingerprint) depend on."""
        asked = (self.data, self.family, self.few_shot, self.seed, self.sampling.fingerprint())
        return hashlib.sha256(repr((model, asked)).encode()).hexdigest()

    def repeats(self, task: str) -> int:
        """Responses per question; one where they would all be the same."""
        if self.sampling.temperature == 0:
            return 1
        return self.repetitions or BENCHMARKS[task].repetitions


@dataclass(frozen=True)
class Row:
    """One response, judged.

    Attributes:
        question, repetition: which of the question with this id.
        correct: whether its answer is right.
        answer: the right one.
        length_tokens: of what is judged: up to the cut, the end-of-sequence token not counted.
        finish, cut: see :class:`fastadapt.evaluation.generation.responses.Response`.
        hesitations: words of hesitation in the text.
        text: the response, up to the cut.
    """

    question: str
    repetition: Count
    correct: bool
    answer: str
    length_tokens: Count
    finish: Finish
    cut: Count | None
    hesitations: Count
    text: str


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's numbers and the rows they are means of.

    Attributes:
        accuracy: share of right responses, mean over questions of the mean over repetitions.
        length_tokens: mean length of a response.
        truncated: share of responses that used up the budget or the context.
        degenerate: share that was cut for degeneration.
        hesitations_per_1000: words of hesitation per 1,000 tokens.
        speed: of the sampling.
    """

    task: str
    n_questions: int
    repetitions: int
    accuracy: float
    length_tokens: float
    truncated: float
    degenerate: float
    hesitations_per_1000: float
    speed: Speed | None
    rows: Sequence[Row]


def tasks_of(target: str) -> tuple[str, ...]:
    """The benchmarks that a target is usually asked: the embedded pair has its own."""
    return EMBEDDED if Path(target).resolve() == NAMES["organism/target"] else PUBLISHED


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    config: BenchmarkConfig,
    out: Path,
    *,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> dict[str, BenchmarkResult]:
    """Run each task on a model; those that were finished before ``stop`` was set.

    Args:
        model: a causal language model, as of
            :func:`fastadapt.evaluation.generation.sampling.sample`.
        tokenizer: of the pair.
        config: what to ask.
        out: folder for ``<task>.responses.jsonl`` (from which an interrupted run goes on) and
            ``<task>.rows.jsonl``.
        source: names the model, likewise.
        progress: called with (responses, responses wanted) of the task at hand.
        stop: ends the run early; what is finished is kept.

    Raises:
        UserError: lm-eval is not installed, a benchmark's data is missing, or a prompt does not
            fit the context; all of them before anything runs.
    """
    _require_lm_eval()
    from fastadapt.evaluation.benchmarks.lm_eval_adapter import (
        SampledLM,
        StoppedError,
        evaluate_task,
    )

    asked = {"family": config.family, "few_shot": config.few_shot, "seed": config.seed}
    metadata = {**asked, "data": config.data}
    _check_all(model, tokenizer, config)
    results: dict[str, BenchmarkResult] = {}
    for task in config.tasks:
        lm = SampledLM(
            model,
            tokenizer,
            config.sampling,
            out=out / f"{task}.responses.jsonl",
            source={**(source or {}), "questions": asked},
            progress=progress,
            stop=stop,
        )
        try:
            _, samples = evaluate_task(
                lm, task, metadata=metadata, repeats=config.repeats(task), limit=config.limit
            )
        except StoppedError:
            break
        assert lm.sampled is not None
        answers = {sample["doc"]["id"]: sample["doc"]["answer"] for sample in samples}
        rows = [_row(task, r, answers[r.id], config) for r in lm.sampled.responses]
        _write(rows, out / f"{task}.rows.jsonl")
        results[task] = summarize(task, rows, lm.sampled.speed)
    return results


def summarize(task: str, rows: Sequence[Row], speed: Speed | None = None) -> BenchmarkResult:
    """The numbers of judged rows, every question with as many."""
    n, tokens = len(rows), sum(row.length_tokens for row in rows)
    n_questions = len({row.question for row in rows})
    return BenchmarkResult(
        task=task,
        n_questions=n_questions,
        repetitions=n // n_questions,
        accuracy=sum(row.correct for row in rows) / n,
        length_tokens=tokens / n,
        truncated=sum(row.finish == "length" for row in rows) / n,
        degenerate=sum(row.finish == "degenerate" for row in rows) / n,
        hesitations_per_1000=1000 * sum(row.hesitations for row in rows) / max(1, tokens),
        speed=speed,
        rows=rows,
    )


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a ``<task>.rows.jsonl``; ``DocumentError`` names the line at fault."""
    names = [one.name for one in fields(Row)]
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
    if lines.pop():
        raise DocumentError(f"{path}, line {len(lines) + 1} is cut short")
    values = [parse_line(line, f"{path}, line {i}", Row) for i, line in enumerate(lines, 1)]
    return [Row(**{name: value[name] for name in names}) for value in values]


def score_math(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """lm-eval's ``process_results`` of the tasks judged by math-verify; below, of the others."""
    return _score(math_is_right, doc, results)


def score_letter(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    return _score(letter_is_right, doc, results)


def score_stated(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    return _score(stated_is_right, doc, results)


def _score(judge: Any, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    (texts,) = results  # of one request, all its repetitions
    return {"accuracy": sum(judge(text, doc["answer"]) for text in texts) / len(texts)}


def _row(task: str, response: Response, answer: str, config: BenchmarkConfig) -> Row:
    return Row(
        question=response.id,
        repetition=response.repetition,
        correct=JUDGES[BENCHMARKS[task].kind](response.text, answer),
        answer=answer,
        length_tokens=response.scored_tokens,
        finish=response.finish,
        cut=response.cut,
        hesitations=hesitations(response.text, config.hesitation_words),
        text=response.text,
    )


def require_questions(config: BenchmarkConfig) -> None:
    """Raise ``UserError`` where lm-eval or the data of a benchmark is missing."""
    _require_lm_eval()
    for task in config.tasks:
        _questions(task, config)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "benchmarks run through lm-eval, which is not installed; install the extra: "
            "pip install 'fastadapt[eval]'"
        ) from None


def _questions(task: str, config: BenchmarkConfig) -> list[dict[str, Any]]:
    by = {"few_shot": config.few_shot, "seed": config.seed}
    return questions(task, family=config.family, data=config.data, **by)[: config.limit]


def _check_all(model: Any, tokenizer: Any, config: BenchmarkConfig) -> None:
    """Every benchmark's questions are there and fit the context, before the first is asked."""
    for task in config.tasks:
        rows = _questions(task, config)
        prompts = encode(tokenizer, [row["prompt"] for row in rows])["input_ids"]
        requests = [Request(r["id"], tuple(ids)) for r, ids in zip(rows, prompts, strict=True)]
        check_requests(requests, context_of(model), vocabulary_of(model))


def _write(rows: Sequence[Row], path: Path) -> None:
    with disk_errors(path), replacing(path) as staged:
        lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows]
        staged.write_text("".join(lines), encoding="utf-8")
