"""Collect, for every unit of a run's layers, where it fires: counts, and examples with windows.

Held-out texts go once through the replacement model, whose adapters hand back their codes. On the
device, without a loop over activations, these become counts (by domain, region and tenth of the
thinking), a histogram, and two k-bests of each unit: by activation, and by a seeded priority, which
makes a draw with equal chance for each. Windows are looked up for those alone that enter. All of it
merges: shards on several devices or machines give the store of one pass, bit for bit, and so does
what was interrupted and resumed.

Memory beside the model depends on units, not on tokens: 30 examples of 71 tokens take some 9 kB a
unit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.errors import RunError, UserError
from fastadapt.features.collect import folder as work
from fastadapt.features.collect.collector import Progress, begin, gather, open_run
from fastadapt.features.collect.config import CollectConfig, Shard
from fastadapt.features.collect.feature_stats import Tally
from fastadapt.features.collect.merging import merged_tallies, merged_texts, shards_of
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
    """Collect a run's features. Called again, it goes on where it was; finished, it does nothing.

    Args:
        run: folder of a finished run, or of adapters (then ``config.data`` is needed).
        folder: of the store; ``features`` in the run if not given, of a shard ``features-i-of-n``.
        config: which texts, and what is kept.
        shard: the part of the texts to read; then :func:`merge` makes the store.
        dtype, device, attention: of the pair, in place of the run's settings.
        trust_remote_code: run Python code that comes with the models.
        overwrite: collect anew, in place of what the folder holds, once the texts are prepared.
        progress: told (texts done, texts).
        stop: ends after the batch at hand; what was collected is kept.

    Returns:
        The store; None of a shard, or where it was stopped.

    Raises:
        UserError: the run has no features or is not finished, the texts cannot be read, or the
            folder holds something else.
        RunError: nothing fires, an activation is not finite, or the folder cannot be written.
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
        if not overwrite and (done := _finished(out, facts)):
            return done
        prepared = begin(opened, facts, part, out, anew=overwrite)
        tallies = gather(opened, prepared, out, progress=progress, stop=stop)
        if tallies is None or part.n > 1:
            return None
        return _finish(out, [out], facts, tallies, prepared)


def merge(
    shards: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Store:
    """Make one store of all shards: the one that a single pass makes. Needs no model.

    Args:
        shards: their folders, in any order.
        folder: of the store.
        overwrite: remove what is in it.

    Raises:
        UserError: shards are missing, given twice, unfinished, or of several collections.
        RunError: nothing fires, or the folder cannot be written.
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
        tallies = merged_tallies(parts, prepared.domains)
        first = parts[0].folder
        copied = {
            name: inside(first, *name.split("/"), source=str(first))
            for name in ["tokens.parquet", *(f"{kind}/lens.parquet" for kind in tallies)]
        }
        work.clear(out)
        with disk_errors(out):
            for name, own in copied.items():
                make_folder((out / name).parent)
                with replacing(out / name) as staged:
                    shutil.copyfile(own, staged)
        return _finish(out, [part.folder for part in parts], facts, tallies, prepared)


def _finished(out: Path, facts: Mapping[str, Any]) -> Store | None:
    """The store, if it is there and of the same; what is there may not be of anything else."""
    begun = work.read_facts(out)
    then: Mapping[str, Any] | None
    there = begun is None and has_file(out / MANIFEST)
    then = Store.open(out).manifest.get("collected", {}) if there else begun
    if then is None:
        return None
    if told := work.differing(then, facts):
        raise UserError(
            f"{out}: what was collected there differs from what is asked for ({told:.300}): "
            "collect again (--overwrite), or give another folder"
        )
    return Store.open(out) if there else None


def _finish(
    out: Path,
    parts: Sequence[Path],
    facts: Mapping[str, Any],
    tallies: Mapping[Kind, Tally],
    prepared: Prepared,
) -> Store:
    """Write the tables, the manifest last, and remove what only collecting needed."""
    texts = write_texts([part / work.WORK / work.TEXTS for part in parts], out / "texts.parquet")
    try:
        for tally in tallies.values():
            check_fires(tally, texts, facts["data"]["name"])
    except RunError:
        work.clear(out)
        raise
    files = [out / "texts.parquet", out / "tokens.parquet"]
    for kind, tally in tallies.items():
        files += write_units(tally, texts, prepared.domains, out / kind)
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
        },
        "domains": prepared.domains,
        "settings": facts["settings"],
        "units": unit_shapes(tallies),
        "lens": {"demeaned": facts["settings"]["demeaned"], "final_norm": False},
        "edges": list(EDGES),
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        "collected": facts,
    }
    with disk_errors(out):
        write_manifest(out, manifest, files)
    work.clear_work(out)
    return Store.open(out)
