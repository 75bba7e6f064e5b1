"""`fastadapt features ...` and `fastadapt intervene`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fastadapt.cli.autointerp import classify, describe
from fastadapt.cli.console import print_table, quiet_transformers
from fastadapt.cli.options.features import (
    FEATURES_USAGE,
    check_parser,
    chosen_intervention,
    collect_parser,
    config_of,
    intervene_parser,
    merge_parser,
    overlap_parser,
    pages_parser,
    select_parser,
    sets_parser,
)
from fastadapt.cli.options.parser import nearest
from fastadapt.cli.stoppable import go_on, under_way
from fastadapt.errors import RunError, UserError

if TYPE_CHECKING:
    from fastadapt.features.store.store import Store


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


def _collect(argv: list[str]) -> int:
    from fastadapt.features.collect import CollectConfig, Shard, collect

    typed = collect_parser().parse_args(argv)
    shard = Shard() if typed.shard is None else Shard.parse(typed.shard)
    with under_way() as (stop, progress):
        store = collect(
            typed.run,
            typed.output,
            config_of(typed, CollectConfig),
            shard=shard,
            dtype=typed.dtype,
            device=typed.device,
            trust_remote_code=typed.trust_remote_code,
            overwrite=typed.overwrite,
            progress=partial(progress, "collecting"),
            stop=stop,
        )
        if stop.is_set():
            print(f"Stopped; what was done is kept. {go_on(overwrite=typed.overwrite)}")
            return 0
    if store is None:
        print(f"Shard {shard.i} of {shard.n} is done. When all are: fastadapt features merge ...")
        return 0
    _print_store(store)
    return 0


def _merge(argv: list[str]) -> int:
    from fastadapt.features.collect import merge

    typed = merge_parser().parse_args(argv)
    _print_store(merge(typed.shards, typed.output, overwrite=typed.overwrite))
    return 0


def _print_store(store: Store) -> None:
    """What was collected, by kind and layer."""
    import numpy as np

    from fastadapt.reporting.formatting import markers_note, number, percent

    rows = []
    for kind in store.kinds:
        for layer in range(store.shape(kind)[0]):
            density = store.read("features", kind, columns=["density"], layer=layer)["density"]
            all_F = density.to_numpy()
            fire = all_F[all_F > 0]
            of = [kind, str(layer), number(len(all_F)), number(len(fire)), number(all_F.sum())]
            rows.append([*of, percent(np.median(fire)) if len(fire) else "–"])
    print_table(["units", "layer", "there are", "fire", "L0", "median density"], rows)
    data = store.manifest["data"]
    print(f"\n{data['tokens']:,} tokens of {data['texts']:,} texts")
    if left_out := data.get("too_long"):
        told = f"{left_out:,} of {data['read']:,} conversations were left out: they are longer than"
        print(f"{told} --max_tokens, or than the model's context")
    if marked := data.get("with_markers"):
        print(markers_note(marked, data["texts"]))
    print(f"features: {store.folder.resolve()}")
    print(f"browse:   fastadapt features serve {store.folder}")


def _export(argv: list[str]) -> int:
    from fastadapt.features.site import export
    from fastadapt.features.store.store import Store

    typed = pages_parser("export").parse_args(argv)
    with under_way() as (stop, progress):
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

    typed = pages_parser("serve").parse_args(argv)
    with under_way() as (stop, progress):
        serve(
            typed.source,
            port=typed.port,
            ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
            progress=partial(progress, "layers"),
            stop=stop,
        )
    return 0


def _overlap(argv: list[str]) -> int:
    from fastadapt.features.overlap import OverlapConfig, medians, overlap, plot_of
    from fastadapt.features.store.store import Store
    from fastadapt.reporting.formatting import percent

    typed = overlap_parser().parse_args(argv)
    with under_way() as (stop, progress):
        found = overlap(
            typed.run,
            typed.store,
            config_of(typed, OverlapConfig),
            dtype=typed.dtype,
            device=typed.device,
            trust_remote_code=typed.trust_remote_code,
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
    from fastadapt.features.store.selection import SelectConfig, select
    from fastadapt.features.store.sets import save_set
    from fastadapt.features.store.store import Store

    typed = select_parser().parse_args(argv)
    store = Store.open(typed.source)
    found = select(store, config_of(typed, SelectConfig))
    path = save_set(store, found, typed.name, overwrite=typed.overwrite)
    layers = ", ".join(map(str, found.per_layer()))
    print(f"{typed.name}: {len(found):,} features, by layer {layers}")
    print(f"{found.expression}")
    print(f"set: {path.resolve()}")
    return 0


def _sets(argv: list[str]) -> int:
    from fastadapt.features.store.sets import list_sets
    from fastadapt.features.store.store import Store

    store = Store.open(sets_parser().parse_args(argv).source)
    rows = []
    for s in list_sets(store):
        if "broken" in s:
            print(f"{s['name']}: broken: {s['broken']}")
            continue
        made = f"(of another adapter: select it again) {s['made']}" if s["stale"] else s["made"]
        rows.append([s["name"], f"{s['size']:,}", ", ".join(map(str, s["per_layer"])), made])
    print_table(["set", "features", "by layer", "made of"], rows, left=True)
    return 0


def _check(argv: list[str]) -> int:
    from fastadapt.features.checking import check_store
    from fastadapt.features.store.store import Store

    store = Store.open(check_parser().parse_args(argv).source, complete=False)
    found = check_store(store)
    rows = []
    for one in found:
        size = "" if one.rows is None else f"{one.rows:,}"
        state = "wrong" if one.wrong else one.note or "sound"
        rows.append([one.name, size, "yes" if one.hashed else "has none", state])
    print_table(["file", "rows", "SHA-256", ""], rows, left=True)
    lines = [f"{one.name}: {line}" for one in found for line in one.wrong]
    if lines:
        raise RunError(f"{store.folder}: {len(lines)} wrong:\n  " + "\n  ".join(lines))
    return 0


def intervene(argv: list[str]) -> int:
    """`fastadapt intervene`."""
    if not argv or {"-h", "--help"} & set(argv):
        intervene_parser().print_help()
        return 0
    from fastadapt.features.store.sets import find_set
    from fastadapt.interventions import Intervention
    from fastadapt.interventions.files import intervene as save

    typed = intervene_parser().parse_args(argv)
    kind, name = chosen_intervention(typed)
    out = save(
        typed.run,
        typed.output,
        find_set(typed.store or typed.run, name),
        Intervention(kind, scale=typed.scale),  # type: ignore[arg-type]
        overwrite=typed.overwrite,
    )
    print(f"adapter: {out.resolve()}")
    # On the target it is of another pair, the target with itself.
    beside = "" if kind == "onto-target" else f"{typed.run} "
    print(f"Compare it:  fastadapt eval {beside}{out}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "collect": _collect,
    "merge": _merge,
    "export": _export,
    "serve": _serve,
    "describe": describe,
    "classify": classify,
    "overlap": _overlap,
    "select": _select,
    "sets": _sets,
    "check": _check,
}
