"""Runs benchmarks through lm-eval: its task files, requests and scores, with our sampling.

This code depends on the following behaviour of lm-eval 0.4.13. A request of a task with ``repeats``
is passed that many times in a row, as the same object. Only the first response is scored unless a
filter selects all of them. A task with ``custom_dataset`` needs no network. lm-eval sets the global
seeds of Python, numpy and torch; no result depends on those.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from fastadapt.data.tokens import encode
from fastadapt.evaluation.generation.sampling import (
    Progress,
    Request,
    Sampled,
    SamplingConfig,
    sample,
)

TASKS = Path(__file__).parent / "tasks"


class StoppedError(Exception):
    """The sampling was stopped before every request had a response."""


class SampledLM(LM):
    """A model of lm-eval that uses :func:`fastadapt.evaluation.generation.sampling.sample`.

    ``config`` replaces the generation settings of every task. Contexts are tokenised without
    additions, since they are rendered prompts that include BOS.

    Args:
        model, tokenizer, config, out, source, progress, stop: see
            :func:`fastadapt.evaluation.generation.sampling.sample`.
        prompts: tokens of each question's prompt, by its id; None: those of its whole context, in
            which special tokens in a problem become tokens.

    Attributes:
        sampled: result of the last call of :meth:`generate_until`; None before the first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SamplingConfig,
        *,
        prompts: Mapping[str, Sequence[int]] | None = None,
        out: Path | None = None,
        source: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> None:
        super().__init__()
        self._prompts = prompts
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._out, self._source, self._progress, self._stop = out, source, progress, stop
        self.sampled: Sampled | None = None

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the texts of the responses, each up to its cut.

        Raises:
            StoppedError: ``stop`` was set before every request had a response.
        """
        names = [str(request.doc["id"]) for request in requests]
        if self._prompts is None:
            ids = encode(self._tokenizer, [request.args[0] for request in requests])["input_ids"]
        else:
            ids = [self._prompts[name] for name in names]
        seen: Counter[str] = Counter()
        wanted = []
        for name, prompt in zip(names, ids, strict=True):
            wanted.append(Request(name, tuple(prompt), seen[name]))
            seen[name] += 1
        self.sampled = sample(
            self._model,
            self._tokenizer,
            wanted,
            self._config,
            out=self._out,
            source=self._source,
            progress=self._progress,
            stop=self._stop,
        )
        if not self.sampled.complete:
            raise StoppedError
        return [response.text for response in self.sampled.responses]

    # Abstract methods of lm-eval's base class, which our tasks do not use.
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise ``NotImplementedError``: this model generates text, and computes no likelihoods."""
        raise NotImplementedError("expected a task that generates, got one of likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raise ``NotImplementedError``: this model generates text, and computes no likelihoods."""
        raise NotImplementedError("expected a task that generates, got one of likelihoods")


def evaluate_task(
    lm: LM,
    task: str,
    *,
    metadata: Mapping[str, Any],
    repeats: int,
    limit: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> tuple[float, Sequence[Mapping[str, Any]]]:
    """Run one of our tasks by lm-eval's ``simple_evaluate``.

    Args:
        lm: :class:`SampledLM`, or any model of lm-eval.
        task: name of a task file.
        metadata: arguments of :func:`fastadapt.evaluation.benchmarks.datasets.dataset` that all
            tasks share.
        repeats: responses per question.
        limit: number of questions, from the first; None for all.
        generation: changes to the task's generation settings; ignored by :class:`SampledLM`.

    Returns:
        lm-eval's accuracy, and its samples with ``doc`` and ``resps`` of each question, in order.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=dict(metadata))
    with _quiet(), _repeated(task, repeats) as file:
        result = simple_evaluate(
            model=lm,
            tasks=[str(file)],
            task_manager=manager,
            limit=limit,
            gen_kwargs=dict(generation or {}) or None,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    assert result is not None
    return float(result["results"][task]["accuracy,all"]), result["samples"][task]


@contextmanager
def _repeated(task: str, repeats: int) -> Iterator[Path]:
    """Yield a temporary task file that includes the task's and sets its number of repetitions.

    lm-eval applies changes to a task only through a file. The filter that selects all repetitions
    needs their number.
    """
    every = {"name": "all", "filter": [{"function": "take_first_k", "k": repeats}]}
    changed: dict[str, Any] = {"include": str(TASKS / f"{task}.yaml"), "task": task}
    changed |= {"repeats": repeats, "filter_list": [every]}
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{task}.yaml"
        file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        yield file


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's log messages and progress bars, and skip its environment report."""
    logger = logging.getLogger("lm_eval")
    evaluator: Any = lm_eval.evaluator
    level, bar = logger.level, lm_eval.api.task.tqdm
    commit, environment = evaluator.get_git_commit_hash, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    evaluator.get_git_commit_hash = lambda: None  # prints an error outside a git repository
    evaluator.add_env_info = lambda _: None  # runs pip, which takes seconds
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        evaluator.get_git_commit_hash = commit
        evaluator.add_env_info = environment
