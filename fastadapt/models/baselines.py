"""Weights of the model itself that a run may train in place of adapters: its MLPs, or its norms.

Two baselines of arXiv 2602.20904, both of which start as the hybrid, bit for bit:

- ``mlp``, the fine-tuning skyline: the base's MLPs, all of their weights trained. No adapter that
  is added to them can do what this cannot.
- ``norms``: the weights of every RMSNorm refit (a block's, those of queries and keys where the
  architecture has them, and the last one), the base's MLPs as they are.

What is trained are copies, under the names that the weights have in the model; in the mode
``replacement`` the model's own modules compute with them. No forward is written again.
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
Baseline = Literal["mlp", "norms"]
#: What the last norm of the model is called among the weights of the last layer.
FINAL_NORM = "final_norm"


class TunedWeights(nn.Module):
    """Trainable weights of one block, in place of the model's own, which stay as they are.

    Args:
        width: of the residual stream, D.
        tensors: by the name that each has in the model, ``gate_proj.weight``; they become the
            parameters, of the same names.
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
        """``module(x)`` with the weights under ``name`` (all, where it is empty) for its own."""
        own: dict[str, Tensor] = dict(self.get_submodule(name).named_parameters())
        out: Tensor = functional_call(module, own, (x,))
        return out

    def check_fits(self, wanted: Mapping[str, Tensor], layer: int) -> None:
        """Refuse weights that are not those of the model's layer in name and shape.

        Raises:
            UserError: they are not; says which.
        """
        ours = {name: tuple(p.shape) for name, p in self.named_parameters()}
        theirs = {name: tuple(t.shape) for name, t in wanted.items()}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{self.kind} of layer {layer}: {name}: the model has "
                    f"{theirs.get(name, 'none')}, got {ours.get(name, 'none')}"
                )


class TunedMLP(TunedWeights):
    """An MLP's weights, with which the base's MLP computes in the mode ``replacement``."""

    kind = "mlp"

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """What stands in the block: ``base`` with these weights, of ``x [..., D]``."""
        return self.call(base, "", x)


class TunedNorms(TunedWeights):
    """The weights of a block's norms, with which they compute in the mode ``replacement``.

    Those of the last layer hold the model's last norm too, as ``final_norm``.
    """

    kind = "norms"

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """What stands in the block: ``base`` as it is, of ``x [..., D]``."""
        out: Tensor = base(x)
        return out


class SwitchedNorm(nn.Module):
    """Stands where a norm stood, and takes the refit weight where its block's MLP is replaced.

    While the block carries refit weights: with a transcoder beside its MLP it is the target's norm.

    Args:
        norm: the target's.
        name: of the norm, among the weights of its block.
        mlp: of its block, whose mode it follows, and whose ``adapter`` these weights are.
    """

    def __init__(self, norm: nn.Module, name: str, mlp: AdaptedMLP) -> None:
        super().__init__()
        self.norm = norm
        self._of_block = name, mlp  # in a tuple, since it is a part of the block already

    def forward(self, x: Tensor) -> Tensor:
        name, mlp = self._of_block
        if mlp.mode == "replacement" and isinstance(mlp.adapter, TunedNorms):
            return mlp.adapter.call(self.norm, name, x)
        out: Tensor = self.norm(x)
        return out


TUNED: Mapping[Baseline, type[TunedWeights]] = {kind.kind: kind for kind in (TunedMLP, TunedNorms)}


def norms_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The RMSNorms in a block, by name, switched or not."""
    # transformers' classes are called so in every architecture: Qwen2RMSNorm, Olmo2RMSNorm.
    within: set[nn.Module] = set()
    for name, part in module.named_modules():
        if isinstance(part, SwitchedNorm):
            within.add(part.norm)
            yield name, part.norm
        elif type(part).__name__.endswith("RMSNorm") and part not in within:
            yield name, part


def _blocks(pair: ModelPair) -> tuple[Any, nn.ModuleList]:
    decoder = getattr(pair.target, pair.paths.decoder)
    return decoder, getattr(decoder, pair.paths.layers)


def weights_of(pair: ModelPair, kind: Baseline) -> Sequence[Mapping[str, Tensor]]:
    """The hybrid's own weights that ``kind`` trains, of each layer, by name."""
    if kind == "mlp":
        return [dict(base.named_parameters()) for base in pair.base_mlps]
    decoder, blocks = _blocks(pair)
    layers = [
        {f"{at}.{name}": p for at, norm in norms_of(block) for name, p in norm.named_parameters()}
        for block in blocks
    ]
    norm = getattr(decoder, pair.paths.norm)
    last = (norm.norm if isinstance(norm, SwitchedNorm) else norm).named_parameters()
    layers[-1] |= {f"{FINAL_NORM}.{name}": p for name, p in last}
    return layers


def tuned_weights(pair: ModelPair, kind: Baseline) -> nn.ModuleList:
    """Copies to train, layer 0 first: the hybrid's weights, in its dtype and on its device."""
    width = pair.target.config.hidden_size
    return nn.ModuleList(
        TUNED[kind](width, {name: tensor.detach().clone() for name, tensor in layer.items()})
        for layer in weights_of(pair, kind)
    )


def switch_norms(pair: ModelPair) -> None:
    """Put switched norms in the place of the target's, once its MLPs are adapted; once is enough.

    A model that never carries refit norms keeps transformers' own modules.
    """
    decoder, blocks = _blocks(pair)
    last = getattr(decoder, pair.paths.norm)
    if isinstance(last, SwitchedNorm):
        return
    for block in blocks:
        mlp = getattr(block, pair.paths.mlp)
        for name, norm in list(norms_of(block)):
            holder, _, own = name.rpartition(".")
            setattr(block.get_submodule(holder), own, SwitchedNorm(norm, name, mlp))
    setattr(decoder, pair.paths.norm, SwitchedNorm(last, FINAL_NORM, mlp))
