"""Inspect a source as a run would read it: columns, rendered examples, lengths, left-out rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from fastadapt.data.layouts import Layout
from fastadapt.data.rendered import AUTO, Spec
from fastadapt.data.sequences import DataConfig, refuse_empty
from fastadapt.data.sources import BadRows, Source, read_contents
from fastadapt.data.templates.auto_format import choose
from fastadapt.data.tokenised import RowTokeniser, Tokenised
from fastadapt.data.tokens import check_ids
from fastadapt.errors import UserError

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Example:
    """A row as a run reads it.

    Attributes:
        where: location of the row.
        pieces: consecutive pieces of the text, and whether the losses on the output count them.
        tokens, counted: number of tokens, and of those that are counted.
    """

    where: str
    pieces: list[tuple[str, bool]]
    tokens: int
    counted: int


@dataclass(frozen=True)
class Inspection:
    """What a run would read from a source.

    Attributes:
        layout: what the columns hold.
        form: the chat format.
        no_template: why the tokenizer's chat template is not the format for which auto stands.
        read: rows read.
        lengths: tokens of each text that can be read, too long ones included, in order.
        too_long: number of texts that are too long.
        used: number of texts that a run would use.
        left_out: number of rows by reason.
        with_markers: texts with a marker or another special token in what was said.
        tokens, counted: tokens of the texts that would be used, and those that are counted.
        examples: the first texts.
        bad: messages of the first rows that cannot be read.
    """

    layout: Layout
    form: Spec
    no_template: str | None
    read: int
    lengths: list[int]
    too_long: int
    used: int
    left_out: dict[str, int]
    with_markers: int
    tokens: int
    counted: int
    examples: list[Example]
    bad: list[str]

    def quantiles(self) -> dict[float, int]:
        """Return the lengths at ``QUANTILES``, of all texts that can be read."""
        if not self.lengths:
            return {}
        values = np.quantile(self.lengths, QUANTILES, method="higher")
        return {q: int(value) for q, value in zip(QUANTILES, values, strict=True)}


def inspect_source(
    source: Source,
    tokenizer: Any,
    config: DataConfig,
    *,
    max_positions: int | None = None,
    n_rows: int | None = None,
    rows: int | None = None,
    limit: int | None = None,
    examples: int = 3,
) -> Inspection:
    """Read a source as a run would, and return what the run would use.

    Args:
        source: the data set.
        tokenizer: transformers tokenizer of the pair.
        config: chat format, markers, loss and the largest number of tokens.
        max_positions: tokens that the model can read; None: any number.
        n_rows: rows of the model's embedding; None: any number.
        rows: number of rows to read; None: all.
        limit: number of texts that a run would use, after which it reads no more; None: all.
        examples: number of examples to return.

    Raises:
        UserError: the source cannot be read or has no row that a run would use, or its columns are
            not recognised.
    """
    bad = BadRows("skip")
    layout, contents = read_contents(source, bad=bad)
    kind = RowTokeniser(
        tokenizer, config.family, markers=config.markers, loss=config.loss, offsets=True
    )
    lengths: list[int] = []
    shown: list[Example] = []
    too_long: Counter[str] = Counter()
    used = with_markers = tokens = counted = 0
    is_refused = False
    for each in kind.tokenise(islice(contents, rows), bad):
        n = len(each.encoded.ids)
        reason = _too_long(n, config, max_positions)
        if reason is None and n_rows is not None:
            try:
                check_ids(each.encoded.ids, n_rows, "the text")
            except UserError as error:
                bad.take(UserError(f"{error}; a run refuses the source"), each.row.where)
                is_refused = True
                continue
        lengths.append(n)
        if reason is not None:
            too_long[reason] += 1
            continue
        used, tokens = used + 1, tokens + n
        counted += _count(each)
        with_markers += each.encoded.marked
        if len(shown) < examples:
            shown.append(_example(each, tokenizer))
        if used == limit:
            break
    read = len(lengths) + bad.n
    if layout is None or not used:
        shortest = min(lengths, default=None)
        refuse_empty(f"data source {source.name!r}", read, bad, config, shortest)
    left_out = {**too_long, **bad.counts}
    if is_refused:
        left_out["other rows of a source that a run refuses"] = used
        used = with_markers = tokens = counted = 0
    return Inspection(
        layout,
        kind.form.spec,
        choose(tokenizer).reason if config.family == AUTO else None,
        read,
        lengths,
        too_long.total(),
        used,
        left_out,
        with_markers,
        tokens,
        counted,
        shown,
        bad.examples,
    )


def _too_long(n: int, config: DataConfig, max_positions: int | None) -> str | None:
    """Return why a text of ``n`` tokens is left out, or None if it is not."""
    if n > config.max_tokens:
        return f"more than data.max_tokens={config.max_tokens:,} tokens"
    if max_positions is not None and n > max_positions:
        return f"more tokens than the model can read, {max_positions:,}"
    return None


def form_name(spec: Spec) -> str:
    """Describe a chat format in words.

    Example:
        >>> form_name("qwen"), form_name({"template": "{{ messages }}"})
        ('the family qwen', "the tokenizer's chat template")
    """
    if isinstance(spec, str):
        return f"the family {spec}" if spec != AUTO else spec
    return "the tokenizer's chat template" if "template" in spec else "an inline family"


def _count(each: Tokenised) -> int:
    return sum(each.labels[1::2]) - sum(each.labels[::2])


def _example(each: Tokenised, tokenizer: Any) -> Example:
    """Split a row's text into what the loss counts and the rest; token ids are decoded."""
    ids = each.encoded.ids
    bounds = sorted({0, *each.labels, len(ids)})
    spans = list(zip(each.labels[::2], each.labels[1::2], strict=True))
    pieces = []
    for start, end in pairwise(bounds):
        is_counted = any(a <= start and end <= b for a, b in spans)
        if each.rendered is None:
            text = tokenizer.decode(ids[start:end])
        else:
            offsets = each.encoded.offsets
            begin = offsets[start][0] if start else 0
            until = offsets[end][0] if end < len(ids) else len(each.rendered.text)
            text = each.rendered.text[begin:until]
        pieces.append((text, is_counted))
    return Example(each.row.where, pieces, len(ids), _count(each))
