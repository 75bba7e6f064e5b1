"""Collect where every unit (feature or neuron) of a run fires: counts, and examples.

Held-out texts pass once through the replacement model, whose adapters return their codes. The
device reduces the codes, without a loop over activations, to counts (by domain, region and tenth
of the thinking), a histogram, and two top-k's per unit: by activation, and by a seeded priority,
which is a uniform draw. Windows are computed only for codes that enter a top-k. The state merges:
shards on several devices or machines, and interrupted and resumed runs, give the store of a single
pass, bit for bit.

Memory beside the model depends on units, not on tokens: 30 examples of 71 tokens take about 9 kB
per unit, and the sums for the scales of a feature (:mod:`.scale_sums`) 136 bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.errors import RunError, UserError
from fastadapt.features.collect import folder as work
from fastadapt.features.collect.collector import Progress, begin, gather, open_run
from fastadapt.features.collect.config import CollectConfig, Shard
from fastadapt.features.collect.feature_stats import FeatureStats
from fastadapt.features.collect.merging import merged_stats, merged_texts, shards_of
from fastadapt.features.collect.tables import check_fires, unit_shapes, write_texts, write_units
from fastadapt.features.collect.texts import Prepared
from fastadapt.features.store.schema import EDGES, MANIFEST, Kind
from fastadapt.features.store.store import Store, write_manifest, writing
from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.names import has_file, inside, typed_path

__all__ = ["CollectConfig", "Shard", "collect", "merge"]


def collect(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    config: CollectConfig | None = None,
    *,
    shard: Shard | tuple[int, int] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> Store | None:
    """Collect a run's features, or resume: the same call continues an interrupted collection.

    Args:
        run: folder of a finished run, or of adapters (``config.data`` is then required).
        folder: folder of the store; by default ``features`` in the run, or ``features-i-of-n``
            for a shard.
        config: the texts to read and the examples to store.
        shard: the part of the texts to read; :func:`merge` then writes the store.
        dtype, device, attention: override the run's settings of the pair.
        trust_remote_code: run Python code that comes with the models.
        overwrite: replace what the folder holds, once the texts are prepared.
        progress: called with (texts done, texts).
        stop: when set, saves the state and returns after the current batch.

    Returns:
        The store; None for a shard, or if stopped.

    Raises:
        UserError: the run has no features or is not finished, the texts cannot be read, or the
            folder holds other files or other settings.
        RunError: no unit fires, an activation is not finite, or the folder cannot be written.
    """
    part = Shard(*(shard or Shard())).checked()
    name = "features" if part.n == 1 else f"features-{part.i}-of-{part.n}"
    out = typed_path(run, "run") / name if folder is None else typed_path(folder, "--output")
    opened = open_run(
        str(run),
        config or CollectConfig(),
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    work.check_folder(out)
    facts = opened.facts(part)
    with writing(out):
        work.sweep(out)
        if not overwrite and _has_no_scales_yet(out):
            opened = replace(opened, config=replace(opened.config, scales=False))
            del facts["settings"]["scales"]
        if not overwrite and (done := _finished(out, facts)):
            return done
        prepared = begin(opened, facts, part, out, anew=overwrite)
        stats = gather(opened, prepared, out, progress=progress, stop=stop)
        if stats is None or part.n > 1:
            return None
        return _finish(out, [out], facts, stats, prepared)


def merge(
    shards: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Store:
    """Merge all shards of a collection into the store that a single pass gives. Loads no model.

    Args:
        shards: folders of the shards, in any order.
        folder: folder of the store.
        overwrite: replace what the folder holds.

    Raises:
        UserError: shards are missing, given twice, unfinished, or of several collections.
        RunError: no unit fires, or the folder cannot be written.
    """
    out = typed_path(folder, "--output")
    parts = shards_of([typed_path(shard, "shard") for shard in shards])
    if os.path.realpath(out) in [os.path.realpath(part.folder) for part in parts]:
        raise UserError(f"{out} is one of the shards to merge; give another folder for the store")
    work.check_folder(out)
    with writing(out):
        work.sweep(out)
        facts = {**parts[0].facts, "shard": list(Shard())}
        del facts["prepared"], facts["units"]
        if not overwrite and (done := _finished(out, facts)):
            return done
        prepared = merged_texts(parts)
        stats = merged_stats(parts, prepared.domains)
        first = parts[0].folder
        copied = {
            name: inside(first, *name.split("/"), source=str(first))
            for name in ["tokens.parquet", *(f"{kind}/lens.parquet" for kind in stats)]
        }
        work.clear(out)
        with disk_errors(out):
            for name, source in copied.items():
                make_folder((out / name).parent)
                with replacing(out / name) as staged:
                    shutil.copyfile(source, staged)
        return _finish(out, [part.folder for part in parts], facts, stats, prepared)


def _finished(out: Path, facts: Mapping[str, Any]) -> Store | None:
    """Return the finished store if its settings match; raise if the folder's settings differ."""
    recorded, store = _recorded(out)
    if recorded is not None and (changes := work.differing(recorded, facts)):
        raise UserError(
            f"{out} holds a collection with other settings ({changes:.300}); pass --overwrite to "
            "replace it, or give another folder"
        )
    return store


def _recorded(out: Path) -> tuple[Mapping[str, Any] | None, Store | None]:
    """Return the facts of the folder's collection, and its store if it is finished."""
    recorded: Mapping[str, Any] | None = work.read_facts(out)
    if recorded is not None or not has_file(out / MANIFEST):
        return recorded, None
    store = Store.open(out)
    return store.manifest.get("collected", {}), store


def _has_no_scales_yet(out: Path) -> bool:
    """Return whether a version that did not know scales wrote the folder's collection."""
    recorded, _ = _recorded(out)
    return recorded is not None and "scales" not in recorded.get("settings", {})


def _finish(
    out: Path,
    parts: Sequence[Path],
    facts: Mapping[str, Any],
    stats: Mapping[Kind, FeatureStats],
    prepared: Prepared,
) -> Store:
    """Write the tables, then the manifest, and remove the files that only collecting needs."""
    texts = write_texts([part / work.WORK / work.TEXTS for part in parts], out / "texts.parquet")
    try:
        for of_kind in stats.values():
            check_fires(of_kind, texts, facts["data"]["name"])
    except RunError:
        work.clear(out)
        raise
    files = [out / "texts.parquet", out / "tokens.parquet"]
    for kind, of_kind in stats.items():
        files += write_units(of_kind, texts, prepared.domains, out / kind)
        files.append(out / kind / "lens.parquet")
    source = facts["data"]
    manifest = {
        "run": facts["run"],
        "adapter": facts["adapter"],
        "pair": facts["pair"],
        "data": {
            "source": source["name"],
            "family": source["family"],
            "digest": texts.digest,
            "texts": len(texts.numbers),
            "tokens": texts.tokens,
            "read": prepared.read,
            "too_long": prepared.too_long,
            "with_markers": prepared.with_markers,
            **({} if prepared.bad_rows is None else {"bad_rows": prepared.bad_rows}),
        },
        "domains": prepared.domains,
        "settings": facts["settings"],
        "units": unit_shapes(stats),
        "lens": {"demeaned": facts["settings"]["demeaned"], "final_norm": False},
        "edges": list(EDGES),
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        "collected": facts,
    }
    with disk_errors(out):
        write_manifest(out, manifest, files)
    work.clear_work(out)
    return Store.open(out)
