"""The logit lens: tokens that a feature's or neuron's output row promotes or suppresses.

The logits are ``lm_head @ W_dec,i``, without the gain of the final norm (arXiv 2602.20904 and the
code released with it). Demeaning subtracts each unit's mean over the vocabulary: softmax and ranks
do not change, and a logit is then relative to the average token.

V tokens, D width, F units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastadapt.errors import RunError
from fastadapt.features.store.characters import show_bytes, token_bytes
from fastadapt.features.store.schema import LENS, TOKENS, Kind
from fastadapt.features.store.store import list_column, write_pieces, write_table
from fastadapt.features.store.units import output_rows
from fastadapt.models.replacement import ReplacementModel

SHOWN = 10  # tokens at either end
_CHUNK_ENTRIES = 2**25  # logits in memory at once


def token_strings(tokenizer: Any, n: int) -> list[str]:
    """Return the text of each token id below ``n``, see :func:`strings_of`."""
    return strings_of(tokenizer, range(n))


def strings_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, with its leading space if it has one.

    A token that holds part of a character is shown by its bytes, see
    :mod:`fastadapt.features.store.characters`. A token whose bytes are not known, or that has no
    text, is shown by its name in the vocabulary; an id beyond the vocabulary as ``<id>``.
    """
    known = len(tokenizer)
    names = iter(tokenizer.convert_ids_to_tokens([i for i in ids if i < known]))
    # Decode each token behind another one: some tokenizers drop a space at the start of a text.
    anchor = next(iter(tokenizer("a", add_special_tokens=False)["input_ids"]), None)
    before = "" if anchor is None else tokenizer.decode([anchor])
    options = {"clean_up_tokenization_spaces": False}
    strings = []
    for i in ids:
        if i >= known:
            strings.append(f"<{i}>")
            continue
        name = next(names)
        text = tokenizer.decode([i] if anchor is None else [anchor, i], **options)
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode([i], **options)
        if "\ufffd" in text:
            raw = token_bytes(name, tokenizer.decode([i], **options))
            text = "" if raw is None else show_bytes(raw)
        strings.append(text or name)
    return strings


def write_tokens(strings: list[str], path: Path) -> None:
    """Write the vocabulary as a table.

    Raises:
        RunError: the table cannot be written.
    """
    columns = {"token": pa.array(range(len(strings)), pa.int32()), "string": pa.array(strings)}
    write_table(pa.table(columns), path, TOKENS)


@torch.no_grad()
def lens(head: Tensor, rows: Tensor, *, demeaned: bool = True) -> tuple[Tensor, Tensor]:
    """Return the tokens of the largest and smallest logits of each unit, computed in float32.

    Args:
        head: ``[V, D]``, the model's ``lm_head``.
        rows: ``[F, D]``, output row of each unit.
        demeaned: subtract each unit's mean over the V tokens.

    Returns:
        Token ids int64 and logits float32, ``[F, 2, min(10, V)]`` each: the largest in descending
        order, then the smallest in ascending order. Of equal logits the lowest token comes first.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    shown = min(SHOWN, len(head))
    head = head.float()
    mean = head.mean(0)
    ids, logits = [], []
    for chunk in rows.float().split(max(1, _CHUNK_ENTRIES // max(1, len(head)))):
        scores = chunk @ head.T
        if demeaned:
            scores -= (chunk @ mean)[:, None]
        if not scores.isfinite().all():
            raise RunError(
                "a logit of the lens is NaN or infinite: the model's head or the units' output "
                "rows are not finite, or their product overflows"
            )
        ends = [_largest(sign * scores, shown) for sign in (1, -1)]
        ids.append(torch.stack(ends, 1))
        logits.append(torch.stack([scores.gather(1, end) for end in ends], 1))
    return torch.cat(ids), torch.cat(logits)


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of each row's k largest, of equal values the lowest index first."""
    # topk breaks ties in any order: take the kth value, all indices above it and the lowest at it.
    cut = values.topk(k, dim=-1).values[:, -1:]
    rank = torch.where(values > cut, 2, (values == cut).to(torch.int8))
    at_cut = (rank == 1).cumsum(-1) <= k - (rank == 2).sum(-1, keepdim=True)
    is_largest = (rank == 2) | ((rank == 1) & at_cut)
    index = is_largest.nonzero()[:, 1].view(len(values), k)
    order = values.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(1, order)


def write_lens(
    model: ReplacementModel, kind: Kind, strings: list[str], path: Path, *, demeaned: bool
) -> None:
    """Write the logit lens of all units of a kind, over the tokenizer's vocabulary, as a table.

    Raises:
        RunError: the table cannot be written.
    """
    names = np.array(strings, dtype=object)
    known = min(len(model.head), len(model.pair.tokenizer))

    def layers() -> Iterator[pa.Table]:
        for layer in range(model.n_layers):
            rows = output_rows(model, kind, layer)
            tensors = lens(model.head[:known], rows, demeaned=demeaned)
            ids, logits = (tensor.cpu().numpy() for tensor in tensors)
            columns: dict[str, Any] = {
                "layer": np.full(len(rows), layer, np.int32),
                "feature": np.arange(len(rows), dtype=np.int32),
            }
            for end, name in enumerate(("promoted", "suppressed")):
                columns[name] = list_column(ids[:, end].astype(np.int32))
                columns[f"{name}_logits"] = list_column(logits[:, end])
                columns[f"{name}_tokens"] = list_column(names[ids[:, end]])
            yield pa.table(columns)

    write_pieces(layers(), path, LENS)
