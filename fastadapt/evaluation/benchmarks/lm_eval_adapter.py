"""lm-eval as the way a benchmark runs: its task files, its requests, its scores; our sampling.

Facts of lm-eval 0.4.13 that this rests on. A request of a task with ``repeats`` is handed over that
many times in a row, as one and the same object. Without a filter that takes all of them only the
first is scored. Nothing is fetched for a task whose questions a function gives, and nothing is
reported to anyone. It sets the global seeds of Python, numpy and torch, on which nothing here
depends.
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
    """The sampling was told to stop before every response was there."""


class SampledLM(LM):
    """Answers lm-eval's requests with :func:`fastadapt.evaluation.generation.sampling.sample`.

    The task's own generation settings do not count: those of ``config`` do, for every task alike.
    Contexts are tokenised as they are: they are rendered, BOS included.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SamplingConfig,
        *,
        out: Path | None = None,
        source: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._out, self._source, self._progress, self._stop = out, source, progress, stop
        self.sampled: Sampled | None = None  #: of the last requests

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The texts, up to the cut where a response degenerated."""
        ids = encode(self._tokenizer, [request.args[0] for request in requests])["input_ids"]
        seen: Counter[str] = Counter()
        wanted = []
        for request, prompt in zip(requests, ids, strict=True):
            name = str(request.doc["id"])
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

    # lm-eval's base class wants these two of every model; our task files never ask for them.
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("these benchmarks generate; none asks for a likelihood")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("these benchmarks generate; none asks for a likelihood")


def evaluate_task(
    lm: LM,
    task: str,
    *,
    metadata: Mapping[str, Any],
    repeats: int,
    limit: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> tuple[float, Sequence[Mapping[str, Any]]]:
    """One of our tasks by ``simple_evaluate``.

    Args:
        lm: :class:`SampledLM`, or any model of lm-eval.
        task: name of a task file.
        metadata: arguments of :func:`fastadapt.evaluation.benchmarks.datasets.dataset`, shared by
            all tasks.
        repeats: responses per question.
        limit: of the questions, the first so many.
        generation: changes of the task's generation settings; none count for :class:`SampledLM`.

    Returns:
        lm-eval's accuracy, and its samples: ``doc`` and ``resps`` of each question, in order.
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
    """The task's file with another number of repetitions: a file that includes it.

    lm-eval takes changes of a task that is its own only through a file, and the filter that keeps
    all repetitions must know their number.
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
    """Without lm-eval's account of what it does, nor its bars; errors are raised all the same."""
    logger = logging.getLogger("lm_eval")
    evaluator: Any = lm_eval.evaluator
    level, bar = logger.level, lm_eval.api.task.tqdm
    commit, environment = evaluator.get_git_commit_hash, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    evaluator.get_git_commit_hash = lambda: None  # git complains outside a checkout
    evaluator.add_env_info = lambda _: None  # it runs pip, for seconds, and nobody reads it
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        evaluator.get_git_commit_hash = commit
        evaluator.add_env_info = environment
