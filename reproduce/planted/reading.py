"""Read what models do at the positions of texts whose next word a model writes, and at no others.

What a model predicts within prompts is neither planted nor ever written. N such positions of all
texts, V tokens, D width, F features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.models.block_inputs import record_module_inputs
from fastadapt.models.replacement import ReplacementModel
from reproduce.planted.differences import Text

_BATCH = 64


@dataclass(frozen=True)
class Probes:
    """Texts, and the positions in them that are read.

    Attributes:
        rows: token ids of each text.
        read: the positions of each text that are read.
        token, following: int64 ``[N]``, the token at each position and the one after it.
        planted: bool ``[K, N]``, whether the next word is planted, by difference.
    """

    rows: list[list[int]]
    read: list[list[int]]
    token: Tensor
    following: Tensor
    planted: Tensor

    @classmethod
    def locate(
        cls, texts: Sequence[Text], vocabulary: dict[str, int], n_differences: int
    ) -> Probes:
        """Return the positions of texts."""
        rows = [[vocabulary[word] for word in text.words] for text in texts]
        read = [
            [t for t in range(text.start - 1, len(text.words) - 1) if t not in text.unread]
            for text in texts
        ]
        each = [(row, t) for row, positions in zip(rows, read, strict=True) for t in positions]
        marks = [
            text.planted.get(t, -1)
            for text, positions in zip(texts, read, strict=True)
            for t in positions
        ]
        return cls(
            rows,
            read,
            token=torch.tensor([row[t] for row, t in each]),
            following=torch.tensor([row[t + 1] for row, t in each]),
            planted=torch.tensor(marks) == torch.arange(n_differences)[:, None],
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token ids, int64 ``[B, T]``, and which positions are read, bool ``[B, T]``.

        Causal attention: padding on the right needs no mask, and is not read.
        """
        for first in range(0, len(self.rows), _BATCH):
            rows = self.rows[first : first + _BATCH]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            is_read = torch.zeros_like(ids, dtype=torch.bool)
            for mask, positions in zip(is_read, self.read[first : first + _BATCH], strict=True):
                mask[positions] = True
            yield ids, is_read


@torch.no_grad()
def read(
    model: Any, probes: Probes, modules: Sequence[nn.Module] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Return what a model predicts, and what enters each of ``modules``.

    Returns:
        Log-probabilities of the next token, float32 ``[N, V]``, and the modules' inputs ``[N, D]``.
    """
    log_p: list[Tensor] = []
    entering: list[list[Tensor]] = [[] for _ in modules]
    for ids, is_read in probes.batches():
        with ExitStack() as recording:
            inputs = [recording.enter_context(record_module_inputs(m)) for m in modules]
            logits = model(input_ids=ids, use_cache=False).logits
        log_p.append(logits[is_read].float().log_softmax(-1))
        for parts, (entered,) in zip(entering, inputs, strict=True):
            parts.append(entered[is_read])
    return torch.cat(log_p), [torch.cat(parts) for parts in entering]


@torch.no_grad()
def read_features(model: ReplacementModel, probes: Probes) -> list[Tensor]:
    """Return the activations of each layer's features: float32 ``[N, F]``."""
    layers: list[list[Tensor]] = [[] for _ in model.adapters]
    for ids, is_read in probes.batches():
        for parts, codes in zip(layers, model.features(ids), strict=True):
            dense = torch.zeros(ids.numel(), model.n_features)
            dense[codes.tokens, codes.features] = codes.values
            parts.append(dense[is_read.flatten()])
    return [torch.cat(parts) for parts in layers]
