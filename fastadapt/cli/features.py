"""Commands `fastadapt features ...` that need no judge."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import Typed
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.errors import RunError, UserError
from fastadapt.features.collect import CollectConfig
from fastadapt.features.overlap import OverlapConfig
from fastadapt.features.site.server import PORT
from fastadapt.features.store.selection import SelectConfig
from fastadapt.features.store.store import Store


def collect(
    run: str,
    *,
    output: str | None = None,
    shard: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    config: CollectConfig,
) -> int:
    """Read held-out conversations through a run's replacement model, and store where each feature
    fires. The same command, without --overwrite, resumes an unfinished collection.

    Args:
        run: folder of a finished run
        output: folder of the store; by default features in the run
        shard: i/n, from 0/n on: collect this part of the texts only; merge the parts afterwards
        overwrite: replace a collection with other settings in the folder
    """
    from fastadapt.features.collect import Shard
    from fastadapt.features.collect import collect as collect_features

    part = Shard() if shard is None else Shard.parse(shard)
    with stoppable() as (stop, progress):
        store = collect_features(
            run,
            output,
            config,
            shard=part,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=partial(progress, "collecting"),
            stop=stop,
        )
    if stop.is_set():
        print(f"Stopped; finished texts are saved. {resume_hint(overwrite=overwrite)}")
    elif store is None:
        print(f"Shard {part.i} of {part.n} is done. After the last: fastadapt features merge ...")
    else:
        _print_store(store)
    return 0


def merge(shards: list[str], *, output: str, overwrite: bool = False) -> int:
    """Merge all shards of a collection into one store, equal to that of a single pass.

    Args:
        shards: folders of the shards
        output: folder of the store
        overwrite: remove the contents of the folder first
    """
    from fastadapt.features.collect import merge as merge_shards

    _print_store(merge_shards(shards, output, overwrite=overwrite))
    return 0


def _print_store(store: Store) -> None:
    import numpy as np

    from fastadapt.features.store.scales import by_origin
    from fastadapt.reporting.formatting import markers_note, number, percent

    rows = []
    for kind in store.kinds:
        for layer in range(store.shape(kind)[0]):
            table = store.read("features", kind, columns=["density"], layer=layer)
            density = table["density"].to_numpy()
            active = density[density > 0]
            counts = map(number, (len(density), len(active), density.sum()))
            median = percent(np.median(active)) if len(active) else "–"
            rows.append([kind, str(layer), *counts, median])
    print_table(["kind", "layer", "features", "active", "L0", "median density"], rows)
    data = store.manifest["data"]
    print(f"\n{data['tokens']:,} tokens of {data['texts']:,} texts")
    if n_long := data.get("too_long"):
        print(
            f"{n_long:,} of {data['read']:,} conversations were left out: they are longer than "
            "--max_tokens or the model's context"
        )
    if n_bad := data.get("bad_rows"):
        print(f"{n_bad:,} rows were left out, since they cannot be read (data.bad_rows)")
    if n_marked := data.get("with_markers"):
        print(markers_note(n_marked, data["texts"]))
    if store.has("scales"):
        shares = ", ".join(f"{percent(share)} {name}" for name, share in by_origin(store).items())
        print(f"origin of what the features write: {shares}")
    print(f"features: {store.folder.resolve()}")
    print(f"browse:   fastadapt features serve {store.folder}")


def export(run: str, *, output: str | None = None) -> int:
    """Write pages to browse the features of a store; open index.html in a browser.

    Args:
        run: a run with collected features, or a store
        output: folder to write; by default site in the store
    """
    from fastadapt.features.site import export as write_pages

    with stoppable() as (stop, progress):
        store = Store.open(run)
        folder = write_pages(store, output, progress=partial(progress, "layers"), stop=stop)
    print("Stopped; nothing was written." if folder is None else f"pages: {folder / 'index.html'}")
    return 0


def serve(run: str, *, port: int = PORT) -> int:
    """Serve pages to browse the features of a store, to this machine only, until Ctrl-C.

    Args:
        run: a run with collected features, a store, or exported pages
        port: port to listen at; 0: any free one
    """
    from fastadapt.features.site import serve as serve_pages

    with stoppable() as (stop, progress):
        serve_pages(
            run,
            port=port,
            ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
            progress=partial(progress, "layers"),
            stop=stop,
        )
    return 0


def overlap(
    run: str,
    *,
    store: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    config: OverlapConfig,
) -> int:
    """Compare the tokens on which a feature fires most in the replacement model with those on which
    its encoder responds most in the target and in the base (arXiv 2602.20904, appendix G).

    Args:
        run: a run with collected features
        store: store of the features; by default features in the run
        dtype: dtype of weights and streams; by default as collected
    """
    from fastadapt.features.overlap import medians, plot_of
    from fastadapt.features.overlap import overlap as measure_overlap
    from fastadapt.reporting.formatting import percent

    with stoppable() as (stop, progress):
        table = measure_overlap(
            run,
            store,
            config,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=partial(progress, "layers"),
            stop=stop,
        )
    if table is None:
        print("Stopped; nothing was written.")
        return 0
    median = medians(table)
    print(
        f"Of the tokens on which a feature fires most, {percent(median['target'])} are the same "
        f"when the feature reads the target, and {percent(median['base'])} when it reads the base "
        f"(medians over {table.num_rows:,} features)."
    )
    print(f"plot: {plot_of(Store.open(store or run)).resolve()}")
    return 0


def compare(run: str, other: str, *, n: int = 20, output: str | None = None) -> int:
    """Compare the features of two runs by their numbers, such as those of two stages of a
    fine-tuning, the later of which began as the earlier (train --run.init_from). No model is read.

    Args:
        run: a run with collected features, before
        other: a run whose features were collected over the same texts, after
        n: number of features to list, those whose contribution changed most
        output: folder to write; by default comparison in OTHER
    """
    from fastadapt.features.comparison import PLOT, ROWS, TABLES, changes_table, layers_table, write
    from fastadapt.features.comparison import compare as compare_features
    from fastadapt.io.names import typed_path

    if n < 1:
        raise UserError(f"--n: expected 1 or more, got {n}")
    folder = typed_path(output, "--output") if output else typed_path(other, "run") / "comparison"
    compared = compare_features(run, other)
    write(compared, folder, n)
    for table, left in ((layers_table(compared), False), (changes_table(compared, n), True)):
        print(table.title)
        print_table(table.head, table.rows, left=left)
        print(f"{table.note}\n")
    if not compared.related:
        print(
            "Features of equal numbers are strongest at different tokens, as unrelated features "
            "are: was OTHER trained with --run.init_from RUN?\n"
        )
    for name in (ROWS, TABLES, PLOT):
        print(f"{name}: {(folder / name).resolve()}")
    return 0


def select(
    run: str,
    name: str,
    *,
    overwrite: bool = False,
    config: Annotated[SelectConfig, Typed(flags=True)],
) -> int:
    """Select features by one criterion and save them as a named set; sets can be combined.

    Args:
        run: a run with collected features, or a store
        name: name of the set
        overwrite: replace a set of this name
    """
    from fastadapt.features.store.selection import select as select_features
    from fastadapt.features.store.sets import save_set

    store = Store.open(run)
    features = select_features(store, config)
    path = save_set(store, features, name, overwrite=overwrite)
    print(f"{name}: {len(features):,} features, by layer {_join(features.per_layer())}")
    print(f"{features.expression}")
    print(f"set: {path.resolve()}")
    return 0


def sets(run: str) -> int:
    """List the named sets of features of a store.

    Args:
        run: a run with collected features, or a store
    """
    from fastadapt.features.store.sets import list_sets

    rows = []
    for s in list_sets(Store.open(run)):
        if "broken" in s:
            print(f"{s['name']}: broken: {s['broken']}")
            continue
        stale = "(selected from other adapters: select it again) " if s["stale"] else ""
        rows.append([s["name"], f"{s['size']:,}", _join(s["per_layer"]), f"{stale}{s['made']}"])
    print_table(["set", "features", "by layer", "selected by"], rows, left=True)
    return 0


def _join(values: Any) -> str:
    return ", ".join(map(str, values))


def check(run: str) -> int:
    """Check a store: compare every file with its size and SHA-256 in the manifest, and the rows of
    the tables with each other. Exit code 1 if there is a defect.

    Args:
        run: a run with collected features, or a store
    """
    from fastadapt.features.checking import check_store

    store = Store.open(run, complete=False)
    files = check_store(store)
    rows = []
    for file in files:
        n_rows = "" if file.rows is None else f"{file.rows:,}"
        state = "wrong" if file.wrong else file.note or "ok"
        rows.append([file.name, n_rows, "yes" if file.hashed else "none", state])
    print_table(["file", "rows", "SHA-256", "state"], rows, left=True)
    lines = [f"{file.name}: {line}" for file in files for line in file.wrong]
    if lines:
        raise RunError(
            f"{store.folder}: defects: {len(lines)}. Collect or judge these features again.\n  "
            + "\n  ".join(lines)
        )
    return 0
