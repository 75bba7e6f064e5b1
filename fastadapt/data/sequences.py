"""Conversations as token sequences, all in memory (4 bytes per token)."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.data.rendering import get_family, holds_markers, render_parts
from fastadapt.data.sources import Row, read_rows
from fastadapt.data.tokens import check_ids, check_markers, encode
from fastadapt.errors import UserError

_CHUNK = 128  # conversations handed to the tokenizer at once


@dataclass(frozen=True)
class DataConfig:
    """Where the conversations come from and how they become sequences.

    Attributes:
        train: file (.jsonl, .parquet), folder of such files, or dataset id on the hub.
        validation: likewise; held out.
        family: how a conversation is rendered, a key of ``fastadapt.data.rendering.FAMILIES``.
        max_tokens: longer conversations are left out (and counted), not cut, so that every
            sequence holds its whole reasoning.
        max_validation: at most so many validation sequences, the first ones; None for all.
        train_on_prompt: whether the losses on the output count predictions of prompt tokens too.
        revision: branch, tag or commit of hub datasets.
        train_split: split of a hub dataset or folder to train on.
        validation_split: split of a hub dataset or folder to validate on.
        bucket: batches whose sequences are sorted by length together, so that those of a batch are
            of like length and less is padding; 1: none. Each sequence stays as likely in each
            batch of an epoch. Of use where optimizer.batch_size is above 1.
        workers: processes that make batches ahead of the steps; 0: none, a step makes its own.
            The order, and so every bit, is the same.
    """

    train: str
    validation: str
    family: str = "r1-distill"
    max_tokens: int = 10_000
    max_validation: int | None = None
    train_on_prompt: bool = True
    revision: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    bucket: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        get_family(self.family)
        if self.max_tokens < 2:
            raise UserError(f"data.max_tokens: expected at least 2, got {self.max_tokens}")
        for name, least in (("bucket", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}: expected {least} or more, got {getattr(self, name)}")
        if self.max_validation is not None and self.max_validation < 1:
            raise UserError(
                f"data.max_validation: expected at least 1 or null, got {self.max_validation}"
            )


class Sample(NamedTuple):
    """One sequence.

    Attributes:
        index: its place in its ``Sequences``.
        input_ids: int64 [T].
        labels: int64 [T]; ``input_ids``, with -100 at tokens whose prediction does not count.
            As in transformers, label ``t`` speaks of the prediction made at ``t - 1``.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    input_ids: Tensor
    labels: Tensor


class SequenceCounts(NamedTuple):
    """What became of the conversations of a source.

    Attributes:
        read: conversations read.
        kept: sequences made.
        too_long: left out for having more than ``max_tokens`` tokens.
        tokens: tokens in the kept ones.
        longest: tokens in the longest kept one.
        with_markers: kept ones whose prompt or response has a marker of the family in its text,
            which the tokenizer reads as the marker.
    """

    read: int
    kept: int
    too_long: int
    tokens: int
    longest: int
    with_markers: int = 0


class Sequences(Sequence[Sample]):
    """Token sequences, indexed from 0 in the order of their source.

    Attributes:
        source: the source's name.
        counts: ``SequenceCounts``.
        rows: for each sequence, the place of its conversation in the source, counted from 0.
    """

    def __init__(
        self,
        source: str,
        counts: SequenceCounts,
        tokens: Tensor,
        ends: Sequence[int],
        first_labels: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        self.source = source
        self.counts = counts
        self.rows = rows
        self._tokens = tokens  # int32 [N], all sequences end to end
        self._ends = ends
        self._first_labels = first_labels

    def check_vocabulary(self, n_rows: int) -> None:
        """Refuse tokens that a model has no embedding of.

        Args:
            n_rows: of the model's embedding.

        Raises:
            UserError: names the row of the source, counted from 1, of the first one.
        """
        beyond = (self._tokens >= n_rows).nonzero()[:1, 0].tolist()
        for place in beyond:
            row = self.rows[bisect_right(self._ends, place)]
            check_ids(self._tokens[place : place + 1], n_rows, f"{self.source}, row {row + 1}")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        starts = [0, *self._ends[:-1]]
        return [end - start for start, end in zip(starts, self._ends, strict=True)]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {index}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        input_ids = self._tokens[start : self._ends[index]].to(torch.int64)
        labels = input_ids.clone()
        labels[: self._first_labels[index]] = -100
        return Sample(index, input_ids, labels)


def load_sequences(source: str, tokenizer: Any, config: DataConfig, *, split: str) -> Sequences:
    """Reads, renders and tokenises the conversations of a source.

    A conversation that is malformed stops the loading with an error that says where it stands:
    leaving it out silently would change what a run is trained on. One longer than
    ``config.max_tokens`` is well-formed and is left out; ``Sequences.counts`` has their number.

    Args:
        source: see ``DataConfig.train``.
        tokenizer: the pair's, a transformers tokenizer.
        config: family, limits and loss positions.
        split: "train" or "validation": selects ``config.train_split`` or ``validation_split`` of
            a hub dataset or folder, and whether ``config.max_validation`` applies.

    Raises:
        UserError: the source cannot be read, a conversation is malformed, the tokenizer does not
            know the family's markers, or nothing is left.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    check_markers(tokenizer, config.family)
    name = config.train_split if split == "train" else config.validation_split
    limit = config.max_validation if split == "validation" else None
    rows = read_rows(source, split=name, revision=config.revision)

    tokens, ends, first_labels, kept_rows = array("i"), array("q"), array("q"), array("q")
    read = too_long = longest = with_markers = 0
    shortest_left_out: int | None = None
    for ids, first_label, marked in _tokenised(rows, tokenizer, config):
        read += 1
        if len(ids) > config.max_tokens:
            too_long += 1
            shortest_left_out = min(len(ids), shortest_left_out or len(ids))
            continue
        tokens.extend(ids)
        ends.append(len(tokens))
        first_labels.append(first_label)
        kept_rows.append(read - 1)
        longest = max(longest, len(ids))
        with_markers += marked
        if len(ends) == limit:
            break
    if not read:
        raise UserError(f"data source {source!r} ({split}): it holds no conversation")
    if not ends:
        raise UserError(
            f"data source {source!r} ({split}): all {read} conversations are longer than "
            f"data.max_tokens={config.max_tokens}; the shortest has {shortest_left_out} tokens"
        )
    counts = SequenceCounts(read, len(ends), too_long, len(tokens), longest, with_markers)
    packed = torch.frombuffer(tokens, dtype=torch.int32)
    return Sequences(source, counts, packed, ends, first_labels, kept_rows)


def _tokenised(
    rows: Iterator[Row], tokenizer: Any, config: DataConfig
) -> Iterator[tuple[list[int], int, bool]]:
    """Token ids of each row, the first of them whose prediction counts, and whether markers."""
    while chunk := list(islice(rows, _CHUNK)):
        parts = [_render_row(row, config.family) for row in chunk]
        texts = [prompt + response for prompt, response in parts]
        encoded = encode(tokenizer, texts, offsets=not config.train_on_prompt)
        for i, (where, _) in enumerate(chunk):
            ids = encoded["input_ids"][i]
            if len(ids) < 2:
                raise UserError(
                    f"{where}: the conversation has {len(ids)} token(s); at least 2 are needed"
                )
            first_label = 0
            if not config.train_on_prompt:
                cut = len(parts[i][0])
                first_label = sum(start < cut for start, _ in encoded["offset_mapping"][i])
                if first_label == len(ids):
                    raise UserError(f"{where}: the response has no token")
            yield ids, first_label, holds_markers(texts[i], config.family)


def _render_row(row: Row, family: str) -> tuple[str, str]:
    where, conversation = row
    try:
        return render_parts(conversation, family)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
