"""`fastadapt features describe` and `classify`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastadapt.cli.console import print_table
from fastadapt.cli.options.features import judged_parser
from fastadapt.cli.stoppable import go_on, under_way
from fastadapt.errors import UserError

if TYPE_CHECKING:
    from fastadapt.features.autointerp.questions import Estimate
    from fastadapt.features.store.store import Store


def describe(argv: list[str]) -> int:
    """`fastadapt features describe`."""
    from fastadapt.features.autointerp.activations import ModelActivations
    from fastadapt.features.autointerp.describe import describe as ask
    from fastadapt.features.store.source_run import students_of
    from fastadapt.features.store.store import Store

    typed = judged_parser("describe").parse_args(argv)
    judge, config = _judged(typed, "describe")
    store = Store.open(typed.source)
    students = students_of(
        store,
        dtype=typed.dtype,
        device=typed.device,
        trust_remote_code=typed.trust_remote_code,
    )
    activations = ModelActivations(
        students.model,
        neurons_per_token=store.manifest["settings"].get("neurons_per_token"),
    )
    made = _open(judge, store, students.tokenizer)
    with under_way() as (stop, progress):
        result = ask(
            store,
            made,
            config,
            activations,
            tell=progress,
            approve=partial(_approve, agreed=typed.yes),
            stop=stop,
        )
        return _judgements(store, result, stopped=stop.is_set())


def classify(argv: list[str]) -> int:
    """`fastadapt features classify`."""
    from fastadapt.features.autointerp.classify import classify as ask
    from fastadapt.features.store.store import Store

    typed = judged_parser("classify").parse_args(argv)
    judge, config = _judged(typed, "classify")
    store = Store.open(typed.source)
    made = _open(judge, store, None)
    with under_way() as (stop, progress):
        approve = partial(_approve, agreed=typed.yes)
        result = ask(store, made, config, tell=progress, approve=approve, stop=stop)
        return _judgements(store, result, stopped=stop.is_set())


def _judged(typed: Any, command: str) -> tuple[Any, Any]:
    from fastadapt.features.autointerp.judges.settings import (
        ClassifyConfig,
        DescribeConfig,
        JudgeConfig,
    )
    from fastadapt.training.config import from_dict

    told = typed.as_dict()
    kind = DescribeConfig if command == "describe" else ClassifyConfig
    judge = from_dict(told["judge"], JudgeConfig, "judge.")
    return judge, from_dict(told[command], kind, f"{command}.")


def _open(config: Any, store: Store, tokenizer: Any) -> Any:
    from fastadapt.features.autointerp.judges.endpoint import open_judge

    count: Callable[[str], int] | None = None
    if tokenizer is not None:
        count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    return open_judge(config, store, count=count)


def _approve(estimate: Estimate, *, agreed: bool) -> bool:
    """Tell what the calls will cost, and ask a person; where nobody is there, nothing is called."""
    print(estimate.words, file=sys.stderr)
    if agreed:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to these costs; agree beforehand with --yes")
    print("Make these calls? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _judgements(store: Store, result: dict[str, Any] | None, *, stopped: bool) -> int:
    from fastadapt.features.autointerp.judgements import read_judgements, tables

    if result is None:
        told = f"Stopped; what was done is kept. {go_on()}"
        print(told if stopped else "Nothing was called.")
        return 0
    for table in tables(read_judgements(store)):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    print(f"judgements: {store.folder.resolve()}")
    return 0
