"""Lists where in texts target and base differ most, and which part of the model causes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.difference.measure import Measured
from fastadapt.evaluation.difference.parts import Role, TwoModels
from fastadapt.evaluation.difference.shares import shapley
from fastadapt.evaluation.faithfulness.texts import Text, batch_of

ROLES: tuple[Role, Role] = ("target", "base")
_BEFORE = 24  # tokens of context that are shown before a position's prediction


def widest(
    models: TwoModels, measured: Measured, texts: Sequence[Text], n: int
) -> list[dict[str, Any]]:
    """Return the ``n`` positions with the largest KL(target ‖ base), the largest first.

    Args:
        models: the two models, for the tokens that they predict.
        measured: arrays over ``texts``.
        texts: the texts.
        n: largest number of positions.

    Returns:
        Dicts with ``text`` (id), ``position`` (index of the predicted token), ``before`` (text
        before it), ``token`` (the predicted token in the text), ``target`` and ``base`` (each
        model's most likely token, with its probability ``p``), ``kl`` (nats), ``shapley`` (nats by
        part) and ``reason``, the part with the largest value.
    """
    rows = measured.kl[:, -1].argsort(descending=True, stable=True)[:n].tolist()
    values = shapley(measured.kl[rows].double())
    decode = models.pair.tokenizer.decode
    states: dict[int, dict[Role, Tensor]] = {}
    listed = []
    for row, nats in zip(rows, values.tolist(), strict=True):
        index, position = int(measured.text[row]), int(measured.position[row])
        text = texts[index]
        if index not in states:
            states[index] = _states(models, text)
        likely: dict[str, dict[str, Any]] = {}
        for role, hidden in states[index].items():
            token_id, p = _most_likely(models, hidden[position], role)
            likely[role] = {"token": decode([token_id]), "p": p}
        listed.append(
            {
                "text": text.id,
                "position": position + 1,
                "before": decode(text.ids[max(0, position + 1 - _BEFORE) : position + 1]),
                "token": decode(text.ids[position + 1 : position + 2]),
                **likely,
                "kl": measured.kl[row, -1].item(),
                "shapley": dict(zip(models.parts, nats, strict=True)),
                "reason": models.parts[nats.index(max(nats))],
            }
        )
    return listed


@torch.no_grad()
def _states(models: TwoModels, text: Text) -> dict[Role, Tensor]:
    """Return the states ``[T, D]`` that go into the heads of target and base."""
    batch = batch_of([text], [0]).to(models.device)
    states: dict[Role, Tensor] = {}
    for role in ROLES:
        with models.taking(models.parts if role == "base" else ()):
            states[role] = models.hidden(batch)[0]
    return states


def _most_likely(models: TwoModels, state: Tensor, role: Role) -> tuple[int, float]:
    """Return the most likely token after a state ``[D]``, and its probability."""
    head = models.head(role if "embeddings" in models.parts else "target")
    wide = torch.promote_types(head.dtype, torch.float32)
    logits = head.to(wide) @ state.to(wide)
    if (cap := models.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    p, token = logits.softmax(-1).max(-1)
    return int(token), p.item()


def profile(models: TwoModels, measured: Measured, text: Text) -> dict[str, Any]:
    """Return, for a single text, the base's KL and the parts' Shapley values at every position.

    Returns:
        ``tokens`` (the predicted tokens, from the second of the text), ``kl`` (nats) and
        ``shapley`` (nats by part), lists of one length.
    """
    values = shapley(measured.kl.double()).T.tolist()
    return {
        "tokens": [models.pair.tokenizer.decode([token]) for token in text.ids[1:]],
        "kl": measured.kl[:, -1].tolist(),
        "shapley": dict(zip(models.parts, values, strict=True)),
    }
