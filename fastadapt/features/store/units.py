"""What the units of each kind are in the model: what they write, and when they are active."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.features.store.schema import Kind
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import AdaptedMLP, ReplacementModel


def output_rows(model: ReplacementModel, kind: Kind, layer: int) -> Tensor:
    """What each unit of a layer writes into the stream: ``[F, D]``, a row per unit."""
    if kind == "adapter":
        return cast("TranscoderAdapter", model.adapters[layer]).W_dec.detach()
    return output_matrix(model.mlps[layer], kind).weight.detach().T


def output_matrix(mlp: AdaptedMLP, kind: Kind) -> nn.Linear:
    """The output matrix of the base's or the target's MLP."""
    found: Any = getattr(getattr(mlp, kind), "down_proj", None)
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"neurons of {type(getattr(mlp, kind)).__name__} cannot be collected: it has no "
            "down_proj; collect the adapter alone (--kinds adapter)"
        )
    return found


class Neurons:
    """The k strongest neurons of each token, in one layer's MLP.

    Args:
        norm: float32 ``[F]``, of each neuron's output.
        k: at most so many of a token are active.
    """

    def __init__(self, norm: Tensor, k: int) -> None:
        self._norm, self._k = norm, min(k, len(norm))

    def codes(self, hidden: Tensor, real: Tensor) -> SparseCodes:
        """Of the output matrix's inputs ``hidden [..., F]``, where ``real [...]``."""
        h = hidden.flatten(0, -2).float()
        found, features = (h * self._norm).topk(self._k, dim=-1)
        active = (found > 0) & real.flatten()[:, None]
        features, order = features.masked_fill(~active, len(self._norm)).sort(dim=-1)
        active = active.gather(1, order)
        tokens, rank = active.nonzero(as_tuple=True)
        features = features[tokens, rank]
        return SparseCodes(tokens, features, h[tokens, features])
