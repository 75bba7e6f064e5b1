"""Reads the texts on which the models of a pair are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadapt.data.sequences import DataConfig, SequenceCounts, load_sequences
from fastadapt.data.tokens import check_ids
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.io.documents import read_text
from fastadapt.io.names import has_file
from fastadapt.models.pretrained import encode_text
from fastadapt.organism import resolve


def held_out_texts(
    data: DataConfig, tokenizer: Any, n: int, n_rows: int, longest: int
) -> tuple[list[Text], SequenceCounts]:
    """Return the first ``n`` conversations of ``data.validation``, or fewer if it has fewer.

    Also returned are the counts of the rows that were read, which say how many are left out; see
    :func:`left_out`.

    Args:
        data: source and rendering. ``data.max_validation`` bounds ``n``.
        tokenizer: tokenizer of the pair.
        n: largest number of texts.
        n_rows: rows of the target's embedding.
        longest: number of tokens that the models can read.

    Raises:
        UserError: the source cannot be read or has no text that is short enough, or a token has no
            embedding.
    """
    limit = min(n, data.max_validation or n)
    # The labels are then the responses, or the text if it is no chat.
    data = replace(data, max_validation=limit, loss="assistant")
    source = resolve(data.validation)
    sequences = load_sequences(source, tokenizer, data, split="validation", max_positions=longest)
    sequences.check_vocabulary(n_rows)
    texts = []
    for sample in sequences:
        first, *others = sequences.label_spans[sample.index]
        first = max(1, first)  # no model predicts the first token
        row = str(sequences.rows[sample.index] + 1)
        texts.append(Text(row, sample.input_ids.tolist(), first, spans=(first, *others)))
    return texts, sequences.counts


def left_out(counts: SequenceCounts, longest: int, max_tokens: int) -> list[str]:
    """Return a clause for each reason why rows are left out, without a full stop.

    Args:
        counts: counts of :func:`held_out_texts`.
        longest: number of tokens that the models can read.
        max_tokens: ``data.max_tokens``.

    Example:
        >>> left_out(SequenceCounts(9, 8, 0, 70, 9, bad=1), 512, 10_000)
        ['of the first texts, 1 are left out, since they cannot be read']
    """
    reasons = {
        f"are longer than the context of the models, {longest:,} tokens": counts.beyond_model,
        f"have more than data.max_tokens={max_tokens:,} tokens": counts.too_long,
        "cannot be read": counts.bad,
    }
    return [
        f"of the first texts, {n:,} are left out, since they {reason}"
        for reason, n in reasons.items()
        if n
    ]


def typed_text(text: str, tokenizer: Any, n_rows: int, longest: int) -> Text:
    """Tokenize the text of ``--text``, or of the file that it names, with special tokens.

    Args:
        text: the text, or the path of a file that holds it.
        tokenizer: tokenizer of the pair.
        n_rows: rows of the target's embedding.
        longest: number of tokens that the models can read.

    Raises:
        UserError: the file cannot be read, or the text has fewer than 2 tokens or too many.
    """
    name = "the text"
    if "\n" not in text and has_file(Path(text)):
        name, text = text, read_text(text)
    ids = encode_text(tokenizer, text)
    if len(ids) < 2:
        raise UserError(
            f"--text: expected a text of 2 tokens or more, or a file with one, got {text!r:.40}"
        )
    if len(ids) > longest:
        raise UserError(
            f"--text: expected at most {longest:,} tokens, the context of the models, got "
            f"{len(ids):,}; shorten the text"
        )
    check_ids(ids, n_rows, name)
    return Text(name, ids, len(ids))
