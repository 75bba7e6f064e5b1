"""Units (features or MLP neurons) in the model: their output rows, and when they are active."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.features.store.schema import Kind
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import AdaptedMLP, ReplacementModel


def output_rows(model: ReplacementModel, kind: Kind, layer: int) -> Tensor:
    """Return the output row of each unit (feature or neuron) of a layer: ``[F, D]``."""
    if kind == "adapter":
        return cast("TranscoderAdapter", model.adapters[layer]).W_dec.detach()
    return output_matrix(model.mlps[layer], kind).weight.detach().T


def output_matrix(mlp: AdaptedMLP, kind: Kind) -> nn.Linear:
    """Return the output matrix of the base's or the target's MLP.

    Raises:
        UserError: the MLP has no linear layer ``down_proj``.
    """
    matrix: Any = getattr(getattr(mlp, kind), "down_proj", None)
    if not isinstance(matrix, nn.Linear):
        raise UserError(
            f"neurons of {type(getattr(mlp, kind)).__name__} cannot be collected, because this MLP "
            "has no down_proj; collect the adapter alone (--kinds adapter)"
        )
    return matrix


class Neurons:
    """The k strongest neurons of each token, in one layer's MLP.

    Args:
        norm: float32 ``[F]``, norm of each neuron's output row.
        k: neurons of a token that are active, at most.
    """

    def __init__(self, norm: Tensor, k: int) -> None:
        self._norm, self._k = norm, min(k, len(norm))

    def codes(self, hidden: Tensor, real: Tensor) -> SparseCodes:
        """Return the codes of the output matrix's inputs ``hidden [..., F]`` where ``real [...]``.

        Neurons rank by activation times norm; a code holds the activation.
        """
        h = hidden.flatten(0, -2).float()
        strength, features = (h * self._norm).topk(self._k, dim=-1)
        active = (strength > 0) & real.flatten()[:, None]
        # Codes are sorted by token, then feature; inactive ones get index F and sort to the end.
        features, order = features.masked_fill(~active, len(self._norm)).sort(dim=-1)
        active = active.gather(1, order)
        tokens, rank = active.nonzero(as_tuple=True)
        features = features[tokens, rank]
        return SparseCodes(tokens, features, h[tokens, features])
