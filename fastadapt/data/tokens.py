"""Encode rendered text as token ids, and check these against tokenizer and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastadapt.data.rendering import get_family
from fastadapt.errors import UserError


def encode(tokenizer: Any, texts: Sequence[str], *, offsets: bool = False) -> Any:
    """Encode rendered texts without special tokens, truncation or padding.

    Args:
        tokenizer: a transformers tokenizer. Its settings for truncation and padding are ignored.
        texts: rendered texts, BOS included.
        offsets: also return ``offset_mapping``, the first and last character of each token.

    Returns:
        ``{"input_ids": [[...], ...]}``, a list of ids per text.
    """
    return tokenizer(
        list(texts),
        add_special_tokens=False,  # BOS is in the text
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def check_markers(tokenizer: Any, family: str) -> None:
    """Raise ``UserError`` if a marker of the family is not one token of the tokenizer."""
    for marker in get_family(family).markers:
        ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"data.family={family!r}: the tokenizer does not know its marker {marker!r} as one "
                "token; give the family of this pair"
            )


def check_ids(ids: Sequence[int] | Tensor, n_rows: int, name: str) -> None:
    """Check that the model has an embedding for every token.

    Tokens that were added to a tokenizer without resizing the model have none.

    Args:
        ids: at least one id, in host memory.
        n_rows: rows of the model's embedding.
        name: name of the text in the message.

    Raises:
        UserError: an id is ``n_rows`` or more.

    Example:
        >>> check_ids([3, 40], 40, "row 2")
        Traceback (most recent call last):
            ...
        fastadapt.errors.UserError: row 2: expected tokens below 40, the rows of the model's \
embedding, got token 40. Resize the embedding to the tokenizer, or leave such texts out
    """
    highest = int(ids.max()) if isinstance(ids, Tensor) else max(ids)
    if highest >= n_rows:
        raise UserError(
            f"{name}: expected tokens below {n_rows:,}, the rows of the model's embedding, got "
            f"token {highest:,}. Resize the embedding to the tokenizer, or leave such texts out"
        )
