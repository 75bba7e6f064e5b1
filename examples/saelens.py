"""Replace encoder and decoder of SAELens' training SAEs, under SAELens' own trainer.

    python examples/saelens.py

:class:`OnTheOp` changes one method, ``training_forward_pass``. SAELens' trainer, its optimizer, its
counts of firing features and its auxiliary loss stay. The activations go to the trainer as a sparse
tensor, so the dense one never exists, except in a step whose auxiliary loss revives dead features.

The script trains each SAE twice from the same start, in float64, and compares weights, moments of
the optimizer and counts. Needs ``sae-lens`` 6.54.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from differences import ROUNDING, largest_difference, report
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastadapt.kernels.transcoder import TranscoderOutput, transcoder

D, F, K, BATCH, STEPS = 16, 96, 4, 128, 30


class OnTheOp:
    """Mix-in: a training SAE whose forward pass is one call of the op."""

    def call(self, x: Tensor) -> TranscoderOutput:
        """Return the op's result for the input of the encoder."""
        raise NotImplementedError

    def sparsity(self: Any, step_input: TrainStepInput, penalty: Tensor) -> dict[str, Tensor]:
        """Return the losses that are made of the op's penalty, a sum over the batch."""
        return {}

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        out, penalty, _, codes = self.call(self.process_sae_in(x))
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
        losses = {"mse_loss": self.mse_loss_fn(out, x).sum(dim=-1).mean()}
        losses |= self.sparsity(step_input, penalty / len(x))
        dead = step_input.dead_neuron_mask
        if dead is not None and bool(dead.any()):  # the auxiliary loss ranks all pre-activations
            _, hidden_pre = self.encode_with_hidden_pre(x)
            losses |= self.calculate_aux_loss(step_input, x, hidden_pre, out)
        places = torch.stack([codes.tokens, codes.features])
        shape = (len(x), self.cfg.d_sae)
        acts = torch.sparse_coo_tensor(places, codes.values, shape, is_coalesced=True)
        total = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(x, out, acts, out.new_empty(0), total, losses)


class Standard(OnTheOp, StandardTrainingSAE):
    """ReLU SAE with the L1 loss that SAELens weights by the decoder's norms."""

    def call(self, x: Tensor) -> TranscoderOutput:
        weights = self.W_enc.T, self.b_enc, self.W_dec, self.b_dec
        return transcoder(x, *weights, return_codes=True)

    def sparsity(self, step_input: TrainStepInput, penalty: Tensor) -> dict[str, Tensor]:
        return {"l1_loss": step_input.coefficients["l1"] * penalty}

    def calculate_aux_loss(self, *_: Any) -> dict[str, Tensor]:
        return {}  # the penalty is the only one


class TopK(OnTheOp, TopKTrainingSAE):
    """TopK SAE that ranks activations times the norms of their decoder's rows."""

    def call(self, x: Tensor) -> TranscoderOutput:
        W_enc, b_enc, W_dec = self.W_enc.T, self.b_enc, self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            norm = W_dec.norm(dim=-1)
            W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
        ranked = {"activation": "topk", "k": self.cfg.k}
        return transcoder(x, W_enc, b_enc, W_dec, self.b_dec, **ranked, return_codes=True)


def trainer(sae: Any, dead_window: int) -> SAETrainer:
    """Return SAELens' trainer of an SAE, over random activations."""
    draw = torch.Generator().manual_seed(1)
    batches = iter(lambda: torch.randn(BATCH, D, generator=draw, dtype=torch.float64) + 0.5, None)
    config = SAETrainerConfig(
        total_training_samples=BATCH * STEPS,
        train_batch_size_samples=BATCH,
        lr=1e-2,
        lr_end=1e-3,
        dead_feature_window=dead_window,
    )
    return SAETrainer(config, sae, batches)


def trained(kind: type, config: Any, dead_window: int, start: dict[str, Tensor]) -> dict[str, Any]:
    """Train with SAELens' loop; return weights, moments and counts, by name."""
    sae = kind(config)
    sae.load_state_dict(start)
    loop = trainer(sae, dead_window)
    loop.fit()
    seen = {f"weight {name}": value for name, value in sae.state_dict().items()}
    for i, state in loop.optimizer.state_dict()["state"].items():
        seen |= {f"moment {i} {name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    seen["firing"] = loop.act_freq_scores
    return seen


def compare(ours: type, theirs: type, config: Any, dead_window: int = 10**6) -> float:
    """Return the largest relative difference of two trainings from the same start."""
    torch.manual_seed(0)
    start = theirs(config).state_dict()
    results = [trained(kind, config, dead_window, start) for kind in (ours, theirs)]
    return largest_difference(*results)


def main() -> int:
    size = {"d_in": D, "d_sae": F, "dtype": "float64", "device": "cpu"}
    standard = StandardTrainingSAEConfig(**size, l1_coefficient=1e-2)
    plain = TopKTrainingSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=False)
    scaled = TopKTrainingSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=True)
    cases = [
        ("standard, L1", Standard, StandardTrainingSAE, standard, 10**6),
        ("topk", TopK, TopKTrainingSAE, plain, 10**6),
        ("topk, decoder's norms in the ranking", TopK, TopKTrainingSAE, scaled, 10**6),
        ("topk, with dead features revived", TopK, TopKTrainingSAE, scaled, 2),
    ]
    failed = 0
    for title, ours, theirs, config, dead_window in cases:
        failed |= report(f"SAELens {title}", compare(ours, theirs, config, dead_window))
    start = TopKTrainingSAE(scaled).state_dict()
    runs = [trained(TopKTrainingSAE, scaled, window, start) for window in (2, 10**6)]
    if largest_difference(*runs) < ROUNDING:
        print("expected features to die, so that the last case compares their revival; none did")
        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
