"""Nodes that read one state of a block and write to another, with their values on a text.

Features of adapters read the MLP's input and write to its output. Features of a transcoder of the
base's MLP do the same (:mod:`.overlay`). Rank components of a LoRA read the input of a linear layer
and write to its output.

C values, U units of one layer and site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear

#: Kinds of units.
UnitKind = Literal["feature", "base feature", "rank component"]

#: States inside a block: input and output of the MLP with its adapter, and the attention heads'
#: outputs. The output of a linear layer has the layer's name in the block, its input that of
#: :func:`input_of`.
MLP_IN, MLP_OUT, HEADS = "mlp input", "mlp output", "heads"


def input_of(name: str) -> str:
    """Return the name of the state that a linear layer of a block reads."""
    return f"{name} input"


@dataclass(frozen=True)
class Units:
    """Units of one layer that read and write the same states, and their values on a text.

    Attributes:
        kind: what they are.
        layer: the block.
        reads, writes: names of states.
        stage: order within the block: a unit reads what units of earlier stages wrote.
        codes: positions, numbers and values of the units that are not 0.
        encoder: ``[U, in]``: row i is the direction that unit ``first + i`` reads.
        bias: ``[U]``: the part of a unit's pre-activation that no state gives; None: 0.
        decoder: ``[U, out]``: row i is what unit ``first + i`` writes per value.
        first: number of the first unit.
        name: name of the linear layer, for rank components.
    """

    kind: UnitKind
    layer: int
    reads: str
    writes: str
    stage: int
    codes: SparseCodes
    encoder: Tensor
    bias: Tensor | None
    decoder: Tensor
    first: int = 0
    name: str = ""

    def label(self, number: int) -> str:
        """Return a unit's name for tables."""
        return f"{self.kind} {self.layer}/{number}"


MLP_STAGE = 2


def feature_units(adapter: TranscoderAdapter, layer: int, codes: SparseCodes) -> Units:
    """Return the active features of an adapter."""
    return Units(
        "feature",
        layer,
        MLP_IN,
        MLP_OUT,
        MLP_STAGE,
        codes,
        adapter.W_enc.detach(),
        adapter.b_enc.detach(),
        adapter.W_dec.detach(),
    )


class Linear(NamedTuple):
    """A frozen linear layer of a block; ``name`` is its path in the block."""

    part: Literal["attention", "mlp"]
    name: str
    module: nn.Linear

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[out]``, or None."""
        bias: Tensor | None = self.module.bias
        return bias

    @property
    def is_pattern(self) -> bool:
        """Whether the layer gives queries or keys alone, which are held."""
        return self.name.endswith(("q_proj", "k_proj"))


def linears(model: ReplacementModel, layer: int, mlp: Literal["base", "target"]) -> list[Linear]:
    """Return the linear layers of a block's attention and of one of its MLPs."""
    block = model.blocks[layer]
    attention = set(attention_of(block).modules())
    prefix = f"{model.paths.mlp}.{mlp}."
    return [
        Linear("attention" if module in attention else "mlp", name, module)
        for name, module in block.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and (module in attention or name.startswith(prefix))
    ]


def attention_of(block: nn.Module) -> nn.Module:
    """Return a block's attention module, which transformers names ``...Attention``."""
    modules = [m for m in block.children() if type(m).__name__.endswith("Attention")]
    assert len(modules) == 1, modules
    return modules[0]


def rank_units(layer: int, parts: list[tuple[Linear, Tensor]]) -> Iterator[Units]:
    """Yield the rank components of a block's low-rank layers, numbered in the order of the layers.

    Args:
        layer: the block.
        parts: low-rank layers with their inputs ``[T, in]`` on the text.
    """
    first = 0
    for linear, x in parts:
        module = linear.module
        assert isinstance(module, LowRankLinear)
        A, B = module.lora_A.detach(), module.lora_B.detach()
        gain = 1 if module.gain is None else module.gain.detach()[:, None].to(B.dtype)
        late = linear.name.endswith(("o_proj", "down_proj"))
        yield Units(
            "rank component",
            layer,
            input_of(linear.name),
            linear.name,
            (MLP_STAGE if linear.part == "mlp" else 0) + late,
            _dense_codes(x @ A.T, first),
            A,
            None,
            (B * gain).T,
            first,
            linear.name,
        )
        first += len(A)


def _dense_codes(values: Tensor, first: int) -> SparseCodes:
    n_tokens, n = values.shape
    device = values.device
    return SparseCodes(
        torch.arange(n_tokens, device=device).repeat_interleave(n),
        torch.arange(first, first + n, device=device).repeat(n_tokens),
        values.flatten(),
    )
