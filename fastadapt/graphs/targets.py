"""What a graph can explain: a logit, a contrast of two tokens, a direction from a file, a feature.

A soft cap of the logits (Gemma 2) is held like the other quotients: the direction of a token is its
row of the head times ``capped / logit``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import Target
from fastadapt.graphs.linear.rules import held_quotient
from fastadapt.graphs.linear.trace import Trace, check_ids
from fastadapt.io.tensors import read_tensors
from fastadapt.models.replacement import Mode, ReplacementModel

#: Positions whose logits are in memory at once.
POSITIONS = 256


@dataclass(frozen=True)
class LogitTarget(Target):
    """A combination of logits at one position: ``Σ weight · logit``, minus their mean if demeaned.

    ``direction`` is the combination's gradient with the soft cap held.
    """

    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    demeaned: bool = False
    head: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    softcap: float | None = None

    def measure(self, state: Tensor) -> Tensor:
        """Return the combined logits ``[...]`` of states ``[..., D]`` after the final norm."""
        if self.softcap is None:
            return super().measure(state)
        logits = _capped(state @ self.head.T.to(state), self.softcap)
        combined = logits[..., list(self.tokens)] @ logits.new_tensor(self.weights)
        return combined - logits.mean(-1) if self.demeaned else combined


def logit(trace: Trace, token: int, position: int, name: str | None = None) -> LogitTarget:
    """Return the logit of a token, minus the mean over the vocabulary, as a target.

    Args:
        trace: the text.
        token: token id.
        position: index of the token that predicts it.
        name: name for tables.
    """
    return _logits(trace, {token: 1.0}, position, name or f"logit {token}", demeaned=True)


def contrast(
    trace: Trace, token: int, against: int, position: int, name: str | None = None
) -> LogitTarget:
    """Return the difference of two tokens' logits as a target.

    Raises:
        UserError: the tokens are the same.
    """
    if token == against:
        raise UserError(f"--against: expected another token than --token, got {token} twice")
    label = name or f"logit {token} - logit {against}"
    return _logits(trace, {token: 1.0, against: -1.0}, position, label, demeaned=False)


def _logits(
    trace: Trace, weights: dict[int, float], position: int, name: str, *, demeaned: bool
) -> LogitTarget:
    model = trace.model
    head, cap = model.head.detach(), model.softcap
    state = trace.final[position]
    direction = torch.zeros_like(state)
    tokens = torch.tensor(list(weights), device=head.device)
    rows = head[tokens].to(state)
    scale = torch.ones(len(head)).to(state)
    if cap is not None:
        logits = head.to(state) @ state
        scale = held_quotient(logits, _capped(logits, cap))
    direction = (torch.tensor(list(weights.values())).to(state) * scale[tokens]) @ rows
    if demeaned:
        direction = direction - scale @ head.to(state) / len(head)
    return LogitTarget(
        name,
        position,
        direction,
        tokens=tuple(weights),
        weights=tuple(weights.values()),
        demeaned=demeaned,
        head=head,
        softcap=cap,
    )


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def direction_of(trace: Trace, path: str | os.PathLike[str], position: int) -> Target:
    """Return a direction from a safetensors file, on the state after the final norm.

    Args:
        trace: the text.
        path: a file with one tensor ``direction`` of shape ``[D]``.
        position: index of the token.

    Raises:
        TensorError: the file cannot be read or holds other tensors.
    """
    direction = read_tensors(path, {"direction": (trace.model.d_model,)}, finite=True)["direction"]
    return Target(f"direction {os.path.basename(path)}", position, direction)


def named_feature(trace: Trace, name: str, position: int) -> Target:
    """Return the pre-activation of a feature that is named as ``layer/number``, at a position.

    Raises:
        UserError: the name is no such pair, or the feature does not exist.
    """
    model = trace.model
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", name)
    if match is None:
        raise UserError(f"--feature: expected layer/number, such as 2/17, got {name!r}")
    layer, number = int(match[1]), int(match[2])
    if layer >= model.n_layers or number >= model.n_features:
        raise UserError(
            f"--feature: expected layers 0 to {model.n_layers - 1} and features 0 to "
            f"{model.n_features - 1}, got {name}"
        )
    adapter: Any = model.adapters[layer]
    row, bias = adapter.W_enc[number].detach(), float(adapter.b_enc[number].detach())
    return Target(f"feature {name}", position, row, layer, bias, number)


def one_token(tokenizer: Any, text: str | int, option: str) -> int:
    """Return the id of a text that is one token; an id is returned as given.

    Raises:
        UserError: the text is no single token of the vocabulary.
    """
    if isinstance(text, int):
        return text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return int(ids[0])
    parts = [tokenizer.decode([i]) for i in ids]
    raise UserError(
        f"{option}: expected one token of the vocabulary, got {text!r}, which is split into "
        f"{parts}. A token in the middle of a text often begins with a space"
    )


class Difference(NamedTuple):
    """Where target and hybrid differ most, and the token that each predicts there."""

    position: int
    token: int
    against: int
    kl: float  #: nats


@torch.no_grad()
def most_different(model: ReplacementModel, ids: Tensor, position: int | None = None) -> Difference:
    """Return the position of the largest KL(target ‖ hybrid) where their top tokens differ.

    Args:
        model: the replacement model.
        ids: token ids ``[T]``.
        position: consider this position alone.

    Raises:
        UserError: both predict the same token at every position considered.
    """
    ids = check_ids(model, ids)
    states = {mode: final_state(model, ids, mode) for mode in ("target", "hybrid")}
    best: Difference | None = None
    for first in range(0, len(ids), POSITIONS):
        part = slice(first, first + POSITIONS)
        y, z = (logits_of(model, state[part]).log_softmax(-1) for state in states.values())
        kl, tops = (y.exp() * (y - z)).sum(-1), (y.argmax(-1), z.argmax(-1))
        for i in range(len(kl)):
            differs = bool(tops[0][i] != tops[1][i]) and position in (None, first + i)
            if differs and (best is None or float(kl[i]) > best.kl):
                best = Difference(first + i, int(tops[0][i]), int(tops[1][i]), float(kl[i]))
    if best is None:
        where = "everywhere" if position is None else f"at position {position}"
        raise UserError(
            f"target and hybrid predict the same token {where}, so there is no default contrast; "
            "give --token, and --against for a contrast"
        )
    return best


@torch.no_grad()
def final_state(model: ReplacementModel, ids: Tensor, mode: Mode) -> Tensor:
    """Return the states ``[T, D]`` after the final norm in a mode."""
    inputs = model.block_inputs(ids[None], None)
    hidden = inputs.hidden
    for layer, arguments in enumerate(inputs.arguments):
        hidden, _ = model.block(layer, hidden, arguments, mode)
        model.reshard_layer(layer)
    return model.final_norm(hidden, mode)[0]


def logits_of(model: ReplacementModel, state: Tensor) -> Tensor:
    """Return the logits ``[..., V]`` of states ``[..., D]`` after the final norm."""
    logits = state @ model.head.T.to(state)
    return logits if model.softcap is None else _capped(logits, model.softcap)
