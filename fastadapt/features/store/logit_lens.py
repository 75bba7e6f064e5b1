"""The logit lens: which tokens a unit's output row promotes, and which it suppresses.

``lm_head @ W_dec,i``, without the gain of the final norm (arXiv 2602.20904 and the code released
with it). Demeaned, each unit's mean over the vocabulary is subtracted, which a softmax does not see
and which changes no rank: a logit then says how much more a token gets than the average one.

V tokens, D width, F units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
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
_CHUNK_ENTRIES = 2**25  # logits that exist at a time


def token_strings(tokenizer: Any, n: int) -> list[str]:
    """The text of each of the first ``n`` tokens, spaces where a text has them.

    Of a token that is no whole character by itself the bytes are given, as
    :mod:`fastadapt.features.store.characters` does; where they are not known, and of a token
    without text, its name in the vocabulary. One that the tokenizer does not know is ``<id>``.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(min(n, len(tokenizer)))))
    # Behind another token, as in a text: some tokenizers drop a space at the start.
    anchor = next(iter(tokenizer("a", add_special_tokens=False)["input_ids"]), None)
    before = "" if anchor is None else tokenizer.decode([anchor])
    how = {"clean_up_tokenization_spaces": False}
    strings = []
    for i, name in enumerate(names):
        text = tokenizer.decode([i] if anchor is None else [anchor, i], **how)
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode([i], **how)
        if "\ufffd" in text:
            raw = token_bytes(name, tokenizer.decode([i], **how))
            text = "" if raw is None else show_bytes(raw)
        strings.append(text or name)
    return strings + [f"<{i}>" for i in range(len(names), n)]


def write_tokens(strings: list[str], path: Path) -> None:
    """The vocabulary as a table.

    Raises:
        RunError: it cannot be written.
    """
    columns = {"token": pa.array(range(len(strings)), pa.int32()), "string": pa.array(strings)}
    write_table(pa.table(columns), path, TOKENS)


@torch.no_grad()
def lens(head: Tensor, rows: Tensor, *, demeaned: bool = True) -> tuple[Tensor, Tensor]:
    """The tokens at both ends of each unit's logits, in float32.

    Args:
        head: ``[V, D]``.
        rows: ``[F, D]``, what each unit writes.
        demeaned: subtract each unit's mean over the V tokens.

    Returns:
        Token ids int64 and logits float32, ``[F, 2, min(10, V)]`` each: the largest, largest first;
        then the smallest, smallest first. Equal logits: the lowest token first.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    shown = min(SHOWN, len(head))
    head = head.float()
    mean = head.mean(0)
    ids, logits = [], []
    for some in rows.float().split(max(1, _CHUNK_ENTRIES // max(1, len(head)))):
        of = some @ head.T
        if demeaned:
            of -= (some @ mean)[:, None]
        if not of.isfinite().all():
            raise RunError(
                "a logit of the lens is NaN or infinite: the model's head or what the units write "
                "is not finite, or their product overflows"
            )
        ends = [_largest(sign * of, shown) for sign in (1, -1)]
        ids.append(torch.stack(ends, 1))
        logits.append(torch.stack([of.gather(1, end) for end in ends], 1))
    return torch.cat(ids), torch.cat(logits)


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices of each row's k largest, equal ones by lowest index: a cut, then a stable sort."""
    cut = values.topk(k, dim=-1).values[:, -1:]
    # Of those at the cut the lowest, of those above it all; then in order of value.
    rank = torch.where(values > cut, 2, (values == cut).to(torch.int8))
    at_cut = (rank == 1).cumsum(-1) <= k - (rank == 2).sum(-1, keepdim=True)
    kept = (rank == 2) | ((rank == 1) & at_cut)
    index = kept.nonzero()[:, 1].view(len(values), k)
    order = values.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(1, order)


def write_lens(
    model: ReplacementModel, kind: Kind, strings: list[str], path: Path, *, demeaned: bool
) -> None:
    """The lens of every unit of a kind, as a table; of tokens that the tokenizer knows.

    Raises:
        RunError: it cannot be written.
    """
    names = np.array(strings, dtype=object)
    known = min(len(model.head), len(model.pair.tokenizer))

    def layers() -> Iterator[pa.Table]:
        for layer in range(model.n_layers):
            rows = output_rows(model, kind, layer)
            found = lens(model.head[:known], rows, demeaned=demeaned)
            ids, logits = (tensor.cpu().numpy() for tensor in found)
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
