"""The method's training step in plain torch, the baseline of the whole-step benchmark.

The step follows the description of the released algorithm (arXiv 2602.20904), with one pass of the
model per quantity. Target and replacement each run twice, for logits and for hidden states, and
both bridges start at the embedding. Adapters and logits are dense. With ``checkpoint`` the blocks
are recomputed in the backward pass, by transformers' gradient checkpointing. Sequences have no
padding.

T tokens, D width, F features, V vocabulary size, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastadapt.models.pair import DTYPES, ModelPair
from fastadapt.objective import ObjectiveConfig

__all__ = ["DenseAdapted", "NaiveStep"]


class DenseAdapted(nn.Module):
    """Compute ``MLP_base(x) + A(x)`` with all F activations; store the last call's penalty."""

    penalty: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base = base
        for name, parameter in adapter.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        a = nnf.relu(nnf.linear(x, self.W_enc, self.b_enc))
        self.penalty = (a * self.W_dec.norm(dim=1)).sum(-1).mean()
        return self.base(x) + a @ self.W_dec + self.b_dec


class NaiveStep:
    """Compute the losses of a sequence.

    Args:
        pair: a pair whose target is not wrapped yet. The target's MLPs are replaced during calls.
        adapters: one ReLU adapter per layer, whose parameters are copied.
        checkpoint: whether to recompute the blocks in the backward pass.
    """

    def __init__(
        self, pair: ModelPair, adapters: Sequence[nn.Module], *, checkpoint: bool = False
    ) -> None:
        self.target, self.paths = pair.target, pair.paths
        self.target.requires_grad_(False)
        pair.base_mlps.requires_grad_(False)
        if checkpoint:  # transformers recomputes in training mode only
            self.target.train()
            enable = "activation_checkpointing_enable"  # from transformers 5.24 on
            if not hasattr(self.target, enable):
                enable = "gradient_checkpointing_enable"
            getattr(self.target, enable)({"use_reentrant": False})
        self.decoder = getattr(self.target, self.paths.decoder)
        self.originals: list[Any] = list(getattr(self.decoder, self.paths.layers))
        self.adapted: list[Any] = [
            DenseAdapted(base, adapter)
            for base, adapter in zip(pair.base_mlps, adapters, strict=True)
        ]
        # Blocks that share all but the MLP: a recompute needs the MLP of the forward pass.
        self.replaced = [copy.copy(layer) for layer in self.originals]
        for layer, mlp in zip(self.replaced, self.adapted, strict=True):
            layer._modules = dict(layer._modules)
            setattr(layer, self.paths.mlp, mlp)

    def __call__(self, ids: Tensor, cutoff: int, config: ObjectiveConfig) -> dict[str, Tensor]:
        """Return ``loss`` and its terms for ``ids [1, T]``, with the objective's names.

        Both bridges run at every cutoff, also if one of them equals the output's KL.
        """
        n_layers, dtype = len(self.originals), config.logits_dtype
        wide = torch.float64 if self.target.dtype == torch.float64 else torch.float32

        def kl(clean: Tensor, logits: Tensor) -> Tensor:
            rounded = [t if dtype is None else t.to(DTYPES[dtype]) for t in (logits, clean)]
            q, p = (t.log_softmax(-1, dtype=wide) for t in rounded)
            return nnf.kl_div(q, p, reduction="none", log_target=True).sum(-1)[:, :-1].mean()

        with torch.no_grad():
            clean, _ = self._run(self.originals, ids)
            _, hidden = self._run(self.originals, ids, head=False)
        terms = {"kl": kl(clean, self._run(self.replaced, ids)[0])}
        _, ours = self._run(self.replaced, ids, head=False)
        terms["sparsity"] = config.sparsity * torch.stack([m.penalty for m in self.adapted]).sum()
        errors = [
            (a - h).to(wide).square().mean() / (h.to(wide).square().mean() + 1e-8)
            for a, h in zip(ours, hidden, strict=True)
        ]
        terms["nmse"] = torch.stack(errors).sum() / (n_layers + 1)
        mixed = [*self.replaced[:cutoff], *self.originals[cutoff:]]
        terms["bridge_adapter_to_target"] = kl(clean, self._run(mixed, ids)[0])
        mixed = [*self.originals[:cutoff], *self.replaced[cutoff:]]
        terms["bridge_target_to_adapter"] = kl(clean, self._run(mixed, ids)[0])
        bridges = terms["bridge_adapter_to_target"] + terms["bridge_target_to_adapter"]
        loss = terms["kl"] + config.nmse * terms["nmse"] + terms["sparsity"]
        return {**terms, "loss": loss + config.bridge * bridges}

    def _run(
        self, layers: Sequence[nn.Module], ids: Tensor, *, head: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the target with these blocks; return logits (or decoder outputs), block outputs."""
        hidden: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _m, _i, out: hidden.append(out)) for layer in layers
        ]
        try:
            setattr(self.decoder, self.paths.layers, nn.ModuleList(layers))
            logits = (self.target if head else self.decoder)(input_ids=ids, use_cache=False)[0]
        finally:
            for handle in handles:
                handle.remove()
            setattr(self.decoder, self.paths.layers, nn.ModuleList(self.originals))
        return logits, hidden
