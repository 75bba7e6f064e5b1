"""Baselines: runs that train weights of the model itself, its MLPs, its norms or biases.

All start as the hybrid, bit for bit. The first two are from arXiv 2602.20904:

- ``mlp``, the fine-tuning skyline, trains all weights of the base's MLPs. It bounds what adapters
  beside these MLPs can reach.
- ``norms`` refits the weights of every RMSNorm: those of the blocks, those of queries and keys if
  the architecture has them, and the last one. The base's MLPs stay unchanged.
- ``bias`` trains one vector per layer, which is added to the output of the base's MLP. An adapter
  contains such a vector as ``b_dec``, so this bounds what needs no features.

The trained weights are copies with the names of the weights in the model. In the mode
``replacement`` the model's own modules compute with the copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.func import functional_call

from fastadapt.errors import UserError
from fastadapt.models.adapted_mlp import AdaptedMLP

if TYPE_CHECKING:
    from fastadapt.models.pair import ModelPair

#: Names of the baselines.
Baseline = Literal["mlp", "norms", "bias"]
#: Name of the model's last norm among the weights of the last layer.
FINAL_NORM = "final_norm"


class TunedWeights(nn.Module):
    """Trainable copies of weights of one block.

    Args:
        width: width of the residual stream, D.
        tensors: tensors by their name in the model, such as ``gate_proj.weight``. They become
            parameters with the same names.
    """

    kind: ClassVar[Baseline]

    def __init__(self, width: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.d_in = self.d_out = width
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            part: nn.Module = self
            for step in path:
                if step not in dict(part.named_children()):
                    part.add_module(step, nn.Module())
                part = part.get_submodule(step)
            part.register_parameter(last, nn.Parameter(tensor))

    def card(self) -> dict[str, Any]:
        """Return the entries of ``fastadapt.json`` that describe these weights."""
        return {"kind": self.kind, "additive": False, "d_in": self.d_in, "d_out": self.d_out}

    def call(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return ``module(x)`` with the weights ``name.*``, or with all if ``name`` is empty."""
        weights: dict[str, Tensor] = dict(self.get_submodule(name).named_parameters())
        out: Tensor = functional_call(module, weights, (x,))
        return out

    def check_fits(self, model_weights: Mapping[str, Tensor], layer: int) -> None:
        """Check that the weights have the names and shapes of the model's layer.

        Raises:
            UserError: a weight is missing, extra or of a wrong shape; the message names it.
        """
        ours = {name: tuple(p.shape) for name, p in self.named_parameters()}
        expected = {name: tuple(t.shape) for name, t in model_weights.items()}
        for name in sorted(ours.keys() | expected.keys()):
            if ours.get(name) != expected.get(name):
                raise UserError(
                    f"{self.kind} of layer {layer}: {name}: the model has "
                    f"{expected.get(name, 'none')}, got {ours.get(name, 'none')}"
                )


class TunedMLP(TunedWeights):
    """Weights of an MLP, with which the base's MLP computes in the mode ``replacement``."""

    kind = "mlp"

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return ``base(x)`` computed with these weights; ``x [..., D]``."""
        return self.call(base, "", x)


class TunedNorms(TunedWeights):
    """Weights of a block's norms, with which the norms compute in the mode ``replacement``.

    The weights of the last layer include the model's last norm, as ``final_norm``.
    """

    kind = "norms"

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return ``base(x)``, since the MLP is unchanged; ``x [..., D]``."""
        out: Tensor = base(x)
        return out


class TunedBias(TunedWeights):
    """Bias ``[D]`` of an MLP's output, 0 in the hybrid, for the mode ``replacement``."""

    kind = "bias"
    bias: nn.Parameter

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return ``base(x) + bias``; ``x [..., D]``."""
        out: Tensor = base(x)
        return out + self.bias


class SwitchedNorm(nn.Module):
    """Norm that uses its refit weight while its block's MLP is in the mode ``replacement``.

    If the block's adapter is not :class:`TunedNorms`, this module is the target's norm in every
    mode.

    Args:
        norm: the target's norm.
        name: name of the norm among the weights of its block.
        mlp: MLP of the block, which has the mode and, as its ``adapter``, the refit weights.
    """

    def __init__(self, norm: nn.Module, name: str, mlp: AdaptedMLP) -> None:
        super().__init__()
        self.norm = norm
        # A tuple, which does not register `mlp` as a submodule: it is a submodule of the block.
        self._block_mlp = name, mlp

    def forward(self, x: Tensor) -> Tensor:
        name, mlp = self._block_mlp
        if mlp.mode == "replacement" and isinstance(mlp.adapter, TunedNorms):
            return mlp.adapter.call(self.norm, name, x)
        out: Tensor = self.norm(x)
        return out


TUNED: Mapping[Baseline, type[TunedWeights]] = {
    kind.kind: kind for kind in (TunedMLP, TunedNorms, TunedBias)
}


def _is_weighted_norm(module: nn.Module) -> bool:
    # Gemma 4 normalises values without a weight.
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def norms_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a block's RMSNorms that have weights, with their names.

    For a :class:`SwitchedNorm` this is the target's norm. The norms of linear attention (Qwen 3.5),
    which are gated, are parts of attention.
    """
    # The classes have this suffix in every architecture of transformers: Qwen2RMSNorm.
    switched: set[nn.Module] = set()
    for name, part in module.named_modules():
        if isinstance(part, SwitchedNorm):
            switched.add(part.norm)
            yield name, part.norm
        elif _is_weighted_norm(part) and part not in switched:
            yield name, part


def _blocks(pair: ModelPair) -> tuple[Any, nn.ModuleList]:
    decoder = getattr(pair.target, pair.paths.decoder)
    return decoder, getattr(decoder, pair.paths.layers)


def weights_of(pair: ModelPair, kind: Baseline) -> Sequence[Mapping[str, Tensor]]:
    """Return the hybrid's weights that a baseline trains, by name for each layer."""
    if kind == "mlp":
        return [dict(base.named_parameters()) for base in pair.base_mlps]
    if kind == "bias":
        width = pair.target.config.hidden_size
        weight = next(pair.base_mlps.parameters())
        return [{"bias": weight.new_zeros(width)} for _ in pair.base_mlps]
    decoder, blocks = _blocks(pair)
    layers = [
        {
            f"{path}.{name}": parameter
            for path, norm in norms_of(block)
            for name, parameter in norm.named_parameters()
        }
        for block in blocks
    ]
    norm = getattr(decoder, pair.paths.norm)
    last = (norm.norm if isinstance(norm, SwitchedNorm) else norm).named_parameters()
    layers[-1] |= {f"{FINAL_NORM}.{name}": p for name, p in last}
    return layers


def tuned_weights(pair: ModelPair, kind: Baseline) -> nn.ModuleList:
    """Return copies of the hybrid's weights to train, layer 0 first, in its dtype and device."""
    width = pair.target.config.hidden_size
    return nn.ModuleList(
        TUNED[kind](width, {name: tensor.detach().clone() for name, tensor in layer.items()})
        for layer in weights_of(pair, kind)
    )


def switch_norms(pair: ModelPair) -> None:
    """Replace each norm of a target with adapted MLPs by a :class:`SwitchedNorm`, at most once.

    A model that never gets refit norms keeps transformers' modules.
    """
    decoder, blocks = _blocks(pair)
    last = getattr(decoder, pair.paths.norm)
    if isinstance(last, SwitchedNorm):
        return
    for block in blocks:
        mlp = getattr(block, pair.paths.mlp)
        for name, norm in list(norms_of(block)):
            parent, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(parent), attribute, SwitchedNorm(norm, name, mlp))
    setattr(decoder, pair.paths.norm, SwitchedNorm(last, FINAL_NORM, mlp))
