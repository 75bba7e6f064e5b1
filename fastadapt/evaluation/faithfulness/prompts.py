"""Reads the prompts of held-out conversations."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.data.rendering import render_parts
from fastadapt.data.sources import COLUMN, read_values
from fastadapt.data.tokens import check_markers, encode
from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, read_yaml
from fastadapt.io.names import has_file


class Prompt(NamedTuple):
    """The rendered prompt of a held-out conversation.

    Attributes:
        id: index of the conversation in its source.
        ids: tokens of the prompt.
        domain: domain of the problem, if the data have that column.
    """

    id: str
    ids: list[int]
    domain: str | None


class HeldOut(NamedTuple):
    """A run's validation data, as named in its ``config.yaml``."""

    source: str
    split: str
    revision: str | None
    family: str


class _DataSection(TypedDict):
    validation: str
    validation_split: str
    revision: str | None
    family: str


class _RunFile(TypedDict):
    data: _DataSection


def held_out(run: Path) -> HeldOut | None:
    """Return the held-out data of a run; None if the folder has no ``config.yaml``.

    Raises:
        UserError: the configuration cannot be read.
    """
    path = run / "config.yaml"
    if not has_file(path):
        return None
    try:
        data = read_yaml(path, _RunFile)["data"]
    except DocumentError as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error
    return HeldOut(data["validation"], data["validation_split"], data["revision"], data["family"])


def load_prompts(
    source: str,
    tokenizer: Any,
    family: str,
    n: int,
    *,
    split: str = "validation",
    revision: str | None = None,
) -> list[Prompt]:
    """Return the prompts of the first ``n`` conversations of a source, rendered as in training.

    Args:
        source, split, revision: see :func:`fastadapt.data.sources.read_rows`.
        tokenizer: tokenizer of the pair.
        family: a key of :data:`fastadapt.data.rendering.FAMILIES`.
        n: largest number of prompts.

    Raises:
        UserError: the source cannot be read or is empty, or a conversation is malformed.
    """
    check_markers(tokenizer, family)
    rows = list(islice(read_values(source, split=split, revision=revision, optional=["domain"]), n))
    if not rows:
        raise UserError(
            f"data source {source!r} holds no conversation; give another one (--texts.prompts)"
        )
    texts, domains = [], []
    for where, values in rows:
        try:
            texts.append(render_parts(values[COLUMN], family)[0])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        domains.append(text_or_none(values.get("domain")))
    encoded = encode(tokenizer, texts)["input_ids"]
    return [
        Prompt(str(i), list(ids), domain)
        for i, (ids, domain) in enumerate(zip(encoded, domains, strict=True))
    ]
