"""Several shards' tallies as one: the same that a single pass makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastadapt.errors import UserError
from fastadapt.features.collect import folder as work
from fastadapt.features.collect import snapshots
from fastadapt.features.collect.feature_stats import Tally, wrong_values
from fastadapt.features.collect.texts import Prepared
from fastadapt.features.store.schema import TEXTS, Kind
from fastadapt.io.parquet import open_parquet
from fastadapt.io.tensors import open_tensors


class Part(NamedTuple):
    """A finished shard: its folder, and what it says of itself."""

    folder: Path
    facts: work.Facts


def shards_of(folders: Sequence[Path]) -> list[Part]:
    """All shards of one collection, in order.

    Raises:
        UserError: some are missing, given twice, not finished, or of another collection.
    """
    if not folders:
        raise UserError("expected the folders of shards to merge, got none")
    found: dict[int, Part] = {}
    for folder in folders:
        facts = work.read_facts(folder)
        if facts is None:
            raise UserError(
                f"{folder} holds no shard: expected {work.WORK}/{work.FACTS} in it "
                "(fastadapt features collect --shard i/n)"
            )
        i, n = facts["shard"]
        first = next(iter(found.values()), Part(folder, facts))
        if told := work.differing(_same(first.facts), _same(facts)):
            raise UserError(f"{folder} and {first.folder} are not shards of one: {told:.300}")
        if n != first.facts["shard"][1] or i in found:
            raise UserError(
                f"{folder}: expected another part of {first.facts['shard'][1]}, got {i}/{n}"
            )
        found[i] = Part(folder, facts)
        _check_finished(folder, f"{i}/{n}")
    wanted = first.facts["shard"][1]
    if missing := sorted(set(range(wanted)) - set(found)):
        raise UserError(
            f"expected all {wanted} shards to merge; "
            f"{', '.join(f'{i}/{wanted}' for i in missing)} missing"
        )
    return [found[i] for i in range(wanted)]


def _same(facts: work.Facts) -> work.Facts:
    """What all shards agree in; where models and data lie may differ by machine."""
    alike = {key: facts[key] for key in ("adapter", "models", "settings")}
    return {**alike, "data": {"fingerprint": facts["data"]["fingerprint"]}}


def _check_finished(folder: Path, shard: str) -> None:
    state = folder / work.WORK / work.STATE
    with open_parquet(folder / work.WORK / work.TEXTS, TEXTS) as file:
        groups = file.num_row_groups
    if not state.is_file() or snapshots.cursor_of(state).group < groups:
        raise UserError(f"{folder}: shard {shard} is not finished; collect it again, it goes on")


def merged_texts(parts: Sequence[Part]) -> Prepared:
    """What is known of the texts of all shards."""
    each = [Prepared(**part.facts["prepared"]) for part in parts]
    return Prepared(
        each[0].read,  # the whole source, by each of them
        sum(own.too_long for own in each),
        sum(own.texts for own in each),
        sum(own.tokens for own in each),
        sorted({domain for own in each for domain in own.domains}),
        sum(own.with_markers for own in each),
    )


def merged_tallies(parts: Sequence[Part], domains: Sequence[str]) -> dict[Kind, Tally]:
    """The sum of all shards, by the domains of all their texts."""
    config = work.config_of(parts[0].folder, parts[0].facts)
    tallies: dict[Kind, Tally] = {}
    for part in parts:
        path = part.folder / work.WORK / work.STATE
        own = [domains.index(d) for d in part.facts["prepared"]["domains"]] + [len(domains)]
        with open_tensors(path) as file:
            for kind in config.kinds:
                shape = _shape(part, kind)
                # Without memory: what the facts say may be more than there is.
                like = Tally(kind, shape, len(own) - 1, config, torch.device("meta"))
                snapshots.require_like(file, kind, like, path)
                tensors = dict(snapshots.Prefixed(file, kind))
                for name in wrong_values(tensors, like):
                    raise UserError(f"{path}: tensor {kind}.{name}: it has values that cannot be")
                if kind not in tallies:
                    tallies[kind] = Tally(kind, shape, len(domains), config, torch.device("cpu"))
                if shape != (tallies[kind].n_layers, tallies[kind].n_features):
                    raise UserError(f"{part.folder}: units.{kind}: another shape than the others'")
                tallies[kind].absorb(tensors, own)
    return tallies


def _shape(part: Part, kind: Kind) -> tuple[int, int]:
    shape = part.facts["units"].get(kind)
    if shape is None:
        raise UserError(
            f"{part.folder / work.WORK / work.FACTS}: units: expected {kind}, which is among "
            "settings.kinds, got none"
        )
    return int(shape[0]), int(shape[1])
