"""Measures how far each model's predictions are from the target's, at every position of texts.

Per position: KL(target ‖ model) in nats, and whether the most likely tokens agree. Per text: NMSE
of the residual stream after each layer. Per model with features: L0. All models of a batch go
through the layers beside one pass of the target, and share its softmax. The base has other blocks,
embeddings and head than the target, so only its KL and top-1 agreement are measured.

B texts, T tokens, P predicting positions (per text one less than tokens), L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.partial_results import Arrays, PartialResults, iter_missing
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.kernels.linear_kl import LinearKLOutput, linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.traversal import final_norm, side_by_side

_SCHEMA = 1  # version of the arrays; files of other versions are not read
_NMSE = ("nmse", "token_nmse")


@dataclass(frozen=True)
class OutputConfig:
    """Settings of output faithfulness. They change results only by rounding.

    Args:
        batch_tokens: tokens of a batch, padding included. A longer text is a separate batch.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        students_at_once: number of compared models that share one pass of the target. Their
            adapters are in memory together.
    """

    batch_tokens: int = 8192
    chunk_tokens: int = 1024
    students_at_once: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "chunk_tokens", "students_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"outputs.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Measured:
    """Measurements of one model on n texts, as arrays on the CPU.

    Attributes:
        kl: float32 ``[P]``: KL(target ‖ model) in nats, at the positions of text 0, then 1, ...
        agrees: bool ``[P]``: whether the most likely tokens agree.
        text: int64 ``[P]``: index of each position's text.
        position: int64 ``[P]``: index in the text, from 0. A position predicts the next token.
        nmse, token_nmse: float32 ``[n, 2, L+1]``: NMSE after the embeddings and after every block.
            Index 0 of dimension 1 is over all tokens, index 1 over all but the first. ``nmse`` is
            one ratio per text, ``token_nmse`` the mean of one ratio per token. None for the base.
        l0: active features per token and layer, over all texts; None without features.
    """

    kl: Tensor
    agrees: Tensor
    text: Tensor
    position: Tensor
    nmse: Tensor | None = None
    token_nmse: Tensor | None = None
    l0: float | None = None


def measure_output(
    models: ModelSet,
    texts: Sequence[Text],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    config: OutputConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Measured]:
    """Measure the outputs of models on texts, or read the stored measurements.

    Args:
        models: the runs, with their base and hybrid.
        texts: responses of the target with their prompts.
        folder: stores one file per model, and until a model is finished one file per batch.
        names: names of the models to measure; default: all, including the base if it can read
            the texts (:meth:`ModelSet.reads_base`).
        config: settings.
        progress: called with (completed batches, total batches), summed over models.
        stop: set it to stop after the current batch.

    Returns:
        Arrays by name of the model: of all models, or if stopped, of the finished ones.

    Raises:
        UserError: a text cannot be measured, a name is unknown, or a stored file is damaged.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    config = config or OutputConfig()
    if names is None:
        reads = models.reads_base(i for text in texts for i in text.ids)
        names = [name for name in models.compared if reads or name != "base"]
    batches = batches_of(texts, config.batch_tokens)
    facts = ("output", _SCHEMA, digest_of(texts), config.batch_tokens, config.chunk_tokens)
    arrays = partial(_arrays, models, texts, len(batches))
    stores = open_stores(models, names, folder, facts, len(batches), arrays)
    with ExitStack() as held:
        base = None
        for i, todo in iter_missing(stores, config.students_at_once, progress, stop):
            if "base" in todo and base is None:
                base = held.enter_context(models.base())
            batch = batch_of(texts, batches[i]).to(models.model.device)
            for name, tensors in _measure(models, batch, todo, base, config.chunk_tokens).items():
                check_finite(name, tensors["kl"], [texts[j].id for j in batches[i]])
                stores[name].add(i, tensors)
    order = torch.tensor([i for batch in batches for i in batch])
    return {
        name: _in_order(_read(store, texts), order, texts)
        for name, store in stores.items()
        if not store.missing()
    }


def open_stores(
    models: ModelSet,
    names: Sequence[str] | None,
    folder: Path,
    facts: tuple[object, ...],
    n_parts: int,
    arrays: Callable[[str], Arrays],
) -> dict[str, PartialResults]:
    """Return the store of each model's results, by name of the model.

    Args:
        models: the runs, with their base and hybrid.
        names: names of the models; default: all.
        folder: folder of the stored files.
        facts: values that the results depend on beside the model. They select the file.
        n_parts: number of parts of the results.
        arrays: returns dtypes and shapes of a model's arrays by its name.

    Raises:
        UserError: a name is unknown.
    """
    names = list(models.compared) if names is None else list(names)
    if unknown := [name for name in names if name not in models.compared]:
        raise UserError(f"model {unknown[0]!r}: expected one of {', '.join(models.compared)}")
    stores = {}
    for name in names:
        digest = hashlib.sha256(repr((facts, models.fingerprint(name))).encode()).hexdigest()
        stores[name] = PartialResults(folder, name, digest, n_parts, arrays(name))
    return stores


def check_finite(name: str, values: Tensor, texts: Sequence[str]) -> None:
    """Raise ``RunError`` if a value of ``values`` is not finite."""
    if not values.isfinite().all():
        raise RunError(
            f"{name}: a prediction on texts {', '.join(texts)} is not finite; pass --dtype float32 "
            "(fastadapt where: --pair.dtype float32)"
        )


def _arrays(models: ModelSet, texts: Sequence[Text], n_batches: int, name: str) -> Arrays:
    """Return dtypes and shapes of a model's arrays: those of ``_measure``, over all batches."""
    positions, n_layers = sum(len(text.ids) - 1 for text in texts), models.model.n_layers
    arrays: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "kl": (torch.float32, (positions,)),
        "agrees": (torch.bool, (positions,)),
    }
    if name != "base":
        for key in _NMSE:
            arrays[key] = torch.float32, (len(texts), 2, n_layers + 1)
    if models.compared[name].kind == "transcoder":
        arrays["active"] = torch.int64, (n_batches, n_layers)
        arrays["tokens"] = torch.int64, (n_batches,)
    return arrays


@torch.no_grad()
def _measure(
    models: ModelSet, batch: Batch, names: Sequence[str], base: Any, chunk_tokens: int
) -> dict[str, dict[str, Tensor]]:
    """Return the arrays of models on one batch, in the order of its texts."""
    model = models.model
    inside = [name for name in names if name != "base"]
    streams = [models.stream(name) for name in inside]
    layers: dict[str, list[list[Tensor]]] = {name: [[], []] for name in inside}
    active: dict[str, list[Tensor]] = {name: [] for name in inside}
    h, states = None, []
    for passed in side_by_side(model, batch, streams):
        h, states = passed.target, passed.students
        for name, state, aux in zip(inside, states, passed.aux, strict=True):
            for per_layer, error in zip(layers[name], _errors(state, h, batch.real), strict=True):
                per_layer.append(error)
            if aux is not None:
                active[name].append(aux.stats.n_active)
    assert h is not None
    teacher = model.final_norm(h, "target")
    predicts = batch.real[:, 1:] & batch.real[:, :-1]
    out: dict[str, dict[str, Tensor]] = {}
    if inside:
        finals = [final_norm(model, x, to) for x, to in zip(states, streams, strict=True)]
        got = _kl(model, teacher, finals, model.head, predicts, chunk_tokens)
        for s, name in enumerate(inside):
            out[name] = {"kl": got.token_kl[s], "agrees": got.token_top1[s]}
            for key, per_layer in zip(_NMSE, layers[name], strict=True):
                # The target's embeddings are shared, so their error is 0.
                out[name][key] = torch.stack([torch.zeros_like(per_layer[0]), *per_layer], -1)
            if active[name]:
                out[name]["active"] = torch.stack(active[name])[None]
                out[name]["tokens"] = batch.real.sum()[None]
    if "base" in names:
        final = _last_hidden(base, model, batch)
        out["base"] = _of_base(model, base, teacher, final, predicts, chunk_tokens)
    return {
        name: {key: _stored(values) for key, values in tensors.items()}
        for name, tensors in out.items()
    }


def _stored(values: Tensor) -> Tensor:
    return values.float().cpu() if values.is_floating_point() else values.cpu()


def _errors(state: Tensor, target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors ``[B, 2]``: NMSE after a block over a text, and its tokens' mean NMSE.

    Index 0 of dimension 1 is over all real tokens, index 1 over all but the first.
    """
    without_first = real.clone()
    without_first[:, 0] = False
    per_text, per_token = [], []
    for mask in (real, without_first):
        got = nmse(state, target, mask=mask)
        per_text.append(got.nmse)
        per_token.append(torch.where(mask, got.token_nmse, 0).sum(1) / mask.sum(1).clamp(min=1))
    return torch.stack(per_text, -1), torch.stack(per_token, -1)


def _kl(
    model: ReplacementModel,
    teacher: Tensor,
    finals: Sequence[Tensor],
    head: Tensor,
    predicts: Tensor,
    chunk_tokens: int,
) -> LinearKLOutput:
    """Return KL and top-1 agreement at the predicting positions, text after text."""
    return linear_kl(
        teacher[:, :-1][predicts],
        [final[:, :-1][predicts] for final in finals],
        head,
        softcap=model.softcap,
        chunk_tokens=chunk_tokens,
    )


def _of_base(
    model: ReplacementModel,
    base: Any,
    teacher: Tensor,
    final: Tensor,
    predicts: Tensor,
    chunk_tokens: int,
) -> dict[str, Tensor]:
    """Return KL and top-1 agreement of the base, over the tokens that both models have.

    Both distributions are renormalised over these. A token that one model lacks and that is the
    other's most likely one counts as a disagreement.
    """
    heads = model.head, base.get_output_embeddings().weight
    common = min(map(len, heads))
    padded, students, head = join_heads(teacher, [final], *(each[:common] for each in heads))
    got = _kl(model, padded, students, head, predicts, chunk_tokens)
    agrees = got.token_top1[0]
    for whole, states in zip(heads, (teacher, final), strict=True):
        if len(whole) > common:
            chunks = states[:, :-1][predicts].split(chunk_tokens)
            agrees &= torch.cat([(h @ whole.T).argmax(-1) for h in chunks]) < common
    return {"kl": got.token_kl[0], "agrees": agrees}


def join_heads(
    teacher: Tensor, students: Sequence[Tensor], head: Tensor, students_head: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return arguments of the op for students whose head is not the teacher's.

    The op has one head for all models. Concatenated heads, with hidden states padded by zeros, give
    each model the logits of its own head.

    Args:
        teacher, students: last hidden states ``[..., D]``.
        head, students_head: ``[V, D]``.

    Returns:
        Teacher and students ``[..., 2D]``, and the head ``[V, 2D]``.
    """
    zeros = torch.zeros_like(teacher)
    return (
        torch.cat([teacher, zeros], -1),
        [torch.cat([zeros, student], -1) for student in students],
        torch.cat([head, students_head.to(head.dtype)], 1),
    )


def _last_hidden(base: Any, model: ReplacementModel, batch: Batch) -> Tensor:
    decoder = getattr(base, model.paths.decoder)
    mask = batch.attention_mask
    got = decoder(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    hidden: Tensor = got.last_hidden_state
    return hidden


def _read(store: PartialResults, texts: Sequence[Text]) -> dict[str, Tensor]:
    tensors = store.read()
    if "tokens" in tensors:
        expected, got = sum(len(text.ids) for text in texts), int(tensors["tokens"].sum())
        if got != expected:
            raise store.damaged(f"tensor tokens: expected a sum of {expected:,}, got {got:,}")
        if bool((tensors["active"] < 0).any()):
            raise store.damaged("tensor active: expected counts, got a negative number")
    return tensors


def _in_order(tensors: dict[str, Tensor], order: Tensor, texts: Sequence[Text]) -> Measured:
    """Sort arrays in the order of batches into the order of ``texts``."""
    lengths = torch.tensor([len(text.ids) - 1 for text in texts])
    batched = lengths[order]
    text = order.repeat_interleave(batched)
    position = torch.cat([torch.arange(n) for n in batched.tolist()])
    sort = text.argsort(stable=True)
    given = order.argsort()
    l0 = None
    if "active" in tensors:
        active, tokens = tensors["active"], tensors["tokens"]
        l0 = (active.sum().double() / (tokens.sum() * active.shape[1])).item()
    return Measured(
        kl=tensors["kl"][sort],
        agrees=tensors["agrees"][sort],
        text=text[sort],
        position=position[sort],
        **{key: tensors[key][given] for key in _NMSE if key in tensors},
        l0=l0,
    )
