"""Measures how far every hybrid's predictions are from the target's, at every position of texts.

P predicting positions of all texts, n texts, C combinations of parts, L layers, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.evaluation.difference.parts import Part, TwoModels, combinations
from fastadapt.evaluation.faithfulness.outputs import check_finite, join_heads
from fastadapt.evaluation.faithfulness.partial_results import PartialResults, iter_missing
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of
from fastadapt.kernels.linear_kl import LinearKLOutput, linear_kl
from fastadapt.models.block_inputs import record_module_inputs

_SCHEMA = 1  # version of the arrays; files of other versions are not read
#: The parts of which single layers are taken from the base.
BY_LAYER: tuple[Part, ...] = ("mlps", "attention")


@dataclass(frozen=True)
class DifferenceConfig:
    """Settings of the measurement of a pair's difference.

    Args:
        n: largest number of texts, from the start of the data.
        positions: number of positions to list, those where target and base differ most.
        ranks: whether to compute the ranks of the changes of matrices. They take about a second for
            each matrix of a 7B model on a GPU.
        batch_tokens: tokens of a batch, padding included. A longer text is a separate batch.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        models_at_once: number of hybrids whose last states are in memory together.
    """

    n: int = 100
    positions: int = 20
    ranks: bool = True
    batch_tokens: int = 4096
    chunk_tokens: int = 1024
    models_at_once: int = 8

    def __post_init__(self) -> None:
        for name, least in (
            ("n", 1),
            ("positions", 0),
            ("batch_tokens", 1),
            ("chunk_tokens", 1),
            ("models_at_once", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(
                    f"where.{name}: expected {least} or more, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Measured:
    """Measurements of all hybrids on n texts, as arrays on the CPU.

    Attributes:
        kl: floating ``[P, C]``: KL(target ‖ hybrid) in nats, of each combination of
            :func:`fastadapt.evaluation.difference.parts.combinations`, at the positions of text 0,
            then 1, ...
        agrees: bool ``[P, C]``: whether the most likely tokens agree.
        text: int64 ``[P]``: index of each position's text.
        position: int64 ``[P]``: index in the text, from 0. A position predicts the next token.
        layer_kl: float64 ``[n, 2, L]``: KL with one layer's MLP (0) or attention (1) of the base,
            summed over the positions of each text.
        layer_wrong: int64 ``[n, 2, L]``: numbers of positions whose most likely tokens differ.
        gamma: float64 ``[L]``: ``‖mean‖ / ‖standard deviation‖`` of the inputs of the target's
            MLPs, over all tokens but the first of each text.
    """

    kl: Tensor
    agrees: Tensor
    text: Tensor
    position: Tensor
    layer_kl: Tensor
    layer_wrong: Tensor
    gamma: Tensor


def measure(
    models: TwoModels,
    texts: Sequence[Text],
    folder: Path,
    fingerprint: str,
    *,
    config: DifferenceConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Measured | None:
    """Measure all hybrids on texts, or read the stored measurements.

    Args:
        models: the two models.
        texts: texts of at least two tokens.
        folder: stores one file per batch, and one file when all batches are measured.
        fingerprint: digest of the weights, dtype and settings of the models.
        config: settings.
        progress: called with (completed batches, total batches).
        stop: set it to stop after the current batch.

    Returns:
        The measurements; None if stopped before all batches were measured.

    Raises:
        UserError: a text cannot be measured, or a stored file is damaged.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    config = config or DifferenceConfig()
    batches = batches_of(texts, config.batch_tokens)
    facts = ("where", _SCHEMA, digest_of(texts), config.batch_tokens, config.chunk_tokens)
    digest = hashlib.sha256(repr((facts, models.parts, fingerprint)).encode()).hexdigest()
    n, n_layers, positions = len(texts), models.n_layers, sum(len(t.ids) - 1 for t in texts)
    head = models.head("target")
    floating = torch.float64 if head.dtype == torch.float64 else torch.float32
    store = PartialResults(
        folder,
        "parts",
        digest,
        len(batches),
        {
            "kl": (floating, (positions, 1 << len(models.parts))),
            "agrees": (torch.bool, (positions, 1 << len(models.parts))),
            "layer_kl": (torch.float64, (n, len(BY_LAYER), n_layers)),
            "layer_wrong": (torch.int64, (n, len(BY_LAYER), n_layers)),
            "moments": (torch.float64, (len(batches), n_layers, 2, head.shape[1])),
            "counts": (torch.int64, (len(batches),)),
        },
    )
    for i, _ in iter_missing({"parts": store}, 1, progress, stop):
        batch = batch_of(texts, batches[i]).to(models.device)
        tensors = _measure(models, batch, config)
        check_finite("a hybrid", tensors["kl"], [texts[j].id for j in batches[i]])
        store.add(i, {key: values.cpu() for key, values in tensors.items()})
    if store.missing():
        return None
    return _in_order(store.read(), torch.tensor([i for b in batches for i in b]), texts)


class _Taking(NamedTuple):
    """Parts, and the layer, that a hybrid takes from the base; see :meth:`TwoModels.taking`."""

    parts: tuple[Part, ...]
    layer: int | None = None


@torch.no_grad()
def _measure(models: TwoModels, batch: Batch, config: DifferenceConfig) -> dict[str, Tensor]:
    """Return the arrays of one batch, in the order of its texts."""
    predicts = batch.real[:, 1:] & batch.real[:, :-1]
    with models.taking(()), record_module_inputs(*models.mlps) as inputs:
        teacher = models.hidden(batch)[:, :-1][predicts]
    counted = batch.real.clone()
    counted[:, 0] = False
    moments = [_moments(x[counted]) for x in inputs]
    inputs.clear()

    parts = [_Taking(hybrid.parts) for hybrid in combinations(models.parts)[1:]]
    layers = [_Taking((part,), layer) for part in BY_LAYER for layer in range(models.n_layers)]
    compare = _Comparison(models, batch, predicts, teacher, config)
    kl, agrees = compare(parts)
    layer_kl, layer_agrees = compare(layers)
    by_text = torch.arange(len(predicts), device=kl.device).repeat_interleave(predicts.sum(1))

    def sums(values: Tensor) -> Tensor:
        summed = values.new_zeros(len(values), len(predicts)).index_add_(1, by_text, values)
        return summed.T.reshape(len(predicts), len(BY_LAYER), models.n_layers)

    return {
        "kl": torch.cat([torch.zeros_like(kl[:1]), kl]).T,  # the target itself first
        "agrees": torch.cat([torch.ones_like(agrees[:1]), agrees]).T,
        "layer_kl": sums(layer_kl.double()),
        "layer_wrong": sums((~layer_agrees).long()),
        "moments": torch.stack(moments)[None],
        "counts": counted.sum()[None],
    }


def _moments(x: Tensor) -> Tensor:
    """Return the sums of ``x [N, D]`` and of its squares over tokens: float64 ``[2, D]``."""
    wide = x.double()
    return torch.stack([wide.sum(0), wide.square().sum(0)])


@dataclass(frozen=True)
class _Comparison:
    """Compares hybrids with the target on one batch."""

    models: TwoModels
    batch: Batch
    predicts: Tensor
    teacher: Tensor
    config: DifferenceConfig

    def __call__(self, takings: Sequence[_Taking]) -> tuple[Tensor, Tensor]:
        """Return KL and top-1 agreement of S hybrids at P positions, ``[S, P]`` each."""
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for of_base in (False, True):
            same_head = [i for i, t in enumerate(takings) if self._has_base_head(t) == of_base]
            for first in range(0, len(same_head), self.config.models_at_once):
                group = same_head[first : first + self.config.models_at_once]
                got = self._kl([self._states(takings[i]) for i in group], of_base)
                rows |= zip(group, zip(got.token_kl, got.token_top1, strict=True), strict=True)
        kl, agrees = zip(*(rows[i] for i in range(len(takings))), strict=True)
        return torch.stack(kl), torch.stack(agrees)

    def _has_base_head(self, taking: _Taking) -> bool:
        return "embeddings" in taking.parts and not self.models.has_one_head

    def _states(self, taking: _Taking) -> Tensor:
        with self.models.taking(taking.parts, taking.layer):
            return self.models.hidden(self.batch)[:, :-1][self.predicts]

    def _kl(self, states: list[Tensor], of_base: bool) -> LinearKLOutput:
        teacher, head = self.teacher, self.models.head("target")
        if of_base:
            teacher, states, head = join_heads(teacher, states, head, self.models.head("base"))
        return linear_kl(
            teacher,
            states,
            head,
            softcap=self.models.softcap,
            chunk_tokens=self.config.chunk_tokens,
        )


def _in_order(tensors: dict[str, Tensor], order: Tensor, texts: Sequence[Text]) -> Measured:
    """Sort arrays in the order of batches into the order of ``texts``."""
    batched = torch.tensor([len(text.ids) - 1 for text in texts])[order]
    text = order.repeat_interleave(batched)
    position = torch.cat([torch.arange(n) for n in batched.tolist()])
    sort, given = text.argsort(stable=True), order.argsort()
    mean, square = (tensors["moments"].sum(0) / tensors["counts"].sum()).unbind(1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return Measured(
        kl=tensors["kl"][sort],
        agrees=tensors["agrees"][sort],
        text=text[sort],
        position=position[sort],
        layer_kl=tensors["layer_kl"][given],
        layer_wrong=tensors["layer_wrong"][given],
        gamma=mean.norm(dim=1) / deviation.norm(dim=1),
    )
