"""Replace the encoder and decoder of a training loop written by hand.

    python examples/hand_written.py

The loop trains a ReLU SAE of two ``torch.nn.Linear``. :class:`OnTheOp` changes one method, forward.
The script trains both from the same start and compares the losses of all steps, the gradients of
the first step, and the weights after the last.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from differences import largest_difference, report
from torch import Tensor, nn

from fastadapt.kernels.transcoder import transcoder

SPARSITY = 1e-2


class HandWritten(nn.Module):
    """SAE in plain PyTorch; a call returns the reconstruction and the sparsity loss."""

    def __init__(self, d: int, n_features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d, n_features)
        self.decoder = nn.Linear(n_features, d, bias=False)
        self.b_dec = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.encoder(x - self.b_dec))
        cost = a * self.decoder.weight.norm(dim=0)
        return self.decoder(a) + self.b_dec, cost.sum(-1).mean()


class OnTheOp(HandWritten):
    """The same SAE, with encoder, decoder and sparsity loss in one call of the op."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result = transcoder(
            x - self.b_dec,
            self.encoder.weight,
            self.encoder.bias,
            self.decoder.weight.T,  # nn.Linear holds a column per feature
            self.b_dec,
        )
        return result.out, result.penalty / len(x)


def train(sae: nn.Module, batches: Tensor) -> dict[str, Tensor]:
    """Train, and return losses, gradients of the first step and last weights, by name."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses: list[Tensor] = []
    seen: dict[str, Any] = {}
    for step, x in enumerate(batches):
        out, sparsity = sae(x)
        loss = (out - x).square().sum(-1).mean() + SPARSITY * sparsity
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            seen = {f"gradient of {n}": copy.deepcopy(p.grad) for n, p in sae.named_parameters()}
            seen["output"] = out.detach()
        optimizer.step()
        losses.append(loss.detach())
    return seen | dict(sae.state_dict()) | {"losses": torch.stack(losses)}


def compare(kind: type[HandWritten] = OnTheOp, steps: int = 20) -> float:
    """Return the largest relative difference of training with ``kind`` and with HandWritten."""
    torch.manual_seed(0)
    theirs = HandWritten(16, 64).double()
    with torch.no_grad():
        theirs.b_dec.normal_()
    ours = kind(16, 64).double()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    batches = torch.randn(steps, 128, 16, dtype=torch.float64)
    return largest_difference(train(ours, batches), train(theirs, batches))


if __name__ == "__main__":
    sys.exit(report("a loop written by hand, 20 steps", compare()))
