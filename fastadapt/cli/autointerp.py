"""Commands `fastadapt features describe` and `classify`, in which a judge explains features."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from fastadapt.cli.console import print_table
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.errors import UserError
from fastadapt.features.autointerp.judges.endpoint import open_judge
from fastadapt.features.autointerp.judges.settings import (
    ClassifyConfig,
    DescribeConfig,
    JudgeConfig,
)
from fastadapt.features.store.store import Store

if TYPE_CHECKING:
    from fastadapt.features.autointerp.questions import Estimate


def describe(
    run: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    yes: bool = False,
    judge: JudgeConfig,
    describe: DescribeConfig,
) -> int:
    """Let a judge describe features from examples, and score each description by detection: how
    well the judge tells from it on which held-out texts the feature fires. Without --judge.model
    (or OPENAI_MODEL) the judge is one that needs no language model.

    Args:
        run: a run with collected features, or a store
        dtype: dtype of weights and streams; by default as collected
        yes: agree to the costs in advance
    """
    from fastadapt.features.autointerp.activations import ModelActivations
    from fastadapt.features.autointerp.describe import describe as describe_features
    from fastadapt.features.store.source_run import students_of

    store = Store.open(run)
    students = students_of(store, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    neurons = store.manifest["settings"].get("neurons_per_token")
    activations = ModelActivations(students.model, neurons_per_token=neurons)

    def count(text: str) -> int:
        return len(students.tokenizer(text, add_special_tokens=False)["input_ids"])

    opened = open_judge(judge, store, count=count)
    with stoppable() as (stop, progress):
        approve = partial(_approve, agreed=yes)
        result = describe_features(
            store, opened, describe, activations, progress=progress, approve=approve, stop=stop
        )
        return _print_judgements(store, result, stopped=stop.is_set())


def classify(run: str, *, yes: bool = False, judge: JudgeConfig, classify: ClassifyConfig) -> int:
    """Let a language model classify features as language, domain or reasoning features.

    Args:
        run: a run with collected features, or a store
        yes: agree to the costs in advance
    """
    from fastadapt.features.autointerp.classify import classify as classify_features

    store = Store.open(run)
    opened = open_judge(judge, store, count=None)
    with stoppable() as (stop, progress):
        approve = partial(_approve, agreed=yes)
        result = classify_features(
            store, opened, classify, progress=progress, approve=approve, stop=stop
        )
        return _print_judgements(store, result, stopped=stop.is_set())


def _approve(estimate: Estimate, *, agreed: bool) -> bool:
    """Print the costs of the calls and ask for consent; raise if stdin is not a terminal."""
    print(estimate.words, file=sys.stderr)
    if agreed:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            "standard input is no terminal, so nobody can agree to these costs; "
            "agree in advance with --yes"
        )
    print("Make these calls? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_judgements(store: Store, result: dict[str, Any] | None, *, stopped: bool) -> int:
    from fastadapt.features.autointerp.judgements import read_judgements, tables

    if result is None:
        saved = f"Stopped; finished answers are saved. {resume_hint()}"
        print(saved if stopped else "No calls were made.")
        return 0
    for table in tables(read_judgements(store)):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    print(f"judgements: {store.folder.resolve()}")
    return 0
