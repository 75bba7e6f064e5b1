"""Measures output KL with the first n, the last n, or one layer replaced, for every n at once.

For L layers there are 3L - 3 distinct models of this kind beside the target. Run one by one, they
cost 3L² - 3L block passes of a batch. Here, shared passes are run once:

- *target*: L passes, which are counted separately.
- *last n*: branches off the target at layer L - n and uses replaced blocks up to the last layer.
  With the full replacement: L + (L-1) + ... + 1 = L(L+1)/2 passes.
- *first n*: branches off the full replacement after n layers, and uses the target's blocks for the
  remaining ones: (L-1) + ... + 1 = L(L-1)/2 passes.
- *single l*: branches off the *last n* stream that begins at layer l, after that layer, and uses
  the target's blocks for the remaining ones. Layer 0 alone is *first 1* and layer L - 1 alone is
  *last 1*; the others need (L-2) + ... + 1 = (L-1)(L-2)/2 passes.

The sum is ``L² + (L-1)(L-2)/2``: about L²/2 passes per family, half the cost of one by one. Streams
at the same layer that use the same kind of block are run as one batch. The norm before the head
belongs to the last layer: if that layer is replaced, a norm of the compared model is used.

B texts, T tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.outputs import check_finite, open_stores
from fastadapt.evaluation.faithfulness.partial_results import Arrays, iter_missing
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.traversal import Stream, carrying, final_norm

Family = Literal["first", "last", "single"]
FAMILIES: tuple[Family, ...] = ("first", "last", "single")
_SCHEMA = 1


@dataclass(frozen=True)
class PartialConfig:
    """Settings of partial replacement. They change results only by rounding.

    Args:
        batch_tokens: tokens of a batch, padding included. A longer text is a separate batch.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        streams_at_once: number of streams that go through a block, and through the head, together.
            It multiplies the memory of a block. The states of all streams take ``3L - 2`` times
            tokens times width beside that. For 28 layers, 7,500 tokens, width 3,584 and bfloat16,
            the states take 4.4 GB, and each product of an MLP of width 18,944 takes 2.3 GB for 8
            streams.
    """

    batch_tokens: int = 4096
    chunk_tokens: int = 1024
    streams_at_once: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "chunk_tokens", "streams_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"partial.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Partial:
    """Sums of one model over the predicting positions of each of n texts, on the CPU.

    Attributes:
        kl: by family, float64 ``[n, L+1]`` (``single``: ``[n, L]``): KL(target ‖ model) in nats
            with the first or last 0..L layers, or layer 0..L-1 alone, replaced.
        wrong: by family, int64 of the same shapes: number of positions whose most likely token
            differs from the target's.
        positions: int64 ``[n]``: number of predicting positions.
        block_passes: block passes per batch, without the target's.
    """

    kl: dict[Family, Tensor]
    wrong: dict[Family, Tensor]
    positions: Tensor
    block_passes: int


def block_passes(n_layers: int) -> int:
    """Return the number of block passes per batch, without the target's: ``L² + (L-1)(L-2)/2``.

    Example:
        >>> block_passes(28)
        1135
    """
    return n_layers**2 + (n_layers - 1) * (n_layers - 2) // 2


class _End(NamedTuple):
    """Hidden states after the last block, and the stream whose mode and adapters it used."""

    hidden: Tensor
    stream: Stream


_TARGET = Stream("target")


def measure_partial(
    models: ModelSet,
    texts: Sequence[Text],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    config: PartialConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Partial]:
    """Measure each model's KL with only the first n, last n or one layer replaced.

    Stored measurements are read.

    Arguments and errors are those of
    :func:`fastadapt.evaluation.faithfulness.outputs.measure_output`, but ``names`` must not have
    the base, whose blocks do not share the target's attention; default: all other models.
    """
    config = config or PartialConfig()
    names = [n for n in models.compared if n != "base"] if names is None else list(names)
    if "base" in names:
        raise UserError(
            "replacement by layers: expected models with the target's attention, got the base; "
            "leave it out of names"
        )
    batches = batches_of(texts, config.batch_tokens)
    facts = ("partial", _SCHEMA, digest_of(texts), *vars(config).values())
    n_layers = models.model.n_layers
    sums = (len(texts), 2 * n_layers - 1 + max(0, n_layers - 2))  # 3L - 3, but 1 for L = 1
    arrays: Arrays = {
        "kl": (torch.float64, sums),
        "wrong": (torch.int64, sums),
        "positions": (torch.int64, (len(texts),)),
    }
    stores = open_stores(models, names, folder, facts, len(batches), lambda _: arrays)
    for i, (name,) in iter_missing(stores, 1, progress, stop):
        batch = batch_of(texts, batches[i]).to(models.model.device)
        tensors = _measure(models.model, batch, models.stream(name), config)
        check_finite(name, tensors["kl"], [texts[j].id for j in batches[i]])
        stores[name].add(i, tensors)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    predicted = torch.tensor([len(text.ids) - 1 for text in texts])
    measured: dict[str, Partial] = {}
    for name, store in stores.items():
        if store.missing():
            continue
        tensors = {key: values[order] for key, values in store.read().items()}
        if not torch.equal(tensors["positions"], predicted):
            raise store.damaged("tensor 'positions': expected one less than each text's tokens")
        if bool((tensors["wrong"] < 0).any() or (tensors["wrong"] > predicted[:, None]).any()):
            raise store.damaged("tensor 'wrong': expected counts from 0 to each text's positions")
        measured[name] = _split_families(tensors)
    return measured


@torch.no_grad()
def _measure(
    model: ReplacementModel, batch: Batch, stream: Stream, config: PartialConfig
) -> dict[str, Tensor]:
    """Return sums of KL and of top-1 errors, ``[B, 3L-3]``, by text and by choice of layers.

    The choices are the first 1..L, the last 1..L-1, and each of layers 1..L-2 alone: layers 0
    and L-1 alone are the first and the last one.
    """
    clean, ends = _ends(model, batch, stream, config.streams_at_once)
    predicts = batch.real[:, 1:] & batch.real[:, :-1]

    def final(end: _End) -> Tensor:
        return final_norm(model, end.hidden[:, :-1][predicts], end.stream)

    teacher = final(_End(clean, _TARGET))
    text = torch.arange(len(predicts), device=predicts.device).repeat_interleave(predicts.sum(1))
    kl: list[Tensor] = []
    wrong: list[Tensor] = []
    for first in range(0, len(ends), config.streams_at_once):
        got = linear_kl(
            teacher,
            [final(end) for end in ends[first : first + config.streams_at_once]],
            model.head,
            softcap=model.softcap,
            chunk_tokens=config.chunk_tokens,
        )
        for sums, values in ((kl, got.token_kl.double()), (wrong, (~got.token_top1).long())):
            sums.append(values.new_zeros(len(values), len(predicts)).index_add_(1, text, values))
    return {
        "kl": torch.cat(kl).T.cpu(),
        "wrong": torch.cat(wrong).T.cpu(),
        "positions": predicts.sum(1).cpu(),
    }


def _ends(
    model: ReplacementModel, batch: Batch, stream: Stream, at_once: int
) -> tuple[Tensor, list[_End]]:
    """Return the target's last states, and those of every partial replacement in _measure's order.

    ``restored`` holds the streams that are back on the target's blocks: *first n* by n, *single l*
    by -l, and the target itself by 0. ``replaced`` holds the streams on replaced blocks, by the
    layer at which they branched off the target.
    """
    n_layers, ids, attention = model.n_layers, batch.input_ids, batch.attention_mask
    inputs = {1: model.block_inputs(ids, attention)}

    def run(layer: int, states: dict[int, Tensor], mode: Mode) -> dict[int, Tensor]:
        """Run one block on all states. Empties ``states``, so that no state is in memory twice."""
        out: dict[int, Tensor] = {}
        keys = list(states)
        for first in range(0, len(keys), at_once):
            chunk = keys[first : first + at_once]
            n = len(chunk)
            if n not in inputs:
                mask = None if attention is None else attention.repeat(n, 1)
                inputs[n] = model.block_inputs(ids.repeat(n, 1), mask)
            hidden = torch.cat([states.pop(key) for key in chunk])
            hidden, _ = model.block(layer, hidden, inputs[n].arguments[layer], mode)
            out.update(zip(chunk, hidden.chunk(n), strict=True))
        return out

    clean = inputs[1].hidden
    restored: dict[int, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    with carrying(model, stream.adapters):
        for layer in range(n_layers):
            replaced[layer] = restored[0] = clean
            restored = run(layer, restored, "target")
            clean = restored.pop(0)
            replaced = run(layer, replaced, stream.mode)
            if layer + 1 < n_layers:
                restored[layer + 1] = replaced[0]
                if layer > 0:
                    restored[-layer] = replaced[layer]
            model.reshard_layer(layer)
    first = [_End(restored[n], _TARGET) for n in range(1, n_layers)] + [_End(replaced[0], stream)]
    last = [_End(replaced[n_layers - n], stream) for n in range(1, n_layers)]
    single = [_End(restored[-layer], _TARGET) for layer in range(1, n_layers - 1)]
    return clean, first + last + single


def _split_families(tensors: dict[str, Tensor]) -> Partial:
    """Split sums into first n, last n and single layers, which share some of the replacements."""

    def spread(sums: Tensor) -> dict[Family, Tensor]:
        n_layers = sums.shape[1] // 3 + 1
        none = torch.zeros_like(sums[:, :1])
        first, last, single = sums.split([n_layers, n_layers - 1, max(0, n_layers - 2)], 1)
        full = first[:, -1:]
        alone = [first[:, :1], single, last[:, :1]] if n_layers > 1 else [full]
        return {
            "first": torch.cat([none, first], 1),
            "last": torch.cat([none, last, full], 1),
            "single": torch.cat(alone, 1),
        }

    kl = spread(tensors["kl"])
    passes = block_passes(kl["single"].shape[1])
    return Partial(kl, spread(tensors["wrong"]), tensors["positions"], passes)
