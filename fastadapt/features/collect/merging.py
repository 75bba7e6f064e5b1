"""Several shards' tallies as one: the same that a single pass makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from fastadapt.errors import UserError
from fastadapt.features.collect import folder as work
from fastadapt.features.collect import snapshots
from fastadapt.features.collect.config import CollectConfig
from fastadapt.features.collect.tally import Tally
from fastadapt.features.collect.texts import Prepared
from fastadapt.features.schema import Kind
from fastadapt.pretrained import reading


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
    groups = pq.read_metadata(folder / work.WORK / work.TEXTS).num_row_groups
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
    settings = {**parts[0].facts["settings"]}
    config = CollectConfig(**{**settings, "kinds": tuple(settings["kinds"])})
    tallies: dict[Kind, Tally] = {}
    for part in parts:
        path = part.folder / work.WORK / work.STATE
        own = [domains.index(d) for d in part.facts["prepared"]["domains"]] + [len(domains)]
        with reading("snapshot", str(path)), safe_open(path, framework="pt") as file:
            for kind in config.kinds:
                tensors = snapshots.Prefixed(file, kind)
                if kind not in tallies:
                    shape = part.facts["units"][kind]
                    cpu = torch.device("cpu")
                    tallies[kind] = Tally(kind, tuple(shape), len(domains), config, cpu)
                tallies[kind].absorb(tensors, own)
    return tallies
