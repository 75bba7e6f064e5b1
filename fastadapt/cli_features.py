"""`fastadapt features ...` and `fastadapt intervene`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from fastadapt.console import print_table, quiet_transformers
from fastadapt.errors import UserError
from fastadapt.options import nearest
from fastadapt.options_features import (
    FEATURES_USAGE,
    chosen_intervention,
    collect_parser,
    config_of,
    intervene_parser,
    judged_parser,
    merge_parser,
    overlap_parser,
    pages_parser,
    parse,
    select_parser,
    sets_parser,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastadapt.features.judge.questions import Estimate
    from fastadapt.features.store import Store
    from fastadapt.progress import EvalProgress

_GO_ON = "Stopped; what was done is kept. Go on with the same command."


def features(argv: list[str]) -> int:
    """`fastadapt features`."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(FEATURES_USAGE)
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"unknown command 'features {name}'{nearest(name, COMMANDS)} "
            "(see fastadapt features --help)"
        )
    quiet_transformers()
    return COMMANDS[name](rest)


@contextmanager
def _under_way() -> Iterator[tuple[Event, EvalProgress]]:
    """A bar, and an event that Ctrl-C and SIGTERM set."""
    from fastadapt.progress import EvalProgress
    from fastadapt.training.interrupt import stop_on_signals

    with stop_on_signals(None) as (stop, _), EvalProgress(sys.stderr) as progress:
        yield stop, progress


def _collect(argv: list[str]) -> int:
    from fastadapt.features.collect import CollectConfig, Shard, collect

    typed = parse(collect_parser(), argv)
    shard = Shard() if typed.shard is None else Shard.parse(typed.shard)
    with _under_way() as (stop, progress):
        store = collect(
            typed.run,
            typed.output,
            config_of(typed, CollectConfig),
            shard=shard,
            dtype=typed.dtype,
            device=typed.device,
            overwrite=typed.overwrite,
            progress=partial(progress, "collecting"),
            stop=stop,
        )
        if stop.is_set():
            print(_GO_ON)
            return 0
    if store is None:
        print(f"Shard {shard.i} of {shard.n} is done. When all are: fastadapt features merge ...")
        return 0
    _print_store(store)
    return 0


def _merge(argv: list[str]) -> int:
    from fastadapt.features.collect import merge

    typed = parse(merge_parser(), argv)
    _print_store(merge(typed.shards, typed.output, overwrite=typed.overwrite))
    return 0


def _print_store(store: Store) -> None:
    """What was collected, by kind and layer."""
    from fastadapt.wording import number, percent

    rows = []
    for kind in store.kinds:
        found = store.connect(kind).execute(
            "SELECT layer, count(*), count_if(count > 0), sum(density), median(density) "
            "FILTER (WHERE count > 0) FROM features GROUP BY layer ORDER BY layer"
        )
        for layer, n, alive, active, median in found.fetchall():
            of = [kind, str(layer), number(n), number(alive), number(float(active))]
            rows.append([*of, "–" if median is None else percent(median)])
    print_table(["units", "layer", "there are", "fire", "L0", "median density"], rows)
    data = store.manifest["data"]
    print(f"\n{data['tokens']:,} tokens of {data['texts']:,} texts")
    print(f"features: {store.folder.resolve()}")
    print(f"browse:   fastadapt features serve {store.folder}")


def _export(argv: list[str]) -> int:
    from fastadapt.features.site import export
    from fastadapt.features.store import Store

    typed = parse(pages_parser("export"), argv)
    with _under_way() as (stop, progress):
        folder = export(
            Store.open(typed.source),
            typed.output,
            progress=partial(progress, "layers"),
            stop=stop,
        )
    print("Stopped; nothing was written." if folder is None else f"pages: {folder / 'index.html'}")
    return 0


def _serve(argv: list[str]) -> int:
    from fastadapt.features.site import serve

    typed = parse(pages_parser("serve"), argv)
    with _under_way() as (stop, progress):
        serve(
            typed.source,
            port=typed.port,
            ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
            progress=partial(progress, "layers"),
            stop=stop,
        )
    return 0


# --- judges ---------------------------------------------------------------------------------------


def _describe(argv: list[str]) -> int:
    from fastadapt.features.judge.activations import ModelActivations
    from fastadapt.features.judge.describe import describe
    from fastadapt.features.opening import students_of
    from fastadapt.features.store import Store

    typed = parse(judged_parser("describe"), argv)
    judge, config = _judged(typed, "describe")
    store = Store.open(typed.source)
    students = students_of(store, dtype=typed.dtype, device=typed.device)
    activations = ModelActivations(
        students.model,
        neurons_per_token=store.manifest["settings"].get("neurons_per_token"),
    )
    made = _open(judge, store, students.tokenizer)
    with _under_way() as (stop, progress):
        result = describe(
            store,
            made,
            config,
            activations,
            tell=progress,
            approve=partial(_approve, agreed=typed.yes),
            stop=stop,
        )
        return _judgements(store, result, stopped=stop.is_set())


def _classify(argv: list[str]) -> int:
    from fastadapt.features.judge.classify import classify
    from fastadapt.features.store import Store

    typed = parse(judged_parser("classify"), argv)
    judge, config = _judged(typed, "classify")
    store = Store.open(typed.source)
    made = _open(judge, store, None)
    with _under_way() as (stop, progress):
        approve = partial(_approve, agreed=typed.yes)
        result = classify(store, made, config, tell=progress, approve=approve, stop=stop)
        return _judgements(store, result, stopped=stop.is_set())


def _judged(typed: Any, command: str) -> tuple[Any, Any]:
    from fastadapt.features.judge.settings import ClassifyConfig, DescribeConfig, JudgeConfig
    from fastadapt.training.config import from_dict

    told = typed.as_dict()
    kind = DescribeConfig if command == "describe" else ClassifyConfig
    judge = from_dict(told["judge"], JudgeConfig, "judge.")
    return judge, from_dict(told[command], kind, f"{command}.")


def _open(config: Any, store: Store, tokenizer: Any) -> Any:
    from fastadapt.features.judge.opening import open_judge

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
    from fastadapt.features.judge.judgements import read_judgements, tables

    if result is None:
        print(_GO_ON if stopped else "Nothing was called.")
        return 0
    for table in tables(read_judgements(store)):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    print(f"judgements: {store.folder.resolve()}")
    return 0


def _overlap(argv: list[str]) -> int:
    from fastadapt.features.overlap import OverlapConfig, medians, overlap, plot_of
    from fastadapt.features.store import Store
    from fastadapt.wording import percent

    typed = parse(overlap_parser(), argv)
    with _under_way() as (stop, progress):
        found = overlap(
            typed.run,
            typed.store,
            config_of(typed, OverlapConfig),
            dtype=typed.dtype,
            device=typed.device,
            progress=partial(progress, "layers"),
            stop=stop,
        )
    if found is None:
        print("Stopped; nothing was written.")
        return 0
    of = medians(found)
    print(
        f"Of the tokens on which a feature fires most, {percent(of['target'])} are the same when "
        f"it reads the target, and {percent(of['base'])} when it reads the base (medians over "
        f"{found.num_rows:,} features)."
    )
    print(f"plot: {plot_of(Store.open(typed.store or typed.run)).resolve()}")
    return 0


# --- sets -----------------------------------------------------------------------------------------


def _select(argv: list[str]) -> int:
    from fastadapt.features.selection import SelectConfig, select
    from fastadapt.features.sets import save_set
    from fastadapt.features.store import Store

    typed = parse(select_parser(), argv)
    store = Store.open(typed.source)
    found = select(store, config_of(typed, SelectConfig))
    path = save_set(store, found, typed.name, overwrite=typed.overwrite)
    layers = ", ".join(map(str, found.per_layer()))
    print(f"{typed.name}: {len(found):,} features, by layer {layers}")
    print(f"{found.made}")
    print(f"set: {path.resolve()}")
    return 0


def _sets(argv: list[str]) -> int:
    from fastadapt.features.sets import list_sets
    from fastadapt.features.store import Store

    store = Store.open(parse(sets_parser(), argv).source)
    rows = [
        [s["name"], f"{s['size']:,}", ", ".join(map(str, s["per_layer"])), s["made"]]
        for s in list_sets(store)
    ]
    print_table(["set", "features", "by layer", "made of"], rows, left=True)
    return 0


def intervene(argv: list[str]) -> int:
    """`fastadapt intervene`."""
    if not argv or {"-h", "--help"} & set(argv):
        intervene_parser().print_help()
        return 0
    from fastadapt.features.sets import find_set
    from fastadapt.intervention_files import intervene as save
    from fastadapt.interventions import Intervention

    typed = parse(intervene_parser(), argv)
    kind, name = chosen_intervention(typed)
    out = save(
        typed.run,
        typed.output,
        find_set(typed.store or typed.run, name),
        Intervention(kind, scale=typed.scale),  # type: ignore[arg-type]
        overwrite=typed.overwrite,
    )
    print(f"adapter: {out.resolve()}")
    print(f"Compare it:  fastadapt eval {typed.run} {out}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "collect": _collect,
    "merge": _merge,
    "export": _export,
    "serve": _serve,
    "describe": _describe,
    "classify": _classify,
    "overlap": _overlap,
    "select": _select,
    "sets": _sets,
}
