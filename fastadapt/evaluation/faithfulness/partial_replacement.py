"""Output KL when the first n, the last n, or one single layer is replaced, for every n at once.

Of L layers there are 3L - 3 such models that are neither the target nor each other, and run one by
one they cost L blocks each: 3L² - 3L block passes of a batch. Here, what they share is run once:

- the target, L passes, which are counted apart;
- *last n* leaves the target at layer L - n and stays on the student's blocks to the end: the full
  replacement and those that begin later, L + (L-1) + ... + 1 = L(L+1)/2 passes;
- *first n* leaves the full replacement after layer n and stays on the target's blocks:
  (L-1) + ... + 1 = L(L-1)/2;
- *single l* begins with the first block of the *last n* stream that begins there, then the
  target's. The first layer alone is *first 1*, the last layer alone *last 1*, and the others need
  (L-2) + ... + 1 = (L-1)(L-2)/2.

In all ``L² + (L-1)(L-2)/2``, about L²/2 for each of the three, and half of the one by one. Streams
at the same layer on the same kind of block are one batch. The norm before the head goes with the
last layer: where that one is replaced, and the student has a norm of its own, it is the student's.

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
from fastadapt.evaluation.faithfulness.outputs import check_finite, stores_of
from fastadapt.evaluation.faithfulness.partial_results import Arrays, unfinished
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of
from fastadapt.evaluation.models_under_test import Students
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.traversal import Stream, carrying, final_norm

Family = Literal["first", "last", "single"]
FAMILIES: tuple[Family, ...] = ("first", "last", "single")
_SCHEMA = 1


@dataclass(frozen=True)
class PartialConfig:
    """How the measuring is done; values depend on it by rounding only.

    Args:
        batch_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
        chunk_tokens: tokens whose logits exist at a time.
        streams_at_once: that go through a block, and the head, together. What a block needs is so
            many times that of the batch. Beside it every stream's state is held, ``3L - 2`` times
            the batch's tokens times the width: 4.4 GB for 28 layers, 7,500 tokens, width 3,584 and
            bfloat16, where an MLP of width 18,944 holds 2.3 GB per product of 8 streams.
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
    """Sums of one student over the predicting positions of each of n texts, on the CPU.

    Attributes:
        kl: of each family, float64 ``[n, L+1]`` (``single``: ``[n, L]``): KL(target ‖ model) in
            nats when the first or last 0..L layers, or layer 0..L-1 alone, are replaced.
        wrong: likewise, int64: positions where the most likely token is not the target's.
        positions: int64 ``[n]``.
        block_passes: block passes per batch beside the target's.
    """

    kl: dict[Family, Tensor]
    wrong: dict[Family, Tensor]
    positions: Tensor
    block_passes: int


def block_passes(n_layers: int) -> int:
    """Passes of a block by a stream, beside the target's own: ``L² + (L-1)(L-2)/2``."""
    return n_layers**2 + (n_layers - 1) * (n_layers - 2) // 2


class _End(NamedTuple):
    """A stream after the last block, and whose that was."""

    hidden: Tensor
    stream: Stream


_TARGET = Stream("target")


def measure_partial(
    students: Students,
    texts: Sequence[Text],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    config: PartialConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Partial]:
    """Measure partial replacement by each student, or read what was measured before.

    Arguments, returns and errors are those of
    :func:`fastadapt.evaluation.faithfulness.outputs.measure_output`; ``names`` are all students but
    the base if not given, which has no blocks that fit the target.
    """
    config = config or PartialConfig()
    names = [n for n in students.students if n != "base"] if names is None else list(names)
    if "base" in names:
        raise UserError("partial replacement is of a student that shares the target's attention")
    batches = batches_of(texts, config.batch_tokens)
    facts = ("partial", _SCHEMA, digest_of(texts), *vars(config).values())
    sums = (len(texts), 3 * students.model.n_layers - 3)
    arrays: Arrays = {
        "kl": (torch.float64, sums),
        "wrong": (torch.int64, sums),
        "positions": (torch.int64, (len(texts),)),
    }
    stores = stores_of(students, names, folder, facts, len(batches), lambda _: arrays)
    for i, (name,) in unfinished(stores, 1, progress, stop):
        batch = batch_of(texts, batches[i]).to(students.model.device)
        tensors = _measure(students.model, batch, students.stream(name), config)
        check_finite(name, tensors["kl"], [texts[j].id for j in batches[i]])
        stores[name].add(i, tensors)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    predicted = torch.tensor([len(text.ids) - 1 for text in texts])
    found: dict[str, Partial] = {}
    for name, store in stores.items():
        if store.missing():
            continue
        tensors = {key: values[order] for key, values in store.read().items()}
        if not torch.equal(tensors["positions"], predicted):
            raise store.damaged("tensor positions: expected those that predict in each text")
        if bool((tensors["wrong"] < 0).any() or (tensors["wrong"] > predicted[:, None]).any()):
            raise store.damaged("tensor wrong: expected counts of positions of each text")
        found[name] = _families(tensors)
    return found


@torch.no_grad()
def _measure(
    model: ReplacementModel, batch: Batch, stream: Stream, config: PartialConfig
) -> dict[str, Tensor]:
    """Sums ``[B, 3L-3]`` over positions: of *first* 1..L, *last* 1..L-1, *single* 1..L-2."""
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
    """The target's last states, and those of every partial replacement, as ``_measure`` has them.

    ``targets`` holds the streams on the target's blocks, of *first* n under n and of *single* l
    under -l, ``students`` those on the student's, by the layer at which they began.
    """
    n_layers, ids, attention = model.n_layers, batch.input_ids, batch.attention_mask
    inputs = {1: model.block_inputs(ids, attention)}

    def run(layer: int, states: dict[int, Tensor], mode: Mode) -> dict[int, Tensor]:
        """One block on all of ``states``, which is emptied on the way: no state is held twice."""
        out: dict[int, Tensor] = {}
        keys = list(states)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            n = len(some)
            if n not in inputs:
                mask = None if attention is None else attention.repeat(n, 1)
                inputs[n] = model.block_inputs(ids.repeat(n, 1), mask)
            together = torch.cat([states.pop(key) for key in some])
            together, _ = model.block(layer, together, inputs[n].arguments[layer], mode)
            out.update(zip(some, together.chunk(n), strict=True))
        return out

    clean = inputs[1].hidden
    targets: dict[int, Tensor] = {}
    students: dict[int, Tensor] = {}
    with carrying(model, stream.adapters):
        for layer in range(n_layers):
            students[layer] = targets[0] = clean
            targets = run(layer, targets, "target")
            clean = targets.pop(0)
            students = run(layer, students, stream.mode)
            if layer + 1 < n_layers:
                targets[layer + 1] = students[0]
                if layer > 0:
                    targets[-layer] = students[layer]
            model.reshard_layer(layer)
    first = [_End(targets[n], _TARGET) for n in range(1, n_layers)] + [_End(students[0], stream)]
    last = [_End(students[n_layers - n], stream) for n in range(1, n_layers)]
    single = [_End(targets[-layer], _TARGET) for layer in range(1, n_layers - 1)]
    return clean, first + last + single


def _families(tensors: dict[str, Tensor]) -> Partial:
    """Spread the streams over the families that share them."""

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
