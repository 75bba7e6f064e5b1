"""Load conversations as token sequences into host memory (4 bytes per token)."""

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

_CHUNK = 128  # conversations per call of the tokenizer
#: Default of ``data.pad_to`` on a GPU, where cuDNN builds a plan of attention for each new length.
GPU_MULTIPLE = 128


@dataclass(frozen=True)
class DataConfig:
    """Sources of conversations, and settings that turn them into sequences.

    Attributes:
        train: training data: file (.jsonl, .parquet), folder of such files, or dataset id on the
            hub.
        validation: held-out data: file, folder or dataset id.
        family: template of the text, a key of ``fastadapt.data.rendering.FAMILIES``.
        max_tokens: leave out (and count) longer conversations. They are not cut, so that every
            sequence holds its whole reasoning.
        max_validation: largest number of validation sequences, taken from the start; None for all.
        train_on_prompt: whether the losses on the output include predictions of prompt tokens.
        revision: branch, tag or commit of hub datasets.
        train_split: split of a hub dataset or folder to train on.
        validation_split: split of a hub dataset or folder to validate on.
        bucket: number of batches whose sequences are sorted together by length, which reduces
            padding if optimizer.batch_size is above 1; 1: no sorting. Each sequence stays equally
            likely in each batch of an epoch.
        pad_to: pad the batches of a run on the right to a multiple of this number of tokens, so
            that few lengths occur; 1: no more than the longest sequence. Null: 128 on a GPU, where
            each new length costs time, 1 elsewhere. Padding changes losses and gradients by
            rounding only.
        workers: processes that prepare batches ahead of the steps; 0: prepare them in the training
            process. The order and every bit of a run stay the same.
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
    pad_to: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        get_family(self.family)
        if self.max_tokens < 2:
            raise UserError(f"data.max_tokens: expected at least 2, got {self.max_tokens}")
        for name, least in (("bucket", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}: expected {least} or more, got {getattr(self, name)}")
        if self.pad_to is not None and self.pad_to < 1:
            raise UserError(f"data.pad_to: expected at least 1 or null, got {self.pad_to}")
        if self.max_validation is not None and self.max_validation < 1:
            raise UserError(
                f"data.max_validation: expected at least 1 or null, got {self.max_validation}"
            )

    def multiple(self, device_type: str) -> int:
        """Return the number of tokens of which the width of every batch is a multiple.

        Example:
            >>> data = DataConfig("train.jsonl", "validation.jsonl")
            >>> data.multiple("cuda"), data.multiple("cpu")
            (128, 1)
        """
        if self.pad_to is not None:
            return self.pad_to
        return GPU_MULTIPLE if device_type == "cuda" else 1


class Sample(NamedTuple):
    """One token sequence.

    Attributes:
        index: index of the sequence in its ``Sequences``.
        input_ids: int64 [T].
        labels: int64 [T]; ``input_ids``, with -100 at tokens that are no target of the loss. As in
            transformers, label ``t`` is the target of the prediction made at ``t - 1``.
    """

    index: int  # type: ignore[assignment]  # replaces tuple.index
    input_ids: Tensor
    labels: Tensor


class SequenceCounts(NamedTuple):
    """Counts of the conversations and sequences of a source.

    Attributes:
        read: conversations read.
        sequences: sequences loaded.
        too_long: conversations left out because they have more than ``max_tokens`` tokens.
        tokens: tokens of all sequences.
        longest: tokens of the longest sequence.
        with_markers: sequences whose prompt or response contains a marker of the family. The
            tokenizer reads it as a marker.
    """

    read: int
    sequences: int
    too_long: int
    tokens: int
    longest: int
    with_markers: int = 0


class Sequences(Sequence[Sample]):
    """Token sequences in the order of their source.

    Attributes:
        source: name of the source.
        counts: ``SequenceCounts`` of the source.
        rows: row of the source of each sequence, counted from 0.
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
        """Check that the model has an embedding for every token.

        Args:
            n_rows: rows of the model's embedding.

        Raises:
            UserError: a token is ``n_rows`` or more; the message names the first row of the source
                with such a token, counted from 1.
        """
        for index in (self._tokens >= n_rows).nonzero()[:1, 0].tolist():
            row = self.rows[bisect_right(self._ends, index)]
            check_ids(self._tokens[index : index + 1], n_rows, f"{self.source}, row {row + 1}")

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
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
    """Read, render and tokenize the conversations of a source.

    A malformed conversation is an error: leaving it out silently would change the training data. A
    conversation longer than ``config.max_tokens`` is left out and counted in ``Sequences.counts``.

    Args:
        source: see ``DataConfig.train``.
        tokenizer: transformers tokenizer of the pair.
        config: family, limits and loss positions.
        split: "train" or "validation". Selects ``config.train_split`` or ``validation_split`` of
            a hub dataset or folder. ``config.max_validation`` applies to "validation" only.

    Raises:
        UserError: the source cannot be read or has no conversation, a conversation is malformed,
            all are too long, or the tokenizer does not know the family's markers.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    check_markers(tokenizer, config.family)
    name = config.train_split if split == "train" else config.validation_split
    limit = config.max_validation if split == "validation" else None
    rows = read_rows(source, split=name, revision=config.revision)

    tokens, ends, first_labels, sequence_rows = array("i"), array("q"), array("q"), array("q")
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
        sequence_rows.append(read - 1)
        longest = max(longest, len(ids))
        with_markers += marked
        if len(ends) == limit:
            break
    if not read:
        raise UserError(f"data source {source!r} ({split}): expected conversations, got none")
    if not ends:
        raise UserError(
            f"data source {source!r} ({split}): all {read} conversations are longer than "
            f"data.max_tokens={config.max_tokens}; the shortest has {shortest_left_out} tokens"
        )
    counts = SequenceCounts(read, len(ends), too_long, len(tokens), longest, with_markers)
    packed = torch.frombuffer(tokens, dtype=torch.int32)
    return Sequences(source, counts, packed, ends, first_labels, sequence_rows)


def _tokenised(
    rows: Iterator[Row], tokenizer: Any, config: DataConfig
) -> Iterator[tuple[list[int], int, bool]]:
    """Yield the token ids of each row, the first index of a label, and :func:`holds_markers`."""
    while chunk := list(islice(rows, _CHUNK)):
        parts = [_render_row(row, config.family) for row in chunk]
        texts = [prompt + response for prompt, response in parts]
        encoded = encode(tokenizer, texts, offsets=not config.train_on_prompt)
        for i, (where, _) in enumerate(chunk):
            ids = encoded["input_ids"][i]
            if len(ids) < 2:
                raise UserError(
                    f"{where}: the conversation has {len(ids)} token(s); at least 2 are needed. "
                    "Remove the row"
                )
            first_label = 0
            if not config.train_on_prompt:
                cut = len(parts[i][0])
                first_label = sum(start < cut for start, _ in encoded["offset_mapping"][i])
                if first_label == len(ids):
                    raise UserError(f"{where}: the response has no token; remove the row")
            yield ids, first_label, holds_markers(texts[i], config.family)


def _render_row(row: Row, family: str) -> tuple[str, str]:
    where, conversation = row
    try:
        return render_parts(conversation, family)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
