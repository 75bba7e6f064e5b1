"""Assembles hybrids: the target with parts of its modules taken from the base, without copies.

A hybrid is the target's own transformers model in which modules of the base stand in the places of
the target's. Both models are in memory once. What has no weights (masks, rotary embeddings, scaling
of the embeddings by the decoder) is the target's in every hybrid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.batch import Batch
from fastadapt.evaluation.models_under_test import load_base
from fastadapt.models.architectures import Paths
from fastadapt.models.baselines import norms_of
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.sources.checks import PairMismatchError, check_equal

Role = Literal["target", "base"]
Part = Literal["attention", "mlps", "norms", "embeddings"]
#: The parts of a model. ``norms`` are all RMSNorms, those of queries and keys and the last one too;
#: ``embeddings`` are the embedding and the head, and what adds embeddings in blocks (Gemma 4).
PARTS: tuple[Part, ...] = ("attention", "mlps", "norms", "embeddings")

#: Keys of a configuration that fix the shapes of attention.
_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "per_layer_config",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "hidden_size_per_layer_input",
)
#: Keys that change what modules compute, beside their weights.
_COMPUTING = (
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


class Swap(NamedTuple):
    """A module of the target and the base's module that can stand in its place.

    Attributes:
        part: the part that the module belongs to.
        layer: index of the block; None outside of the blocks.
        name: path of the module in the model.
        target, base: the two modules.
        places: pairs (parent, attribute). A norm inside of attention has two places, one in either
            model's attention, since the part ``norms`` is chosen apart from the part ``attention``.
    """

    part: Part
    layer: int | None
    name: str
    target: nn.Module
    base: nn.Module
    places: tuple[tuple[nn.Module, str], ...]


class Combination(NamedTuple):
    """The parts that a hybrid takes from the base."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Name of the hybrid: ``target``, or its parts from the base joined by ``+``."""
        return "+".join(self.parts) or "target"


def combinations(parts: Sequence[Part]) -> list[Combination]:
    """Return every subset of ``parts``; bit i of a subset's index stands for ``parts[i]``.

    Example:
        >>> [combination.name for combination in combinations(["attention", "mlps"])]
        ['target', 'attention', 'mlps', 'attention+mlps']
    """
    return [
        Combination(tuple(compress(parts, (index >> i & 1 for i in range(len(parts))))))
        for index in range(1 << len(parts))
    ]


class TwoModels:
    """Target and base, complete, and the hybrids that consist of their modules.

    Attributes:
        pair: the pair; its target is the model in which modules are exchanged.
        base: the base as a complete model.
        swaps: the exchangeable modules.
        parts: the parts that hybrids can take from the base: :data:`PARTS`, without ``embeddings``
            if the vocabularies have different sizes.
        notes: facts about the pair that limit what hybrids show.
        has_one_head: whether the weights of both heads are equal.

    Args:
        pair: the pair, whose target has transformers' own MLPs.
        base: the base as a complete model, on the same device and in the same dtype.

    Raises:
        PairMismatchError: the models have different numbers of heads.
    """

    def __init__(self, pair: ModelPair, base: Any) -> None:
        target = pair.target
        check_equal(target.config, base.config, _HEADS)
        self.pair, self.base = pair, base
        target.requires_grad_(False)
        base.requires_grad_(False)
        self.swaps = _swaps(pair, base)
        self.parts: tuple[Part, ...] = PARTS
        self.notes = [*pair.notes, *_config_notes(target.config, base.config)]
        self.notes += _buffer_notes(target, base)
        heads = [self._head(model) for model in (target, base)]
        self.has_one_head = torch.equal(*heads)
        sizes = [tuple(head.shape) for head in heads]
        if sizes[0] != sizes[1]:
            self.parts = PARTS[:-1]
            self.swaps = [swap for swap in self.swaps if swap.part != "embeddings"]
            self.notes.append(
                f"embeddings and head are the target's in every hybrid, since their sizes differ: "
                f"{sizes[0][0]:,} tokens in the target, {sizes[1][0]:,} in the base"
            )
        # One object has the settings that change later: the attention implementation of sampling.
        for swap in self.swaps:
            for module in swap.base.modules():
                if hasattr(module, "config"):
                    module.config = target.config

    @classmethod
    def load(cls, config: PairConfig) -> TwoModels:
        """Load both models of a pair completely.

        Raises:
            PairMismatchError, UserError: see :meth:`fastadapt.models.pair.ModelPair.load`.
        """
        pair = ModelPair.load(config)
        return cls(pair, load_base(pair))

    @contextmanager
    def taking(self, parts: Collection[Part], layer: int | None = None) -> Iterator[Any]:
        """Yield the hybrid that takes ``parts`` from the base; restore the models at exit.

        Args:
            parts: names of parts; none is the target, all are the base.
            layer: take only the modules of this block; None: of all blocks and outside of them.
        """
        before = [(*place, getattr(*place)) for swap in self.swaps for place in swap.places]
        try:
            for swap in self.swaps:
                taken = swap.part in parts and layer in (None, swap.layer)
                for parent, attribute in swap.places:
                    setattr(parent, attribute, swap.base if taken else swap.target)
            yield self.pair.target
        finally:
            for parent, attribute, module in before:
                setattr(parent, attribute, module)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the states that go into the head, ``[B, T, D]``, of the current hybrid."""
        states: Tensor = self._decoder(
            input_ids=batch.input_ids, attention_mask=batch.model_mask, use_cache=False
        ).last_hidden_state
        return states

    def head(self, role: Role) -> Tensor:
        """Return the weight ``[V, D]`` of a model's head."""
        return self._head(self.pair.target if role == "target" else self.base)

    @property
    def softcap(self) -> float | None:
        """Soft cap of the final logits (Gemma 2), or None."""
        cap: float | None = getattr(self.pair.target.config, "final_logit_softcapping", None)
        return cap

    @property
    def mlps(self) -> list[nn.Module]:
        """The target's MLPs, layer 0 first."""
        return [swap.target for swap in self.swaps if swap.part == "mlps"]

    @property
    def n_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.mlps)

    @property
    def device(self) -> Any:
        """Device of the models."""
        return self.head("target").device

    @property
    def _decoder(self) -> Any:
        return getattr(self.pair.target, self.pair.paths.decoder)

    @staticmethod
    def _head(model: Any) -> Tensor:
        weight: Tensor = model.get_output_embeddings().weight
        return weight


def _swaps(pair: ModelPair, base: Any) -> list[Swap]:
    paths, target = pair.paths, pair.target
    decoders = [getattr(model, paths.decoder) for model in (target, base)]
    blocks = [getattr(decoder, paths.layers) for decoder in decoders]
    swaps: list[Swap] = []
    for layer, (ours, theirs) in enumerate(zip(*blocks, strict=True)):
        prefix = f"{paths.decoder}.{paths.layers}.{layer}"
        norms = [name for name, _ in norms_of(ours)]
        for name, module in ours.named_children():
            if name not in norms:
                part: Part = "mlps" if name == paths.mlp else "attention"
                part = "embeddings" if name in paths.per_layer_inputs else part
                other = _same_child(theirs, name, f"{prefix}.{name}")
                swaps.append(Swap(part, layer, f"{prefix}.{name}", module, other, ((ours, name),)))
        for name in norms:
            owner, _, attribute = name.rpartition(".")
            parents = [ours.get_submodule(owner)] + [theirs.get_submodule(owner)] * bool(owner)
            places = tuple((parent, attribute) for parent in parents)
            norm, other = ours.get_submodule(name), theirs.get_submodule(name)
            swaps.append(Swap("norms", layer, f"{prefix}.{name}", norm, other, places))
    for part, parent, prefix, module, other in _outside(paths, target, base):
        (name,) = (name for name, child in parent.named_children() if child is module)
        swaps.append(Swap(part, None, f"{prefix}{name}", module, other, ((parent, name),)))
    return swaps


def _same_child(parent: nn.Module, name: str, path: str) -> nn.Module:
    """Return the base's submodule ``name``, which the target has; raise if the base has none."""
    module = getattr(parent, name, None)
    if not isinstance(module, nn.Module):
        raise PairMismatchError(
            f"these models are not a pair: target has {path}, base has no such part. Give the "
            "model that the target was fine-tuned from"
        )
    return module


def _outside(
    paths: Paths, target: Any, base: Any
) -> Iterator[tuple[Part, nn.Module, str, nn.Module, nn.Module]]:
    """Yield part, parent, the parent's path, and both models' modules outside of the blocks."""
    ours, theirs = (getattr(model, paths.decoder) for model in (target, base))
    prefix = f"{paths.decoder}."
    for name, module in ours.named_children():
        if name == paths.layers or next(module.parameters(), None) is None:
            continue
        part: Part = "norms" if type(module).__name__.endswith("RMSNorm") else "embeddings"
        yield part, ours, prefix, module, _same_child(theirs, name, prefix + name)
    yield "embeddings", target, "", *(model.get_output_embeddings() for model in (target, base))


def _config_notes(target: Any, base: Any) -> list[str]:
    """Return a note for each setting of the computation in which target and base differ."""
    return [
        f"{key} differs: target {getattr(target, key, None)}, base {getattr(base, key, None)}; "
        "what has no weights (masks, rotary embeddings, soft cap) is the target's in every hybrid"
        for key in _COMPUTING
        if getattr(target, key, None) != getattr(base, key, None)
    ]


def _buffer_notes(target: Any, base: Any) -> list[str]:
    """Return a note if stored buffers, such as Gemma 4's layer_scalar, differ in the two models."""
    stored, theirs = target.state_dict().keys(), dict(base.named_buffers())
    names = [
        name
        for name, buffer in target.named_buffers()
        if name in stored and not torch.equal(buffer, theirs[name])
    ]
    if not names:
        return []
    return [f"{len(names)} buffers differ ({names[0]}, …); every hybrid has the target's"]
