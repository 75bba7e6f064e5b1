"""Load texts as token sequences into host memory (4 bytes per token)."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from fastadapt.data.rendered import AUTO
from fastadapt.data.rendering import get_form
from fastadapt.data.sources import BadRows, MixedSource, Policy, Source, located, read_contents
from fastadapt.data.tokenised import Loss, RowTokeniser
from fastadapt.data.tokens import Markers, check_ids
from fastadapt.errors import UserError, require

#: Default of ``data.pad_to`` on a GPU, where cuDNN builds a plan of attention for each new length.
GPU_MULTIPLE = 128


_BAD_ROW_HINT = " (--data.bad_rows skip leaves such rows out)"


@dataclass(frozen=True)
class DataConfig:
    """Sources of texts, and settings that turn them into sequences.

    Attributes:
        train: training data: file (.jsonl, .json, .csv, .parquet), folder of such files or of a
            dataset saved by ``datasets``, or dataset id on the hub. Rows are conversations
            (``messages``, ``conversations``), a prompt and a response, plain text, or token ids. In
            a file also a mixture: a list of {source, weight, split, revision, subset, columns}, of
            which source alone is required; weights are shares of the training tokens.
        validation: held-out data: file, folder or dataset id.
        family: chat format. auto: the tokenizer's chat template where it writes every turn as it
            is, else the family that the tokenizer knows. Families: r1-distill, qwen, qwq, qwen3,
            llama3, llama2, mistral, olmo2, phi3, glm4, gemma, gemma4; text: no conversations. In a
            file also a mapping: user and assistant: [before, after], and system, system_inside,
            tool, tool_next, bos, lead, between, thinking, opening, markers.
        columns: column to read; prompt,response; or system,messages. Null: recognised by name.
        loss: tokens that the losses on the output count: all; assistant, the assistant's turns;
            thinking, the assistant's reasoning. Plain text and token ids count as a whole.
        bad_rows: what happens to a row that cannot be read or rendered. stop: an error; skip: leave
            such rows out, and count them.
        markers: special tokens inside what was said: text, they stay text; tokens, they become
            tokens, as in versions without this setting.
        max_tokens: leave out (and count) longer texts. They are not cut, so that every sequence
            holds its whole reasoning.
        max_validation: largest number of validation sequences, taken from the start; None for all.
        revision: branch, tag or commit of hub datasets.
        subset: configuration of hub datasets, or folder within folders.
        train_split: split of a hub dataset or folder to train on.
        validation_split: split of a hub dataset or folder to validate on.
        bucket: number of batches whose sequences are sorted together by length, which reduces
            padding if optimizer.batch_size is above 1; 1: no sorting. Each sequence stays equally
            likely in each batch of an epoch.
        pad_to: pad the batches of a run on the right to a multiple of this number of tokens, so
            that few lengths occur; 1: no more than the longest sequence. Null: 128 on a GPU, where
            each new length costs time, 1 elsewhere. Padding changes losses and gradients by
            rounding only.
        pack: put several texts of a batch into a row, one after the other, up to this number of
            tokens or the longest text's, each with its own positions and attention; null: a text a
            row. Reduces padding if optimizer.batch_size is above 1. Texts count as they do apart,
            so losses and gradients change by rounding only.
        workers: processes that prepare batches ahead of the steps; 0: prepare them in the training
            process. The order and every bit of a run stay the same.
    """

    train: str | tuple[MixedSource, ...]
    validation: str
    family: str | dict[str, Any] = AUTO
    columns: str | None = None
    loss: Loss = "all"
    bad_rows: Policy = "stop"
    markers: Markers = "text"
    max_tokens: int = 10_000
    max_validation: int | None = None
    revision: str | None = None
    subset: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    bucket: int = 1
    pad_to: int | None = None
    pack: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.family != AUTO:
            get_form(self.family)
        for name, choices in (("loss", Loss), ("bad_rows", Policy), ("markers", Markers)):
            known, value = get_args(choices), getattr(self, name)
            require(value in known, f"data.{name}", f"one of {', '.join(known)}", value)
        if not isinstance(self.train, str):
            require(len(self.train) > 0, "data.train", "at least one source", [])
            if self.bucket > 1:
                raise UserError(
                    f"data.bucket: expected 1 with several sources, whose shares sorting would "
                    f"change, got {self.bucket}"
                )
        if self.max_tokens < 2:
            raise UserError(f"data.max_tokens: expected at least 2, got {self.max_tokens}")
        for name, least in (("bucket", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}: expected {least} or more, got {getattr(self, name)}")
        for name, least in (("pad_to", 1), ("pack", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name}: expected at least {least} or null, got {value}")
        if self.max_validation is not None and self.max_validation < 1:
            raise UserError(
                f"data.max_validation: expected at least 1 or null, got {self.max_validation}"
            )

    def located(self) -> DataConfig:
        """Return the settings with absolute paths of local sources, as a run records them."""
        train = self.train
        if not isinstance(train, str):
            train = tuple(replace(part, source=located(part.source)) for part in train)
        else:
            train = located(train)
        return replace(self, train=train, validation=located(self.validation))

    def source(self, name: str, split: str, part: MixedSource | None = None) -> Source:
        """Return a source of a split, with the settings for reading it.

        Args:
            name: file, folder or dataset id.
            split: "train" or "validation".
            part: source of a mixture, whose settings come first.
        """
        chosen = self.train_split if split == "train" else self.validation_split
        how = Source(name, chosen, self.revision, self.subset, self.columns)
        if part is None:
            return how
        return Source(
            name,
            part.split or how.split,
            part.revision or how.revision,
            part.subset or how.subset,
            part.columns or how.columns,
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
    """Counts of the rows and sequences of a source.

    Attributes:
        read: rows read.
        sequences: sequences loaded.
        too_long: texts left out because they have more than ``max_tokens`` tokens.
        tokens: tokens of all sequences.
        longest: tokens of the longest sequence.
        with_markers: sequences with a marker or another special token in what was said.
        beyond_model: texts left out because the model has fewer positions than they have tokens.
        bad: rows left out because they cannot be read or rendered.
        counted: tokens that the losses on the output count.
    """

    read: int
    sequences: int
    too_long: int
    tokens: int
    longest: int
    with_markers: int = 0
    beyond_model: int = 0
    bad: int = 0
    counted: int = 0


class Sequences(Sequence[Sample]):
    """Token sequences in the order of their source.

    Attributes:
        source: name of the source.
        counts: ``SequenceCounts`` of the source.
        rows: row of the source of each sequence, counted from 0.
        bad: the rows that were left out.
        unread: columns, and keys of turns, that some programs read, and this one does not.
    """

    def __init__(
        self,
        source: str,
        counts: SequenceCounts,
        tokens: Tensor,
        ends: Sequence[int],
        label_spans: Sequence[Sequence[int]],
        rows: Sequence[int],
        bad: BadRows | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.counts = counts
        self.rows = rows
        self.tokens = tokens  # int32 [N], all sequences end to end
        self._ends = ends
        self.label_spans = label_spans  # first token and end, for each stretch of labels
        self.bad = bad or BadRows()
        self.unread = list(unread)

    def check_vocabulary(self, n_rows: int) -> None:
        """Check that the model has an embedding for every token.

        Args:
            n_rows: rows of the model's embedding.

        Raises:
            UserError: a token is ``n_rows`` or more; the message names the first row of the source
                with such a token, counted from 1.
        """
        for index in (self.tokens >= n_rows).nonzero()[:1, 0].tolist():
            row = self.rows[bisect_right(self._ends, index)]
            check_ids(self.tokens[index : index + 1], n_rows, f"{self.source}, row {row + 1}")

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
        starts = [0, *self._ends[:-1]]
        return [end - start for start, end in zip(starts, self._ends, strict=True)]

    def ids_with(self, lengths: Collection[int]) -> Iterator[bytes]:
        """Yield the token ids of the sequences that have one of these lengths, as int32."""
        tokens, start = self.tokens.numpy(), 0
        for end in self._ends:
            if end - start in lengths:
                yield tokens[start:end].tobytes()
            start = end

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {index}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        input_ids = self.tokens[start : self._ends[index]].to(torch.int64)
        spans = self.label_spans[index]
        if tuple(spans) == (0, len(input_ids)):
            return Sample(index, input_ids, input_ids.clone())
        labels = torch.full_like(input_ids, -100)
        for first, end in zip(spans[::2], spans[1::2], strict=True):
            labels[first:end] = input_ids[first:end]
        return Sample(index, input_ids, labels)


def count_repeated(held_out: Sequences, train: Sequences) -> int:
    """Return the number of held-out sequences whose token ids are also a training sequence."""
    lengths = set(held_out.lengths)
    counts = Counter(held_out.ids_with(lengths))
    repeated = {ids for ids in train.ids_with(lengths) if ids in counts}
    return sum(counts[ids] for ids in repeated)


def load_sequences(
    source: str,
    tokenizer: Any,
    config: DataConfig,
    *,
    split: str,
    max_positions: int | None = None,
    part: MixedSource | None = None,
) -> Sequences:
    """Read, render and tokenize the texts of a source.

    A row that cannot be read is an error, or left out and counted (``config.bad_rows``). A text
    longer than ``config.max_tokens`` or than the model can read is left out and counted in
    ``Sequences.counts``.

    Args:
        source: see ``DataConfig.train``.
        tokenizer: transformers tokenizer of the pair.
        config: family, limits and loss positions.
        split: "train" or "validation". Selects ``config.train_split`` or ``validation_split`` of
            a hub dataset or folder. ``config.max_validation`` applies to "validation" only.
        max_positions: tokens that the model can read; None: any number.
        part: source of a mixture, whose settings come before those of ``config``.

    Raises:
        UserError: the source cannot be read or has no text, a row is malformed, all texts are too
            long, or the tokenizer does not know the family's markers.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    limit = config.max_validation if split == "validation" else None
    bad = BadRows(config.bad_rows, _BAD_ROW_HINT)
    tokens, ends, sequence_rows = array("i"), array("q"), array("q")
    label_spans: list[array[int]] = []
    read = too_long = beyond_model = longest = with_markers = counted = 0
    shortest_left_out: int | None = None
    tokeniser = RowTokeniser(tokenizer, config.family, markers=config.markers, loss=config.loss)
    layout, rows = read_contents(config.source(source, split, part), bad=bad)
    for row, _, encoded, labels in tokeniser.tokenise(rows, bad):
        read += 1
        n = len(encoded.ids)
        beyond = max_positions is not None and n > max_positions
        if n > config.max_tokens or beyond:
            too_long += n > config.max_tokens
            beyond_model += n <= config.max_tokens
            shortest_left_out = min(n, shortest_left_out or n)
            continue
        tokens.extend(encoded.ids)
        ends.append(len(tokens))
        label_spans.append(array("i", labels))
        counted += sum(labels[1::2]) - sum(labels[::2])
        sequence_rows.append(row.number)
        longest = max(longest, n)
        with_markers += encoded.marked
        if len(ends) == limit:
            break
    read += bad.n
    if not ends:
        refuse_empty(f"data source {source!r} ({split})", read, bad, config, shortest_left_out)
    counts = SequenceCounts(
        read,
        len(ends),
        too_long,
        len(tokens),
        longest,
        with_markers,
        beyond_model,
        bad.n,
        counted,
    )
    packed = torch.frombuffer(tokens, dtype=torch.int32)
    unread = layout.unread(significant=True) if layout else []
    return Sequences(source, counts, packed, ends, label_spans, sequence_rows, bad, unread)


def refuse_empty(
    source: str, read: int, bad: BadRows, config: DataConfig, shortest: int | None
) -> NoReturn:
    """Raise the ``UserError`` that says why a source has no text to train on.

    Args:
        source: description of the source.
        read: rows read.
        bad: rows that cannot be used.
        config: largest number of tokens.
        shortest: tokens of the shortest text that is too long; None if none is.
    """
    if not read:
        raise UserError(f"{source}: expected at least one conversation or text, got none")
    if shortest is None:
        raise UserError(f"{source}: none of {read} rows can be used; the first: {bad.examples[0]}")
    if shortest > config.max_tokens:
        raise UserError(
            f"{source}: of {read} rows none fits into data.max_tokens={config.max_tokens}: the "
            f"shortest has {shortest} tokens"
        )
    raise UserError(
        f"{source}: of {read} rows none fits into the model's context (max_position_embeddings): "
        f"the shortest has {shortest} tokens"
    )
