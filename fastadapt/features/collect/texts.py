"""Texts to collect from: conversations rendered, tokenised, and labelled with regions, in a file.

Conversations are read in groups of consecutive ones. A group belongs to one shard, and no batch
crosses groups. A text therefore shares its batch with the same texts, and gives the same bits,
whatever the number of shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fastadapt.batch import Batch
from fastadapt.data import sources
from fastadapt.data.batches import batch_by_length, collate_whole
from fastadapt.data.hub import commit_of, load_hub
from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.data.rendered import Rendered, Spec
from fastadapt.data.sources import Policy
from fastadapt.data.tokenised import RowTokeniser
from fastadapt.data.tokens import Encoded, Markers
from fastadapt.errors import UserError
from fastadapt.features.collect.config import DOMAINS, CollectConfig, Shard
from fastadapt.features.collect.feature_stats import SLOTS, BatchTokens
from fastadapt.features.collect.priority_hash import tokens_hash
from fastadapt.features.collect.topk_buffer import place_of
from fastadapt.features.store.regions import regions_of, spans_of, tenths_of
from fastadapt.features.store.schema import REGIONS, TEXTS
from fastadapt.features.store.values import require_valid
from fastadapt.io import parquet
from fastadapt.io.atomic import digest_of_input, replacing
from fastadapt.organism import resolve

GROUP = 64  # conversations


@dataclass(frozen=True)
class Source:
    """A data source of conversations, and how to read it.

    Attributes:
        name: file, folder, hub id, or a name of the embedded pair's data.
        split, revision: split and revision to read, of a folder or of a hub repository.
        family: chat format, see :func:`fastadapt.data.rendering.get_form`.
        n: number of conversations to read; None for all.
        max_tokens: longer conversations are left out.
        subset, columns, bad_rows, markers: see :class:`fastadapt.data.sequences.DataConfig`.
    """

    name: str
    split: str
    revision: str | None
    family: Spec
    n: int | None
    max_tokens: int
    subset: str | None = None
    columns: str | None = None
    bad_rows: Policy = "stop"
    markers: Markers = "text"

    def read_as(self) -> sources.Source:
        """Return the data as a source of :mod:`fastadapt.data`, with settings for reading them."""
        name = resolve(self.name)
        return sources.Source(name, self.split, self.revision, self.subset, self.columns)

    def settings(self) -> dict[str, Any]:
        """Return all settings; those that earlier versions did not know only if they are set."""
        settings = asdict(self)
        for name in ("subset", "columns", "bad_rows", "markers"):
            if settings[name] == getattr(type(self), name):
                del settings[name]
        return settings

    def fingerprint(self) -> str:
        """Return the SHA-256 of all settings, and of local files or of the commit on the hub."""
        files = sources.find_files(resolve(self.name), self.split, self.subset)
        settings = {**self.settings(), **({} if files is None else {"name": None, "split": None})}
        read_as = self.read_as()
        layout, _ = sources.read_contents(read_as, bad=sources.BadRows("skip"))
        if layout is not None and layout.system_columns:
            settings["system_columns"] = layout.system_columns
        if files is None:
            rows = load_hub(read_as.name, self.subset, self.split, self.revision)
            settings["commit"] = commit_of(rows)
        sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in files or ():
            sha256.update(f"{file.name} {digest_of_input(file)}\n".encode())
        return sha256.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """Counts of the texts that :func:`prepare` has written.

    Attributes:
        read: conversations of the source, those of other shards included.
        too_long: conversations of this shard that were left out.
        texts, tokens: numbers of texts and tokens of this shard.
        domains: domains of these texts, sorted.
        with_markers: texts with a marker or another special token in what was said.
        bad_rows: rows that cannot be read, counted by the first shard, and this shard's
            conversations that cannot be rendered; None: the collection was begun by a version
            that did not count them.
    """

    read: int
    too_long: int
    texts: int
    tokens: int
    domains: list[str]
    with_markers: int = 0
    bad_rows: int | None = None


def prepare(
    source: Source, tokenizer: Any, shard: Shard, path: Path, *, max_tokens: int
) -> Prepared:
    """Write this shard's texts into a file of :data:`~fastadapt.features.store.schema.TEXTS`.

    Each row group of the file is one group. ``text`` is the conversation's number in the source.

    Args:
        source: source of the conversations.
        tokenizer: tokenizer of the pair.
        shard: the part of the texts to write.
        path: file to write.
        max_tokens: longer conversations are left out, and counted.

    Raises:
        UserError: the source cannot be read, a conversation is malformed, or the conversations of
            all shards have too many domains.
    """
    tokeniser = RowTokeniser(tokenizer, source.family, markers=source.markers, offsets=True)
    bad = sources.BadRows(source.bad_rows)
    _, rows = sources.read_contents(source.read_as(), optional=["domain"], bad=bad)
    read = too_long = texts = tokens = with_markers = unrendered = 0
    domains: set[str] = set()
    all_domains: set[str] = set()  # of other shards' conversations too
    rows = islice(rows, source.n)
    with replacing(path) as staged, pq.ParquetWriter(staged, TEXTS, compression="zstd") as writer:
        for group, members in groupby(rows, lambda row: row.number // GROUP):
            conversations = list(members)
            read += len(conversations)
            named = (_domain(row.values) for row in conversations)
            all_domains.update(domain for domain in named if domain is not None)
            if len(all_domains) > DOMAINS:
                raise UserError(
                    f"data source {source.name!r}: expected at most {DOMAINS} different values in "
                    f"the column 'domain', got {len(all_domains)} in {read:,} conversations; "
                    "rename the column, or merge domains"
                )
            if group % shard.n != shard.i:
                continue
            n_bad = bad.n
            tokenised = _tokenise(conversations, tokeniser, bad)
            unrendered += bad.n - n_bad
            short = [text for text in tokenised if len(text["tokens"]) <= max_tokens]
            too_long += len(tokenised) - len(short)
            texts += len(short)
            tokens += sum(len(text["tokens"]) for text in short)
            with_markers += sum(text.pop("marked") for text in short)
            domains.update(text["domain"] for text in short if text["domain"] is not None)
            if short:
                writer.write_table(pa.Table.from_pylist(short, schema=TEXTS))
    if not texts and not too_long and shard.n == 1 and bad.n:
        raise UserError(
            f"data source {source.name!r}: none of the conversations can be used; the first error: "
            f"{bad.examples[0]}"
        )
    if not read:
        raise UserError(
            f"data source {source.name!r} holds no conversation; pass another one (--data)"
        )
    bad_rows = unrendered if shard.i else bad.n
    return Prepared(read, too_long, texts, tokens, sorted(domains), with_markers, bad_rows)


def _tokenise(
    rows: list[sources.Row], tokeniser: RowTokeniser, bad: sources.BadRows
) -> list[dict[str, Any]]:
    return [
        {
            "text": row.number,
            "id": str(row.number),
            "domain": _domain(row.values),
            "tokens": encoded.ids,
            "regions": _regions(rendered, encoded),
            "marked": encoded.marked,
        }
        for row, rendered, encoded, _ in tokeniser.tokenise(rows, bad)
    ]


def _regions(rendered: Rendered | None, encoded: Encoded) -> np.ndarray:
    if rendered is None:  # plain text or token ids
        return np.full(len(encoded.ids), REGIONS.index("answer"), dtype=np.int8)
    return regions_of(spans_of(rendered), encoded.offsets)


def _domain(values: dict[str, Any]) -> str | None:
    return text_or_none(values.get("domain"))


class Text(NamedTuple):
    """A prepared text: ``tokens`` int64 ``[T]``, ``regions`` int8 ``[T]``."""

    number: int
    domain: str | None
    tokens: np.ndarray
    regions: np.ndarray


def read_group(path: Path, file: pq.ParquetFile, group: int) -> list[Text]:
    """Return the texts of one row group of a file that :func:`prepare` wrote.

    Raises:
        UserError: the file is damaged, or a column has values that no text has.
    """
    table = parquet.read_group(path, file, group, TEXTS)
    require_valid(path, "texts", table)
    tokens, regions = table["tokens"].combine_chunks(), table["regions"].combine_chunks()
    return [
        Text(
            number,
            domain,
            tokens[i].values.to_numpy().astype(np.int64),
            regions[i].values.to_numpy(),
        )
        for i, (number, domain) in enumerate(
            zip(table["text"].to_pylist(), table["domain"].to_pylist(), strict=True)
        )
    ]


def batches_of(texts: list[Text], batch_tokens: int) -> Iterator[list[Text]]:
    """Yield the batches of a group's texts; texts of a batch are ordered by their numbers."""
    for indices in batch_by_length([len(text.tokens) for text in texts], batch_tokens):
        yield [texts[i] for i in sorted(indices)]


def batch_of(texts: list[Text]) -> Batch:
    """Stack texts into a batch whose labels are all tokens."""
    return collate_whole(text.tokens for text in texts)


def locate_tokens(
    texts: list[Text], domains: list[str], config: CollectConfig, device: torch.device
) -> BatchTokens:
    """Return domain, region, position and window of each token of a batch; padding is arbitrary."""
    longest = max(len(text.tokens) for text in texts)
    slot = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in zip(slot, texts, strict=True):
        tenth = tenths_of(text.regions)
        slots = np.where(tenth >= 0, len(REGIONS) + tenth, text.regions)
        domain = len(domains) if text.domain is None else domains.index(text.domain)
        row[: len(slots)] = domain * SLOTS + slots
    number = torch.tensor([text.number for text in texts], device=device)[:, None]
    length = torch.tensor([len(text.tokens) for text in texts], device=device)[:, None]
    position = torch.arange(longest, device=device)
    row_start = torch.arange(len(texts), device=device)[:, None] * longest
    first = row_start + (position - config.before).clamp(min=0)
    last = row_start + torch.minimum(position + config.after, length - 1)
    return BatchTokens(
        torch.from_numpy(slot).to(device).flatten(),
        place_of(number, position).flatten(),
        tokens_hash(number, position).flatten(),
        first.flatten(),
        last.flatten(),
    )
