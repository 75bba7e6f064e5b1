"""Trace a text: what fires at each token, and how far each model's prediction is from the target's.

The models are read through their own forward on the whole text. KL is KL(target ‖ model) of the
next-token distribution after each token, in nats, computed in float64 from the models' logits.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastadapt.effects.requests import RUN, check_text
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.loading import RunContents
from fastadapt.features.store.logit_lens import lens, strings_of
from fastadapt.features.store.sets import Pair

#: Name of the replacement model in traces and generations.
ADAPTER = "adapter"
#: Models that a trace compares with the target.
COMPARED = ("base", "hybrid", ADAPTER)
_CHUNK = 64  # positions whose distributions are in memory at a time


@dataclass(frozen=True)
class Firing:
    """An active feature at one token; ``contribution`` is its activation × decoder norm."""

    layer: int
    feature: int
    value: float
    contribution: float

    @property
    def pair(self) -> Pair:
        """Layer and number of the feature."""
        return self.layer, self.feature


@dataclass(frozen=True)
class Trace:
    """Features and predictions at each token of a text; lists have one entry per token.

    Attributes:
        ids: the tokens.
        tokens: their texts.
        prompt_length: number of tokens of the prompt.
        predicted: by model, ``target`` included: the most likely next token's text and its
            probability.
        kl: by model of ``COMPARED``: KL(target ‖ model) of the next token, in nats.
        fires: active features, the largest contribution first; none without transcoders.
        notes: sentences about models that are left out, or compared over the tokens that they
            share with the target, by name.
    """

    ids: list[int]
    tokens: list[str]
    prompt_length: int
    predicted: dict[str, list[tuple[str, float]]]
    kl: dict[str, list[float]]
    fires: list[list[Firing]]
    notes: dict[str, str] = field(default_factory=dict)

    def totals(self) -> list[Firing]:
        """Return one entry per feature that fires; see :func:`totals`."""
        return totals(self.fires)


def totals(fires: Sequence[Sequence[Firing]]) -> list[Firing]:
    """Return one entry per feature that fires: values and contributions summed over tokens.

    Args:
        fires: active features of each token.

    Returns:
        The features, the largest contribution first.

    Example:
        >>> totals([[Firing(2, 17, 1.0, 3.0)], [], [Firing(2, 17, 0.5, 1.5)]])
        [Firing(layer=2, feature=17, value=1.5, contribution=4.5)]
    """
    sums: dict[Pair, tuple[float, float]] = {}
    for firing in (firing for here in fires for firing in here):
        value, contribution = sums.get(firing.pair, (0.0, 0.0))
        sums[firing.pair] = value + firing.value, contribution + firing.contribution
    summed = [Firing(*pair, *values) for pair, values in sums.items()]
    return sorted(summed, key=lambda firing: (-firing.contribution, firing.pair))


@torch.no_grad()
def trace(
    run: RunContents,
    ids: Sequence[int],
    prompt_length: int | None = None,
    *,
    base: bool = True,
) -> Trace:
    """Read a text through base, hybrid, adapter and target.

    Args:
        run: the run, see :func:`fastadapt.load`.
        ids: tokens of the text.
        prompt_length: number of tokens of the prompt; all by default.
        base: load the base as a whole model and compare it, too. A base that cannot read the text
            is left out, with a note.

    Raises:
        UserError: the text has no token, or is longer than the context.
        RunError: a prediction is not finite.

    Example::

        run = fastadapt.load("runs/organism")
        ids = run.pair.tokenizer("tom has 3 apples")["input_ids"]
        trace(run, ids).kl["hybrid"]
    """
    if not ids:
        raise UserError("expected a text of at least one token, got none")
    check_text(run.models, ids)
    compared = [
        name for name in COMPARED if name != "base" or (base and run.models.reads_base(ids))
    ]
    target = logits_of(run.models, "target", ids)
    kl, predicted = {}, {"target": _most_likely(run, target)}
    for name in compared:
        logits = logits_of(run.models, name, ids)
        kl[name] = divergences(target, logits).tolist()
        predicted[name] = _most_likely(run, logits)
    length = len(ids) if prompt_length is None else prompt_length
    texts = strings_of(run.pair.tokenizer, list(ids))
    fires: list[list[Firing]] = firings(run, ids) if run.model.n_features else [[] for _ in ids]
    notes = {name: note for name, note in run.models.notes.items() if base and name == "base"}
    return Trace(list(ids), texts, length, predicted, kl, fires, notes)


def logits_of(models: ModelSet, name: str, ids: Sequence[int], *, last: int = 0) -> Tensor:
    """Return a model's logits after each token, ``[T, V]``, from its own forward.

    Args:
        models: the run.
        name: ``target``, ``base``, ``hybrid`` or ``adapter``.
        ids: tokens of the text.
        last: number of tokens, from the end, whose logits are computed; 0: all.

    Raises:
        RunError: a logit is not finite.
    """
    with models.generating(RUN if name == ADAPTER else name) as model:
        device = models.model.device
        input_ids = torch.tensor([list(ids)], dtype=torch.int64, device=device)
        logits: Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=last).logits[0]
    if not logits.isfinite().all():
        raise RunError(f"{name}: a prediction is not finite; pass --dtype float32")
    return logits


def divergences(target: Tensor, model: Tensor) -> Tensor:
    """Return KL(target ‖ model) of each row of logits ``[T, V]``: float64 ``[T]``, in nats.

    Of logits for different numbers of tokens, the distributions over the common ones are compared.

    Example:
        >>> divergences(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.1201], dtype=torch.float64)
    """
    common = min(target.shape[-1], model.shape[-1])
    target, model = target[:, :common], model[:, :common]
    out = []
    for p, q in zip(target.split(_CHUNK), model.split(_CHUNK), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        out.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(out)


def firings(run: RunContents, ids: Sequence[int]) -> list[list[Firing]]:
    """Return the active features of each token of a text, the largest contribution first."""
    fires: list[list[Firing]] = [[] for _ in ids]
    adapter: Any
    layers = zip(run.model.features(list(ids)), run.model.adapters, strict=True)
    for layer, (codes, adapter) in enumerate(layers):
        norms = adapter.W_dec.float().norm(dim=1)[codes.features]
        sizes = (codes.values.float() * norms).tolist()
        entries = zip(
            codes.tokens.tolist(),
            codes.features.tolist(),
            codes.values.tolist(),
            sizes,
            strict=True,
        )
        for token, feature, value, size in entries:
            fires[token].append(Firing(layer, feature, value, size))
    for here in fires:
        here.sort(key=lambda firing: (-firing.contribution, firing.pair))
    return fires


def promotes(run: RunContents, pairs: Sequence[Pair], n: int = 5) -> dict[Pair, list[str]]:
    """Return the texts of the ``n`` tokens that each feature promotes most, by the logit lens."""
    tokenizer = run.pair.tokenizer
    head = run.model.head[: min(len(run.model.head), len(tokenizer))]
    texts: dict[Pair, list[str]] = {}
    for layer in sorted({layer for layer, _ in pairs}):
        chosen = sorted({feature for other, feature in pairs if other == layer})
        adapter: Any = run.model.adapters[layer]
        ids, _ = lens(head, adapter.W_dec[chosen])
        for feature, row in zip(chosen, ids[:, 0, :n].tolist(), strict=True):
            texts[layer, feature] = strings_of(tokenizer, row)
    return texts


def _most_likely(run: RunContents, logits: Tensor) -> list[tuple[str, float]]:
    pairs = [chunk.double().softmax(-1).max(-1) for chunk in logits.split(_CHUNK)]
    shares = torch.cat([values for values, _ in pairs]).tolist()
    tokens = torch.cat([indices for _, indices in pairs]).tolist()
    return list(zip(strings_of(run.pair.tokenizer, tokens), shares, strict=True))
