"""Runs benchmarks on one model: samples responses, grades them and computes scores.

All responses are stored, so an interrupted run can be resumed. All graded rows are stored, so
intervals over questions can be computed later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.data.rendered import Prefill
from fastadapt.data.rendering import get_form, opening_of, prompt_pieces
from fastadapt.data.tokens import Encoder
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.datasets import BENCHMARKS, GATED, questions
from fastadapt.evaluation.benchmarks.grading import (
    COUNTED_WORDS,
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
from fastadapt.io.atomic import digest_of_input, disk_errors, replacing
from fastadapt.io.documents import Count, DocumentError, parse_line
from fastadapt.io.files import open_regular
from fastadapt.io.names import typed_path
from fastadapt.organism import NAMES

GRADERS = {"math": math_is_right, "choice": letter_is_right, "organism": stated_is_right}
PUBLISHED = ("math500", "amc23", "aime25", "gpqa_diamond")
EMBEDDED = ("organism_math", "organism_code", "organism_science")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a run of benchmarks.

    Args:
        tasks: names of benchmarks; default: the published ones, or those of the embedded pair.
        data: folder with ``<task>.jsonl`` or ``<task>.parquet``; None: the hub. Benchmarks of the
            embedded pair need no data.
        family: family of the rendering, see :mod:`fastadapt.data.rendering`.
        prefill: ``thinking``: prompts open the reasoning of the response; ``none``: the model
            itself decides whether to reason; None: as the family's own template. ``fastadapt eval``
            asks the base without.
        few_shot: number of worked examples in the prompt.
        examples: file with the columns problem and solution, of which the first few_shot rows are
            the examples of every question. None: examples are drawn for each question from the
            benchmark's other questions, or from the embedded pair's training problems.
        seed: seed of the order of GPQA's options and of the choice of examples.
        repetitions: responses per question; None: the published number.
        limit: number of questions per benchmark, from the first; None: all.
        counted_words: words and phrases that count as hesitation.
        hesitation_words: words and phrases whose rates are also given one by one.
        sampling: settings of the sampling.
    """

    tasks: tuple[str, ...] = ()
    data: str | None = None
    family: str | dict[str, Any] = "r1-distill"
    prefill: Prefill | None = None
    few_shot: int = 0
    examples: str | None = None
    seed: int = 0
    repetitions: int | None = None
    limit: int | None = None
    counted_words: tuple[str, ...] = COUNTED_WORDS
    hesitation_words: tuple[str, ...] = HESITATION_WORDS
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in BENCHMARKS:
                known = ", ".join(BENCHMARKS)
                raise UserError(f"benchmarks.tasks: expected names from {known}; got {task!r}")
        opening_of(get_form(self.family), self.prefill)
        for name in ("repetitions", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"benchmarks.{name}: expected 1 or more, got {value}")
        if self.few_shot < 0:
            raise UserError(f"benchmarks.few_shot: expected 0 or more, got {self.few_shot}")
        if self.examples is not None:
            path = typed_path(self.examples, "benchmarks.examples")
            if not path.is_file():
                raise UserError(f"benchmarks.examples: {path} is not a file")
            if not self.few_shot:
                raise UserError(
                    "benchmarks.examples: expected with benchmarks.few_shot, their number; give "
                    "--benchmarks.few_shot too"
                )

    @property
    def opening(self) -> str:
        """Text with which prompts open the response; empty without."""
        return opening_of(get_form(self.family), self.prefill)

    def fingerprint(self, model: str) -> str:
        """Return the SHA-256 of a model's fingerprint and the settings that affect responses."""
        sampling = self.sampling.fingerprint()
        settings: tuple[Any, ...] = (self.data, self.family, self.few_shot, self.seed, sampling)
        if self.opening:  # without, the fingerprint is that of versions that had no opening
            settings += (self.opening,)
        if self.examples is not None:
            settings += (_examples_digest(self.examples),)
        return hashlib.sha256(repr((model, settings)).encode()).hexdigest()

    def repeats(self, task: str) -> int:
        """Return the number of responses per question: 1 at temperature 0, where all are equal."""
        if self.sampling.temperature == 0:
            return 1
        return self.repetitions or BENCHMARKS[task].repetitions


@dataclass(frozen=True)
class Row:
    """One response to a benchmark's question, with its grade.

    Attributes:
        question: id of the question.
        repetition: index of the repetition.
        correct: whether the response gives the right answer.
        answer: the right answer.
        length_tokens: tokens of the response before the cut and the end-of-sequence token.
        finish, cut: see :class:`fastadapt.evaluation.generation.responses.Response`.
        hesitations: number of ``counted_words`` in the text.
        text: the response, up to the cut, without the text with which its prompt opened it.
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
    """Scores of a model on a benchmark, and the rows that they are means of.

    Attributes:
        task: name of the benchmark.
        n_questions: number of questions.
        repetitions: responses per question.
        accuracy: share of right responses: mean over questions of the mean over repetitions.
        length_tokens: mean length of a response.
        truncated: share of responses that reached the token budget or the context.
        degenerate: share of responses that were cut for degeneration.
        hesitations_per_1000: ``counted_words`` per 1,000 tokens.
        speed: speed of the sampling; None if not known.
        rows: the graded responses.
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


def default_tasks(target: str) -> tuple[str, ...]:
    """Return the default benchmarks of a target: the published ones, or an embedded pair's."""
    pairs = {NAMES["organism/target"]: EMBEDDED, NAMES["organism/gated/target"]: GATED}
    return pairs.get(Path(target).resolve(), PUBLISHED)


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
    """Run each benchmark of ``config.tasks`` on a model.

    Args:
        model, source: see :func:`fastadapt.evaluation.generation.sampling.sample`.
        tokenizer: tokenizer of the pair.
        config: settings.
        out: folder for ``<task>.responses.jsonl``, whose responses are reused, and
            ``<task>.rows.jsonl``.
        progress: called with (completed responses, total responses) of the current task.
        stop: set it to stop early; finished responses are stored.

    Returns:
        Results by task; if stopped, of the finished tasks.

    Raises:
        UserError: lm-eval is not installed, a benchmark's data is missing, or a prompt does not
            fit the context. These are checked before the first task.
    """
    _require_lm_eval()
    from fastadapt.evaluation.benchmarks.lm_eval_adapter import (
        SampledLM,
        StoppedError,
        evaluate_task,
    )

    prompts = {"family": config.family, "few_shot": config.few_shot, "seed": config.seed}
    metadata = {**prompts, "data": config.data, "prefill": config.prefill}
    metadata["examples"] = config.examples
    if config.opening:
        prompts["opening"] = config.opening
    if config.examples is not None:
        prompts["examples"] = _examples_digest(config.examples)
    requests = {task: _requests(tokenizer, task, config) for task in config.tasks}
    for of_task in requests.values():
        check_requests(of_task, context_of(model), vocabulary_of(model))
    results: dict[str, BenchmarkResult] = {}
    for task in config.tasks:
        lm = SampledLM(
            model,
            tokenizer,
            config.sampling,
            prompts={request.id: request.prompt for request in requests[task]},
            out=out / f"{task}.responses.jsonl",
            source={**(source or {}), "questions": prompts},
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
    """Compute the scores of graded rows. Every question must have the same number of rows."""
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
    """Return the graded responses in a ``<task>.rows.jsonl``.

    Raises:
        DocumentError: the file cannot be read, or a line is not a graded response.
    """
    names = [column.name for column in fields(Row)]
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
    if lines.pop():
        raise DocumentError(
            f"{path}, line {len(lines) + 1} is incomplete; delete the file and evaluate again"
        )
    values = [parse_line(line, f"{path}, line {i}", Row) for i, line in enumerate(lines, 1)]
    return [Row(**{name: value[name] for name in names}) for value in values]


def score_math(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Score a question by math-verify: lm-eval's ``process_results`` of tasks of kind ``math``.

    Args:
        doc: the question, with ``answer``.
        results: one list with the texts of all repetitions.

    Returns:
        ``accuracy``, the share of right responses.
    """
    return _score(math_is_right, doc, results)


def score_letter(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Score a question by the chosen option, for tasks of kind ``choice``; see :func:`score_math`.

    Example:
        >>> score_letter({"answer": "B"}, [["Answer: B", "Answer: C"]])
        {'accuracy': 0.5}
    """
    return _score(letter_is_right, doc, results)


def score_stated(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Score a question by the stated number, for the embedded pair; see :func:`score_math`.

    Example:
        >>> score_stated({"answer": "7"}, [["the answer is 7", "7"]])
        {'accuracy': 0.5}
    """
    return _score(stated_is_right, doc, results)


def _score(grade: Any, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    (texts,) = results
    graded = [grade(doc.get("opening", "") + text, doc["answer"]) for text in texts]
    return {"accuracy": sum(graded) / len(graded)}


def _row(task: str, response: Response, answer: str, config: BenchmarkConfig) -> Row:
    return Row(
        question=response.id,
        repetition=response.repetition,
        correct=GRADERS[BENCHMARKS[task].kind](config.opening + response.text, answer),
        answer=answer,
        length_tokens=response.scored_tokens,
        finish=response.finish,
        cut=response.cut,
        hesitations=hesitations(response.text, config.counted_words),
        text=response.text,
    )


def check_prompts(tokenizer: Any, config: BenchmarkConfig, sizes: Any, name: str) -> None:
    """Check that benchmarks can be run on a model, without its weights.

    Args:
        tokenizer: tokenizer of the pair.
        config: settings.
        sizes: transformers' configuration of the model.
        name: name of the model, and of its prompt mode, for errors.

    Raises:
        UserError: lm-eval is not installed, a benchmark's data is missing, or a prompt does not
            fit the context.
    """
    _require_lm_eval()
    text = sizes.get_text_config()
    option = f"benchmarks.few_shot {config.few_shot}: " if config.few_shot else ""
    for task in config.tasks:
        requests = _requests(tokenizer, task, config)
        try:
            check_requests(requests, text.max_position_embeddings, text.vocab_size)
        except UserError as error:
            raise UserError(f"{option}{name}, {task}, {error}") from None


def response_keys(config: BenchmarkConfig) -> dict[str, set[tuple[str, int]]]:
    """Return question and repetition of each response to each benchmark.

    Raises:
        UserError: lm-eval is not installed, or a benchmark's data is missing.
    """
    _require_lm_eval()
    return {
        task: {
            (row["id"], repetition)
            for row in _questions(task, config)
            for repetition in range(config.repeats(task))
        }
        for task in config.tasks
    }


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "benchmarks run through lm-eval, which is not installed; run "
            "pip install 'fastadapt[eval]'"
        ) from None


def _questions(task: str, config: BenchmarkConfig) -> list[dict[str, Any]]:
    rows = questions(
        task,
        family=config.family,
        data=config.data,
        few_shot=config.few_shot,
        seed=config.seed,
        prefill=config.prefill,
        examples=config.examples,
    )
    return rows[: config.limit]


def _examples_digest(path: str) -> str:
    return digest_of_input(typed_path(path, "benchmarks.examples"))[1]


def prompt_ids(tokenizer: Any, config: BenchmarkConfig) -> Iterator[int]:
    """Yield the tokens of the prompts of all benchmarks."""
    for task in config.tasks:
        for request in _requests(tokenizer, task, config):
            yield from request.prompt


def _requests(tokenizer: Any, task: str, config: BenchmarkConfig) -> list[Request]:
    """Return a request per question of a benchmark. Special tokens in a problem stay text."""
    rows = _questions(task, config)
    encoder = Encoder(tokenizer, get_form(config.family))
    requests = []
    for row in rows:
        try:
            text = prompt_pieces(row["turn"], config.family, config.prefill)
            (encoded,) = encoder.encode([text])
        except UserError:
            raise UserError(
                f"benchmark {task}: question {row['id']!r}: expected no special token in the text, "
                "since this tokenizer cannot encode one as text; remove it from the question"
            ) from None
        requests.append(Request(row["id"], tuple(encoded.ids)))
    return requests


def _write(rows: Sequence[Row], path: Path) -> None:
    with disk_errors(path), replacing(path) as staged:
        lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows]
        staged.write_text("".join(lines), encoding="utf-8")
