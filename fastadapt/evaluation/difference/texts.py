"""Reads the texts on which the models of a pair are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadapt.batch import IGNORE
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.data.tokens import check_ids
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.io.documents import read_text
from fastadapt.io.names import has_file
from fastadapt.models.pretrained import encode_text
from fastadapt.organism import resolve


def held_out_texts(
    data: DataConfig, tokenizer: Any, n: int, n_rows: int, longest: int
) -> tuple[list[Text], int]:
    """Return the first ``n`` conversations of ``data.validation``, or fewer if it has fewer.

    Conversations longer than the models can read are left out; their number is returned too.

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
    # The labels then begin with the first response, or with the text if it is no chat.
    data = replace(data, max_validation=limit, loss="assistant")
    source = resolve(data.validation)
    sequences = load_sequences(source, tokenizer, data, split="validation", max_positions=longest)
    sequences.check_vocabulary(n_rows)
    texts = [
        Text(
            str(sequences.rows[sample.index] + 1),
            sample.input_ids.tolist(),
            max(1, int((sample.labels != IGNORE).nonzero()[0])),
        )
        for sample in sequences
    ]
    return texts, sequences.counts.beyond_model


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
