"""Rendered text to token ids: the one call of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastadapt.data.rendering import get_family
from fastadapt.errors import UserError


def encode(tokenizer: Any, texts: Sequence[str], *, offsets: bool = False) -> Any:
    """``{"input_ids": [[...], ...]}`` of rendered texts, and ``offset_mapping`` if asked for.

    Nothing is added, cut or padded, whatever the tokenizer is set to.
    """
    return tokenizer(
        list(texts),
        add_special_tokens=False,  # BOS is in the text
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def check_markers(tokenizer: Any, family: str) -> None:
    """Raise ``UserError`` where a marker of the family is not one token of the tokenizer."""
    for marker in get_family(family).markers:
        ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"data.family={family!r}: the tokenizer does not know its marker {marker!r} as one "
                "token; choose the family of this pair"
            )


def check_ids(ids: Sequence[int] | Tensor, n_rows: int, name: str) -> None:
    """Refuse tokens that a model has no embedding of: tokens added without resizing the model.

    Args:
        ids: at least one; on the host.
        n_rows: of the model's embedding.
        name: of the text, for the message.

    Raises:
        UserError: an id is ``n_rows`` or more.

    Example:
        >>> check_ids([3, 40], 40, "row 2")
        Traceback (most recent call last):
            ...
        fastadapt.errors.UserError: row 2: token 40 has no embedding, of which the model has 40. \
Resize the model's embedding to the tokenizer, or leave such texts out
    """
    highest = int(ids.max()) if isinstance(ids, Tensor) else max(ids)
    if highest >= n_rows:
        raise UserError(
            f"{name}: token {highest:,} has no embedding, of which the model has {n_rows:,}. "
            "Resize the model's embedding to the tokenizer, or leave such texts out"
        )
