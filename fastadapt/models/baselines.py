"""Baselines: runs that train weights of the model itself, its MLPs, norms or biases, or a LoRA.

All start as the hybrid, bit for bit. The first two are from arXiv 2602.20904:

- ``mlp``, the fine-tuning skyline, trains all weights of the base's MLPs. It bounds what adapters
  beside these MLPs can reach.
- ``norms`` refits the weights of every RMSNorm: those of the blocks, those of queries and keys if
  the architecture has them, and the last one. The base's MLPs stay unchanged.
- ``bias`` trains one vector per layer, which is added to the output of the base's MLP. An adapter
  contains such a vector as ``b_dec``, so this bounds what needs no features.
- ``lora`` trains a low-rank update of each matrix of the base's MLPs. With the rank that
  :class:`LoraConfig` chooses, it has as many parameters as adapters, all of them used at each
  token: it shows what the same number of weights reaches without sparse features.

The trained weights are copies with the names of the weights in the model, or what is added to
these weights. In the mode ``replacement`` the model's own modules compute with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastadapt.errors import UserError
from fastadapt.models.adapted_mlp import AdaptedMLP

if TYPE_CHECKING:
    from fastadapt.models.pair import ModelPair

#: Names of the baselines.
Baseline = Literal["mlp", "norms", "bias", "lora"]
#: Name of the model's last norm among the weights of the last layer.
FINAL_NORM = "final_norm"
#: Ends of the names of a low-rank update's factors, ``A [r, in]`` and ``B [out, r]``.
LORA_A, LORA_B = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class LoraConfig:
    """Rank of the low-rank updates (LoRA) of a model's MLPs, the same for each matrix.

    Args:
        rank: the rank; None: the one whose number of parameters is nearest to that of adapters.
        n_features: features per layer of these adapters.

    Example:
        >>> LoraConfig(None, n_features=8192).rank_for(3584, [(18944, 3584)] * 3)  # Qwen2.5-7B
        869
    """

    rank: int | None
    n_features: int

    def rank_for(self, width: int, shapes: Sequence[tuple[int, int]]) -> int:
        """Return the given rank, or the one whose number of parameters is nearest to adapters'.

        Args:
            width: width of the residual stream, D. An adapter has ``2FD + F + D`` parameters.
            shapes: shapes of the matrices of one MLP. Each has ``r (out + in)`` parameters.

        Raises:
            UserError: the given rank exceeds the full rank.
        """
        full = min(min(shape) for shape in shapes)
        if self.rank is None:
            adapter = 2 * self.n_features * width + self.n_features + width
            return min(full, max(1, round(adapter / sum(map(sum, shapes)))))
        if self.rank > full:
            raise UserError(
                f"run.rank: expected at most {full}, the full rank of the MLPs' smallest matrix, "
                f"got {self.rank}"
            )
        return self.rank


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
                    f"{self.kind} of layer {layer}: {name}: expected "
                    f"{expected.get(name, 'none')}, as in the model, got {ours.get(name, 'none')}"
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


class LowRankMLP(TunedWeights):
    """Factors of the updates of an MLP's matrices, each ``W + B A`` in the mode ``replacement``.

    The sum is rounded to the dtype of ``W``, as in a checkpoint of the merged weights.
    """

    kind = "lora"

    @property
    def rank(self) -> int:
        """The rank of the updates."""
        return int(next(p for name, p in self.named_parameters() if name.endswith(LORA_A)).shape[0])

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return ``base(x)`` computed with the updated matrices; ``x [..., D]``."""
        factors = dict(self.named_parameters())
        merged = {
            name: base.get_parameter(name) + factors[name + LORA_B] @ factors[name + LORA_A]
            for name in (key.removesuffix(LORA_A) for key in factors if key.endswith(LORA_A))
        }
        out: Tensor = functional_call(base, merged, (x,))
        return out


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
    kind.kind: kind for kind in (TunedMLP, TunedNorms, TunedBias, LowRankMLP)
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


def weights_of(
    pair: ModelPair, kind: Baseline, rank: int | None = None
) -> Sequence[Mapping[str, Tensor]]:
    """Return the hybrid's weights that a baseline trains, by name for each layer.

    Args:
        pair: the two models.
        kind: the baseline.
        rank: rank of the updates of ``lora``, which are 0 in the hybrid.
    """
    if kind == "lora":
        assert rank is not None
        return [
            {
                name + end: weight.new_zeros(shape)
                for name, weight in _matrices(base).items()
                for end, shape in (
                    (LORA_A, (rank, weight.shape[1])),
                    (LORA_B, (weight.shape[0], rank)),
                )
            }
            for base in pair.base_mlps
        ]
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


def _matrices(mlp: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in mlp.named_parameters() if weight.ndim == 2}


def tuned_weights(
    pair: ModelPair, config: LoraConfig | Baseline, generator: torch.Generator | None = None
) -> nn.ModuleList:
    """Return copies of the hybrid's weights to train, layer 0 first, on the hybrid's device.

    Args:
        pair: the two models.
        config: settings of ``lora``, or another baseline.
        generator: CPU generator of the factors ``A`` of ``lora``, which are uniform in
            ``±1/√in``. Its factors ``B`` are 0.
    """
    width, rank = pair.target.config.hidden_size, None
    kind: Baseline = "lora" if isinstance(config, LoraConfig) else config
    if isinstance(config, LoraConfig):
        shapes = [(w.shape[0], w.shape[1]) for w in _matrices(pair.base_mlps[0]).values()]
        rank = config.rank_for(width, shapes)
    layers = nn.ModuleList(
        TUNED[kind](width, {name: tensor.detach().clone() for name, tensor in layer.items()})
        for layer in weights_of(pair, kind, rank)
    )
    for name, factor in layers.named_parameters():
        if name.endswith(LORA_A) and factor.device.type != "meta":
            draw = torch.empty(factor.shape, dtype=torch.float32)
            bound = 1 / math.sqrt(factor.shape[1])
            with torch.no_grad():
                factor.copy_(draw.uniform_(-bound, bound, generator=generator))
    return layers


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
