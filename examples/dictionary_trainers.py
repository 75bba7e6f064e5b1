"""Replace encoder and decoder in dictionary_learning's trainers.

    python examples/dictionary_trainers.py

Each class changes one method, ``loss``. The trainers' ``update``, with its optimizer, clipping,
projection and schedules, stays. The script trains twice from the same start, in float64, and
compares weights and moments. Needs ``dictionary-learning`` 0.1.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from differences import largest_difference, report
from torch import Tensor

from fastadapt.kernels.transcoder import SparseCodes, transcoder

D, F, K, BATCH, STEPS = 16, 96, 4, 128, 30


class Standard(StandardTrainerAprilUpdate):
    """ReLU SAE with the L1 loss weighted by the decoder's norms."""

    def loss(self, x: Tensor, step: int, logging: bool = False, **options: Any) -> Any:
        if logging:  # of dense activations
            return super().loss(x, step, logging, **options)
        ae = self.ae
        weights = ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.bias
        out, penalty, _, _ = transcoder(x - ae.bias, *weights)
        sparsity = self.l1_penalty * self.sparsity_warmup_fn(step) * penalty / len(x)
        return (x - out).square().sum(-1).mean() + sparsity


class TopK(TopKTrainer):
    """TopK SAE. Steps with dead features, whose auxiliary loss is dense, are the trainer's own."""

    def loss(self, x: Tensor, step: int, logging: bool = False) -> Any:
        since = self.num_tokens_since_fired
        if logging or bool((since >= self.dead_feature_threshold).any()):
            return super().loss(x, step, logging)
        ae = self.ae
        weights = ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec
        out, _, stats, codes = transcoder(
            x - ae.b_dec, *weights, activation="topk", k=self.k, return_codes=True
        )
        assert codes is not None
        if step > self.threshold_start_step:
            self.update_threshold(by_token(codes, len(x), self.k))
        since += len(x)
        since[stats.fired] = 0
        return (x - out).square().sum(-1).mean()


def by_token(codes: SparseCodes, n_tokens: int, k: int) -> Tensor:
    """Return the values of codes as ``[n_tokens, k]``; 0 where a token has fewer than k."""
    starts = torch.searchsorted(codes.tokens, torch.arange(n_tokens, device=codes.tokens.device))
    column = torch.arange(len(codes.tokens), device=codes.tokens.device) - starts[codes.tokens]
    values = codes.values.new_zeros(n_tokens, k)
    values[codes.tokens, column] = codes.values
    return values


def trained(kind: type, **settings: Any) -> dict[str, Tensor]:
    """Train with the trainer's ``update``; return weights and moments, by name."""
    trainer = kind(
        steps=STEPS,
        activation_dim=D,
        dict_size=F,
        layer=0,
        lm_name="none",
        lr=1e-2,
        warmup_steps=2,
        seed=0,
        device="cpu",
        **settings,
    )
    trainer.ae.double()
    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        trainer.update(step, torch.randn(BATCH, D, generator=draw, dtype=torch.float64) + 0.5)
    seen = {f"weight {name}": value for name, value in trainer.ae.state_dict().items()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        seen |= {f"moment {i} {name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    return {name: value for name, value in seen.items() if value.is_floating_point()}


def threshold_without_features() -> float:
    """Return the trainer's threshold after a step in which a token has no active feature."""
    trainer = TopKTrainer(1, D, F, K, 0, "none", warmup_steps=0, device="cpu")
    values = torch.ones(4, K)
    values[2] = 0
    trainer.update_threshold(values)
    return float(trainer.ae.threshold)


def main() -> int:
    standard = {"l1_penalty": 1e-2, "sparsity_warmup_steps": 5}
    topk = {"k": K, "threshold_start_step": 3}
    failed = 0
    for title, ours, theirs, settings in (
        ("standard (April update)", Standard, StandardTrainerAprilUpdate, standard),
        ("topk", TopK, TopKTrainer, topk),
    ):
        difference = largest_difference(trained(ours, **settings), trained(theirs, **settings))
        failed |= report(f"dictionary_learning {title}", difference)
    threshold = threshold_without_features()
    print(f"dictionary_learning topk: threshold after a token without features: {threshold}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
