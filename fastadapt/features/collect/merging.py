"""Merge shards of a collection into the statistics that a single pass gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastadapt.errors import UserError
from fastadapt.features.collect import folder as work
from fastadapt.features.collect import snapshots
from fastadapt.features.collect.feature_stats import FeatureStats, wrong_values
from fastadapt.features.collect.texts import Prepared
from fastadapt.features.store.schema import TEXTS, Kind
from fastadapt.io.parquet import open_parquet
from fastadapt.io.tensors import open_tensors


class Part(NamedTuple):
    """A finished shard: its folder, and the facts of its collection."""

    folder: Path
    facts: work.Facts


def shards_of(folders: Sequence[Path]) -> list[Part]:
    """Return all shards of one collection, in order.

    Raises:
        UserError: a shard is missing, given twice, not finished, or of a different collection.
    """
    if not folders:
        raise UserError("expected the folders of shards to merge, got none")
    parts: dict[int, Part] = {}
    for folder in folders:
        facts = work.read_facts(folder)
        if facts is None:
            raise UserError(
                f"{folder} holds no shard: expected {work.WORK}/{work.FACTS} in it; collect it "
                "(fastadapt features collect --shard i/n)"
            )
        i, n = facts["shard"]
        first = next(iter(parts.values()), Part(folder, facts))
        if changes := work.differing(_shared(first.facts), _shared(facts)):
            raise UserError(
                f"{folder} and {first.folder} are not shards of one collection: {changes:.300}; "
                "give only shards with equal settings"
            )
        if n != (wanted := first.facts["shard"][1]) or i in parts:
            raise UserError(
                f"{folder}: expected a different shard of {wanted} in each folder, got {i}/{n}"
                f"{' again' if i in parts else ''}"
            )
        parts[i] = Part(folder, facts)
        _check_finished(folder, f"{i}/{n}")
    wanted = first.facts["shard"][1]
    if missing := sorted(set(range(wanted)) - set(parts)):
        raise UserError(
            f"expected all {wanted} shards to merge; "
            f"{', '.join(f'{i}/{wanted}' for i in missing)} missing; give their folders too"
        )
    return [parts[i] for i in range(wanted)]


def _shared(facts: work.Facts) -> work.Facts:
    """Return the facts that shards have in common; paths may differ by machine."""
    shared = {key: facts[key] for key in ("adapter", "models", "settings")}
    return {**shared, "data": {"fingerprint": facts["data"]["fingerprint"]}}


def _check_finished(folder: Path, shard: str) -> None:
    state = folder / work.WORK / work.STATE
    with open_parquet(folder / work.WORK / work.TEXTS, TEXTS) as file:
        groups = file.num_row_groups
    if not state.is_file() or snapshots.cursor_of(state).group < groups:
        raise UserError(
            f"{folder}: shard {shard} is not finished; re-run its command without --overwrite to "
            "resume"
        )


def merged_texts(parts: Sequence[Part]) -> Prepared:
    """Return the counts of texts, tokens and conversations of all shards together."""
    each = [Prepared(**part.facts["prepared"]) for part in parts]
    bad_rows = [texts.bad_rows for texts in each if texts.bad_rows is not None]
    return Prepared(
        each[0].read,  # every shard counts the whole source
        sum(texts.too_long for texts in each),
        sum(texts.texts for texts in each),
        sum(texts.tokens for texts in each),
        sorted({domain for texts in each for domain in texts.domains}),
        sum(texts.with_markers for texts in each),
        sum(bad_rows) if len(bad_rows) == len(each) else None,
    )


def merged_stats(parts: Sequence[Part], domains: Sequence[str]) -> dict[Kind, FeatureStats]:
    """Return the statistics of all shards, counted by the domains of all their texts."""
    config = work.config_of(parts[0].folder, parts[0].facts)
    merged: dict[Kind, FeatureStats] = {}
    for part in parts:
        path = part.folder / work.WORK / work.STATE
        indices = [domains.index(d) for d in part.facts["prepared"]["domains"]] + [len(domains)]
        with open_tensors(path) as file:
            for kind in config.kinds:
                shape = _shape(part, kind)
                # On "meta", without memory: damaged facts may claim more than fits.
                like = FeatureStats(kind, shape, len(indices) - 1, config, torch.device("meta"))
                snapshots.require_like(file, kind, like, path)
                tensors = dict(snapshots.Prefixed(file, kind))
                for name in wrong_values(tensors, like):
                    raise UserError(
                        f"{path}: tensor {kind}.{name} has impossible values; collect this shard "
                        "again"
                    )
                if kind not in merged:
                    cpu = torch.device("cpu")
                    merged[kind] = FeatureStats(kind, shape, len(domains), config, cpu)
                if shape != (merged[kind].n_layers, merged[kind].n_features):
                    raise UserError(
                        f"{part.folder}: units.{kind}: expected the shape of the other shards, "
                        f"got {shape}; collect this shard again"
                    )
                merged[kind].merge(tensors, indices)
    return merged


def _shape(part: Part, kind: Kind) -> tuple[int, int]:
    shape = part.facts["units"].get(kind)
    if shape is None:
        raise UserError(
            f"{part.folder / work.WORK / work.FACTS}: units: expected {kind}, which is among "
            "settings.kinds, got none"
        )
    return int(shape[0]), int(shape[1])
