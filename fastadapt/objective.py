"""All losses of the method, computed in one traversal of the layers.

:func:`objective` is a pure function of (model, batch, cutoff, weights). ``h`` is the target's
residual stream and ``ĥ`` the replacement's. Every KL is KL(target ‖ model) in nats per predicted
token. The losses (arXiv 2602.20904) are:

- ``L_out = mean_t KL(y_t ‖ ŷ_t)``;
- ``L_nmse = 1/(L+1) Σ_l Σ(ĥ_l - h_l)² / Σ h_l²`` over the embeddings and every block's output;
- two bridges at a cutoff k: replacement blocks 1..k then target blocks (adapter→target), and
  target blocks 1..k then replacement blocks (target→adapter). Each is a KL to the target; neither
  is detached;
- ``L_1 = λ Σ_l mean_t Σ_i φ(a_i ‖W_dec,i‖)``, with φ the identity in the paper.

The objective is defined per sequence and averaged over the sequences of a batch; a row of a packed
batch holds several sequences. KL counts the positions whose next token has a valid label. NMSE, L_1
and L0 count every token that is not padding.

Target and replacement pass through the layers side by side. From the cutoff on, the replacement
stream and the target→adapter stream pass through the same blocks, as one batch. Its second half
counts in no penalty and no statistic. The head is applied once, to all streams, in chunks.

B sequences, T tokens, D width, S streams, L layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch, Packing, mean_share, token_weights
from fastadapt.errors import UserError
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.transcoder import (
    L1,
    PENALTIES,
    CodeLayout,
    Penalty,
    TranscoderStats,
    plan_for,
)
from fastadapt.models.pair import DTYPES
from fastadapt.models.recompute import POLICIES, recomputed
from fastadapt.models.replacement import Mode, ReplacementModel

TANH_SCALE = 4.0  # Anthropic's "Circuits Updates", January 2025


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses and settings of the traversal.

    Args:
        sparsity: λ of the sparsity penalty. With ``l0``, the value from which λ starts.
        sparsity_ramp: share of a run's steps over which λ rises in equal parts to ``sparsity``. It
            counts from the first step, beside the warm-up of the learning rate, and 0 is no ramp.
        l0: wanted number of active features per token, averaged over layers. A training run then
            steers λ to it (:mod:`fastadapt.training.sparsity`). Null: λ is ``sparsity``.
        nmse: weight of the activation loss.
        bridge: weight of each bridge's KL; 1 in the paper, 2 in its released code. At 0 the bridges
            are not computed.
        first_cutoff: smallest cutoff, 0 or 1. The cutoff is uniform on ``first_cutoff..L``; 1 in
            the paper, 0 in its released code.
        checkpoint: which activations of a block the backward pass recomputes
            (:mod:`fastadapt.models.recompute`): ``none``, ``mlp`` (all except attention and the
            MLP's gate and up), ``attention`` (all except attention) or ``full`` (all). ``auto``
            selects one of these for each layer and batch, with the least recomputation whose
            planned memory fits; it is for training runs only.
        kl_chunk_tokens: number of tokens whose logits exist at the same time.
        logits_dtype: dtype to which logits are rounded before the softmax in float32. Null:
            float32, since near-equal distributions cancel in 16 bits. ``bfloat16``: as in the
            released code.
        penalty: function of ``a_i ‖W_dec,i‖`` that the sparsity penalty sums: ``l1``, the product
            itself, or ``tanh``, ``tanh(c a_i ‖W_dec,i‖)``, which hardly shrinks strong features.
        penalty_scale: ``tanh`` only: c, > 0; 4 if not given. For weak features, ``tanh`` acts as
            ``l1`` with a weight of ``c·sparsity``.

    Raises:
        UserError: an impossible value, or a setting that the penalty does not use.
    """

    sparsity: float = 1e-3
    sparsity_ramp: float = 0.0
    l0: float | None = None
    nmse: float = 1.0
    bridge: float = 1.0
    first_cutoff: int = 1
    checkpoint: str = "full"
    kl_chunk_tokens: int = 1024
    logits_dtype: str | None = None
    penalty: str = "l1"
    penalty_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("sparsity", "nmse", "bridge"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"objective.{name} must be a finite weight >= 0, got {value}")
        if not 0 <= self.sparsity_ramp <= 1:
            raise UserError(
                f"objective.sparsity_ramp must be a share of the steps, in [0, 1], got "
                f"{self.sparsity_ramp}"
            )
        if self.sparsity_ramp and not self.sparsity:
            raise UserError(
                f"objective.sparsity_ramp: expected 0 with objective.sparsity 0, which has nothing "
                f"to rise to, got {self.sparsity_ramp}; give objective.sparsity, or leave it out"
            )
        if self.l0 is not None:
            self._check_target(self.l0)
        if self.first_cutoff not in (0, 1):
            raise UserError(
                f"objective.first_cutoff (the smallest cutoff of the bridges) must be 0 or 1, got "
                f"{self.first_cutoff}"
            )
        _check_penalty(self.penalty, self.penalty_scale, self.sparsity)
        if self.penalty == "tanh" and self.penalty_scale is None:
            # config.yaml must record the number: the default may change between versions.
            object.__setattr__(self, "penalty_scale", TANH_SCALE)
        if self.checkpoint not in (*POLICIES, "auto"):
            raise UserError(
                f"objective.checkpoint must be auto or one of {', '.join(POLICIES)}, "
                f"got {self.checkpoint!r}"
            )
        if self.kl_chunk_tokens < 1:
            raise UserError(f"objective.kl_chunk_tokens must be >= 1, got {self.kl_chunk_tokens}")
        if self.logits_dtype is not None and self.logits_dtype not in DTYPES:
            raise UserError(
                f"objective.logits_dtype must be null or one of {', '.join(DTYPES)}, "
                f"got {self.logits_dtype!r}"
            )

    def _check_target(self, l0: float) -> None:
        if not 0 < l0 < float("inf"):
            raise UserError(f"objective.l0 must be a number of features above 0, or null, got {l0}")
        if self.sparsity_ramp:
            raise UserError(
                "objective.l0: expected null with objective.sparsity_ramp "
                f"{self.sparsity_ramp}, got {l0}; leave the ramp out, since a steered λ starts low"
            )


class AdapterCall(NamedTuple):
    """Call of one layer's adapter in :func:`objective`.

    Attributes:
        penalty: sparsity penalty of the call without λ, 0-d.
        stats: counts over the tokens of the replacement stream.
        plan: layout of the codes; None if the op read their number itself.
        n_streams: streams in the call, 1 or 2.
    """

    penalty: Tensor
    stats: TranscoderStats
    plan: CodeLayout | None
    n_streams: int


class ObjectiveOutput(NamedTuple):
    """Result of :func:`objective`.

    Attributes:
        loss: 0-d, with its graph.
        metrics: terms of the loss by name; 0-d, detached.
        calls: the call of each layer's adapter; empty for a baseline.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    calls: list[AdapterCall]


def _check_penalty(penalty: str, scale: float | None, sparsity: float) -> None:
    if penalty not in PENALTIES:
        raise UserError(f"objective.penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
    if penalty != "l1" and sparsity == 0:
        raise UserError(
            f"objective.penalty {penalty} has no weight with objective.sparsity 0; give "
            "objective.sparsity, or omit objective.penalty"
        )
    if scale is not None and penalty != "tanh":
        raise UserError(
            f"objective.penalty_scale is not used with penalty={penalty!r}, got {scale}; "
            "omit objective.penalty_scale"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"objective.penalty_scale must be a positive, finite number, got {scale}")


def draw_cutoff(n_layers: int, config: ObjectiveConfig, seed: int, step: int) -> int:
    """Draw the bridge's cutoff of an optimiser step, uniform on ``first_cutoff..L``.

    The cutoff depends on (seed, step) only, so that all ranks and micro-batches, and a resumed run,
    draw the same.

    Example:
        >>> draw_cutoff(4, ObjectiveConfig(), seed=42, step=0) in (1, 2, 3, 4)
        True
    """
    # Python hashes the whole text into the seed; torch's CPU generator uses 32 bits of an integer.
    return random.Random(f"cutoff {seed} {step}").randint(config.first_cutoff, n_layers)


def _run_block(
    model: ReplacementModel,
    layer: int,
    mode: Mode,
    arguments: dict[str, Any],
    hidden: Tensor,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    plan: CodeLayout | None = None,
    penalty: Penalty = L1,
) -> tuple[Tensor, Tensor | None, TranscoderStats | None]:
    out, aux = model.block(
        layer, hidden, arguments, mode, mask=mask, padding=padding, plan=plan, penalty=penalty
    )
    return (out, None, None) if aux is None else (out, aux.penalty, aux.stats)


class _Streams(NamedTuple):
    """Result of a traversal: hidden states before the final norm, NMSE, and adapters' calls."""

    target: Tensor
    replacement: Tensor
    adapter_to_target: Tensor | None
    target_to_adapter: Tensor | None
    nmse: Tensor
    token_nmse: Tensor
    calls: list[AdapterCall]


def _plan(model: ReplacementModel, hidden: Tensor, codes_per_token: float) -> CodeLayout:
    """Return the code layout for a call on ``hidden [S, T, D]``; padding counts as tokens."""
    n_tokens, kind = hidden.shape[0] * hidden.shape[1], hidden.device.type
    return plan_for(codes_per_token, n_tokens, model.n_features, hidden.dtype, kind)


def _mean_nmse(
    student: Tensor, target: Tensor, real: Tensor, tokens_BT: Tensor, packing: Packing | None
) -> list[Tensor]:
    """Return the NMSE averaged over sequences, and over tokens with their weights."""
    if packing is None:
        error = nmse(student, target, mask=real)
        return [error.nmse.mean(), (error.token_nmse * tokens_BT).sum()]
    of_texts, of_tokens = [], []
    # Unbound and split, not sliced: the backward pass then joins the gradients of a row once.
    for row, of_target, lengths in zip(
        student.unbind(), target.unbind(), packing.lengths, strict=True
    ):
        sizes = [*lengths, len(row) - sum(lengths)]
        texts = zip(row.split(sizes), of_target.split(sizes), lengths, strict=False)
        for text, expected, _ in texts:
            error = nmse(text, expected)
            of_texts.append(error.nmse)
            of_tokens.append(error.token_nmse.mean())
    return [torch.stack(of_texts).mean(), torch.stack(of_tokens).mean()]


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.repeat(2, 1)


def _traverse(
    model: ReplacementModel,
    batch: Batch,
    cutoff: int,
    config: ObjectiveConfig,
    tokens_BT: Tensor,
    codes_per_token: Sequence[float] | None,
    policies: Sequence[str],
) -> _Streams:
    """Run every block once per stream and compute the NMSE of the hidden states."""
    n_layers, (n_rows, _) = model.n_layers, batch.input_ids.shape
    real, attention = batch.real, batch.model_mask
    padding = None if batch.attention_mask is None else ~real
    forks = 0 < cutoff < n_layers and config.bridge > 0

    single = model.block_inputs(batch.input_ids, attention, batch.positions)
    double, double_mask, double_padding = single, tokens_BT, padding
    if forks:
        double = model.block_inputs(
            batch.input_ids.repeat(2, 1), _twice(attention), _twice(batch.positions)
        )
        double_mask = torch.cat([tokens_BT, torch.zeros_like(tokens_BT)])
        double_padding = _twice(padding)

    h, h_rep = single.hidden, single.hidden
    bridge: Tensor | None = None
    zero = tokens_BT.new_zeros(())
    nmse_sum, token_sum = zero, zero  # both models have the same embeddings: that term is 0
    calls: list[AdapterCall] = []
    phi = Penalty(config.penalty, config.penalty_scale)
    for layer in range(n_layers):
        forked = forks and layer >= cutoff
        if forked and layer == cutoff:
            bridge = h_rep
            h_rep = torch.cat([h_rep, h])
        inputs, mask, pad = (
            (double, double_mask, double_padding) if forked else (single, tokens_BT, padding)
        )
        with torch.no_grad():
            h, _ = model.block(layer, h, single.arguments[layer], "target")
        plan = None if codes_per_token is None else _plan(model, h_rep, codes_per_token[layer])
        run = partial(_run_block, model, layer, "replacement", inputs.arguments[layer])
        run = partial(run, mask=mask, padding=pad, plan=plan, penalty=phi)
        modules = model.saving_modules(layer, "replacement")
        h_rep, penalty, counts = recomputed(policies[layer], run, h_rep, modules=modules)
        if penalty is not None and counts is not None:
            calls.append(AdapterCall(penalty, counts, plan, 2 if forked else 1))
        if bridge is not None:
            run = partial(_run_block, model, layer, "target", single.arguments[layer])
            modules = model.saving_modules(layer, "target")
            bridge, _, _ = recomputed(policies[layer], run, bridge, modules=modules)
        model.reshard_layer(layer)
        # At weight 0 the NMSE is a metric only and needs no graph.
        free = h_rep[:n_rows] if config.nmse else h_rep[:n_rows].detach()
        of_sequences, of_tokens = _mean_nmse(free, h, real, tokens_BT, batch.packing)
        nmse_sum, token_sum = nmse_sum + of_sequences, token_sum + of_tokens
    return _Streams(
        target=h,
        replacement=h_rep[:n_rows],
        adapter_to_target=bridge,
        target_to_adapter=h_rep[n_rows:] if forks else None,
        nmse=nmse_sum / (n_layers + 1),
        token_nmse=token_sum / (n_layers + 1),
        calls=calls,
    )


def objective(
    model: ReplacementModel,
    batch: Batch,
    cutoff: int,
    config: ObjectiveConfig,
    codes_per_token: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    sparsity: float | None = None,
) -> ObjectiveOutput:
    """Return the loss of a batch and all its terms, computed in one traversal.

    Args:
        model: target and replacement.
        batch: batch on the model's device.
        cutoff: k in 0..L. At 0 the bridge adapter→target does not exist, and target→adapter is the
            replacement itself. At L it is the reverse. The remaining bridge reuses the KL and the
            gradient of the output.
        config: weights of the losses.
        codes_per_token: expected codes per token of each layer, from which the layout of its call
            follows (:func:`fastadapt.kernels.transcoder.plan_for`). None: the op reads the number
            of codes itself. On a GPU the result is invalid if a call has more codes than its layout
            holds.
        policies: what each layer saves for the backward pass, one of
            :data:`fastadapt.models.recompute.POLICIES` per layer. None: ``config.checkpoint`` in
            every layer. No policy changes a bit of the result.
        sparsity: λ of this step. None: ``config.sparsity``.

    Returns:
        The loss; its terms ``loss, kl, nmse, nmse_token, bridge_adapter_to_target,
        bridge_target_to_adapter, sparsity, l0, top1_error``; and the call of every layer's adapter.
        A bridge that does not exist is absent. A baseline has no sparsity, no L0 and no calls.

    Raises:
        ValueError: the cutoff lies outside 0..L, or ``policies`` has not one entry per layer.
    """
    if not 0 <= cutoff <= model.n_layers:
        raise ValueError(f"cutoff must lie in 0..{model.n_layers}, got {cutoff}")
    if policies is None:
        policies = [config.checkpoint] * model.n_layers
    if len(policies) != model.n_layers:
        raise ValueError(f"expected {model.n_layers} policies, one per layer, got {len(policies)}")
    wide = torch.float64 if model.head.dtype == torch.float64 else torch.float32
    tokens_BT, predictions_BT = token_weights(batch, wide)
    streams = _traverse(model, batch, cutoff, config, tokens_BT, codes_per_token, policies)

    forked = streams.adapter_to_target is not None
    # Each stream with the mode of its last block, which selects the final norm.
    students: list[tuple[Tensor, Mode]] = [(streams.replacement, "replacement")]
    if streams.adapter_to_target is not None and streams.target_to_adapter is not None:
        students.append((streams.adapter_to_target, "target"))
        students.append((streams.target_to_adapter, "replacement"))
    with torch.no_grad():
        teacher = model.final_norm(streams.target, "target").flatten(0, 1)
    kl = linear_kl(
        teacher,
        [model.final_norm(s, mode).flatten(0, 1) for s, mode in students],
        model.head,
        mask=predictions_BT.flatten(),
        softcap=model.softcap,
        chunk_tokens=config.kl_chunk_tokens,
        logits_dtype=None if config.logits_dtype is None else DTYPES[config.logits_dtype],
    )
    out = kl.kl[0]
    metrics: dict[str, Tensor] = {"kl": out}
    if forked:
        metrics["bridge_adapter_to_target"] = kl.kl[1]
        metrics["bridge_target_to_adapter"] = kl.kl[2]
    elif config.bridge and cutoff == 0:
        metrics["bridge_target_to_adapter"] = out
    elif config.bridge and cutoff == model.n_layers:
        metrics["bridge_adapter_to_target"] = out
    bridges = [value for name, value in metrics.items() if name.startswith("bridge")]
    loss = out + config.nmse * streams.nmse
    sparse: dict[str, Tensor] = {}
    if streams.calls:
        weight = config.sparsity if sparsity is None else sparsity
        sparse["sparsity"] = weight * torch.stack([c.penalty for c in streams.calls]).sum()
        n_active = torch.stack([c.stats.n_active for c in streams.calls]).sum()
        n_tokens = torch.stack([c.stats.n_tokens for c in streams.calls]).sum()
        sparse["l0"] = n_active.to(wide) / n_tokens.clamp(min=1)
        loss = loss + sparse["sparsity"]
    if bridges:
        loss = loss + config.bridge * torch.stack(bridges).sum()
    metrics |= {
        "loss": loss,
        "nmse": streams.nmse,
        "nmse_token": streams.token_nmse,
        **sparse,
        "top1_error": mean_share(batch, ~kl.token_top1[0].view_as(predictions_BT), wide),
    }
    calls = [c._replace(penalty=c.penalty.detach()) for c in streams.calls]
    return ObjectiveOutput(loss, {k: v.detach() for k, v in metrics.items()}, calls)
