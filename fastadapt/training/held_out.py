"""Faithfulness of hybrid and replacement to the target on held-out text.

Measures, averaged over each sequence and then over sequences, as in the objective:

- KL(target ‖ model) in nats per predicted token;
- top-1 error: share of predicted tokens at which the model's most likely token is not the target's;
- NMSE of the residual stream after every block.

L0 and feature density (share of tokens on which a feature fires) are averages over all tokens.
B sequences, T tokens, D width, F features, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastadapt.batch import Batch, mean_share, token_weights
from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.errors import UserError
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.traversal import Stream, side_by_side

STUDENTS: tuple[Mode, Mode] = ("hybrid", "replacement")


class _Sums:
    """Sums of the measures over the sequences or tokens of all batches so far."""

    def __init__(self, n_layers: int, n_features: int, device: torch.device) -> None:
        wide = {"device": device, "dtype": torch.float64}
        self.kl = torch.zeros(2, **wide)  # type: ignore[call-overload]
        self.wrong = torch.zeros(2, **wide)  # type: ignore[call-overload]
        self.nmse = torch.zeros(2, n_layers + 1, **wide)  # type: ignore[call-overload]
        self.counts_LF = torch.zeros(n_layers, n_features, dtype=torch.int64, device=device)
        self.sequences = 0
        self.predicted = 0
        self.tokens = 0

    def all_reduce(self, ranks: Ranks) -> None:
        """Replace the sums by their sums over ranks."""
        counts = self.counts_LF.new_tensor([self.sequences, self.predicted, self.tokens])
        for tensor in (self.kl, self.wrong, self.nmse, self.counts_LF, counts):
            ranks.all_reduce_sum(tensor)
        self.sequences, self.predicted, self.tokens = counts.tolist()


@torch.no_grad()
def _add(sums: _Sums, model: ReplacementModel, batch: Batch, chunk_tokens: int) -> None:
    real = batch.real
    for passed in side_by_side(model, batch, [Stream(mode) for mode in STUDENTS]):
        layer, h, students, aux = passed
        for s, student in enumerate(students):
            sums.nmse[s, layer + 1] += nmse(student, h, mask=real).nmse.sum()
            if (of_block := aux[s]) is not None:
                sums.counts_LF[layer] += of_block.stats.feature_counts
    predictions = token_weights(batch, torch.float64).predictions
    rows = int((predictions.sum(1) > 0).sum())
    kl = linear_kl(
        model.final_norm(h, "target").flatten(0, 1),
        [
            model.final_norm(s, mode).flatten(0, 1)
            for s, mode in zip(students, STUDENTS, strict=True)
        ],
        model.head,
        mask=predictions.flatten(),
        softcap=model.softcap,
        chunk_tokens=chunk_tokens,
    )
    sums.kl += kl.kl.double() * rows
    for s, (token_kl, agrees) in enumerate(zip(kl.token_kl, kl.token_top1, strict=True)):
        wrong = mean_share(batch, ~agrees.view_as(predictions), torch.float64) * rows
        # argmax of NaN logits is token 0 in both models, which must not count as agreement.
        broken = (~token_kl.isfinite() & (predictions.flatten() > 0)).any()
        sums.wrong[s] += torch.where(broken, torch.nan, wrong)
    sums.sequences += len(batch.input_ids)
    sums.predicted += rows
    sums.tokens += int(real.sum())


def evaluate(
    model: ReplacementModel,
    batches: Iterable[Batch],
    *,
    chunk_tokens: int = 1024,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure the faithfulness of hybrid and replacement to the target on held-out batches.

    Args:
        model: model; its adapters are in ``eval()`` during the call.
        batches: batches, moved to the model's device one at a time.
        chunk_tokens: number of tokens whose logits exist at the same time.
        ranks: ranks that share the batches. Every rank passes all batches and gets the same result.

    Returns:
        ``kl_hybrid, kl_adapter`` (nats per predicted token), ``kl_recovered_vs_hybrid`` =
        1 - kl_adapter/kl_hybrid (None where the hybrid's KL is 0), ``top1_error_hybrid,
        top1_error_adapter``, ``nmse_mean, nmse_mean_hybrid`` (over layers 0..L),
        ``nmse_per_layer, nmse_per_layer_hybrid`` (L+1 numbers), ``l0_mean, l0_per_layer`` (active
        features per token per layer), ``feature_density`` (per layer and feature: share of tokens
        on which the feature fired), ``n_dead_per_layer`` (features that fired on no token),
        ``tokens`` and ``sequences``. For a baseline, ``adapter`` in a key stands for the tuned
        weights, and L0, density and dead features are absent. If a prediction is not finite, KL and
        top-1 error are NaN.

    Raises:
        UserError: no sequence has a token to predict.
    """
    sums = _Sums(model.n_layers, model.n_features, model.device)
    training = model.adapters.training
    model.adapters.eval()
    try:
        for batch, counts in ranks.shard(batches):
            unused = None if counts else _Sums(model.n_layers, model.n_features, model.device)
            _add(unused or sums, model, batch.to(model.device), chunk_tokens)
    finally:
        model.adapters.train(training)
    sums.all_reduce(ranks)
    if not sums.predicted:
        raise UserError("nothing to evaluate: no sequence has a token to predict")
    kl_hybrid, kl_adapter = (sums.kl / sums.predicted).tolist()
    error_hybrid, error_adapter = (sums.wrong / sums.predicted).tolist()
    nmse_hybrid, nmse_adapter = sums.nmse / sums.sequences
    return {
        "kl_hybrid": kl_hybrid,
        "kl_adapter": kl_adapter,
        "kl_recovered_vs_hybrid": 1 - kl_adapter / kl_hybrid if kl_hybrid else None,
        "top1_error_hybrid": error_hybrid,
        "top1_error_adapter": error_adapter,
        "nmse_mean": nmse_adapter.mean().item(),
        "nmse_mean_hybrid": nmse_hybrid.mean().item(),
        "nmse_per_layer": nmse_adapter.tolist(),
        "nmse_per_layer_hybrid": nmse_hybrid.tolist(),
        **(_sparsity(sums) if model.n_features else {}),
        "tokens": sums.tokens,
        "sequences": sums.sequences,
    }


def _sparsity(sums: _Sums) -> dict[str, Any]:
    density = sums.counts_LF / sums.tokens
    l0 = density.double().sum(1)
    return {
        "l0_mean": l0.mean().item(),
        "l0_per_layer": l0.tolist(),
        "feature_density": density.tolist(),
        "n_dead_per_layer": (sums.counts_LF == 0).sum(1).tolist(),
    }
