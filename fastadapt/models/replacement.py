"""A pair of models as one: target, hybrid and replacement behind a single Hugging Face model.

The *target* is the fine-tuned model. The *hybrid* is the target with the base model's MLPs. The
*replacement* is the hybrid with an adapter beside every base MLP. They share attention, norms,
embeddings and head, so a pair costs the target and the base's MLP weights, nothing more. Two
baselines of the method take the place of adapters and are the replacement then: MLPs, or norm
weights, that were trained themselves (:mod:`fastadapt.models.baselines`).

Blocks are called through transformers' own modules: no copy of a model's forward lives here.
Masks and rotary embeddings come from one call of the model's own forward
(:meth:`ReplacementModel.block_inputs`); they are never rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig, Aux, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import CodeLayout, SparseCodes
from fastadapt.models.adapted_mlp import AdaptedMLP, Call, Mode, in_mode
from fastadapt.models.baselines import (
    Baseline,
    TunedNorms,
    TunedWeights,
    switch_norms,
    tuned_weights,
    weights_of,
)
from fastadapt.models.block_inputs import BlockInputs, record_inputs
from fastadapt.models.pair import ModelPair, PairConfig, PairMismatchError

__all__ = [
    "AdaptedMLP",
    "BlockInputs",
    "Mode",
    "ModelPair",
    "PairConfig",
    "PairMismatchError",
    "ReplacementModel",
]


class ReplacementModel(nn.Module):
    """Target, hybrid and replacement in one Hugging Face model, :attr:`model`.

    ``model`` is the target whose MLPs are :class:`AdaptedMLP`; ``generate``, hooks and third-party
    tools work on it in each mode. Everything but the adapters is frozen.

    Args:
        pair: the two models. Its target is changed in place: its MLPs are wrapped.
        adapters: one per layer, of the MLP's widths, all of one kind: transcoders, or weights of
            the model (:class:`fastadapt.models.baselines.TunedWeights`) of the names and shapes
            that it has.
    """

    def __init__(self, pair: ModelPair, adapters: nn.ModuleList) -> None:
        super().__init__()
        paths = pair.paths
        decoder = getattr(pair.target, paths.decoder)
        layers = getattr(decoder, paths.layers)
        _check_fit(pair, adapters)
        pair.target.requires_grad_(False)
        pair.base_mlps.requires_grad_(False)
        if isinstance(getattr(layers[0], paths.mlp), AdaptedMLP):
            raise UserError("this pair's target already carries adapters; load the pair again")
        for layer, base, adapter in zip(layers, pair.base_mlps, adapters, strict=True):
            setattr(layer, paths.mlp, AdaptedMLP(getattr(layer, paths.mlp), base, adapter))
        if isinstance(adapters[0], TunedNorms):
            switch_norms(pair)
        self.pair = pair
        self.model = pair.target
        self.adapters = adapters
        self.paths = paths

    @classmethod
    def create(
        cls,
        pair: ModelPair,
        config: AdapterConfig | Baseline,
        *,
        seed: int = 42,
        dtype: torch.dtype | None = None,
        runs_on: torch.device | None = None,
    ) -> ReplacementModel:
        """Create a replacement model with new adapters on the pair's device.

        ``config``: the settings of transcoders, or a baseline (``mlp`` or ``norms``), whose new
        weights are copies of the hybrid's.
        ``dtype``: of transcoders, the pair's by default. ``seed`` determines ``W_enc``.
        ``runs_on``: device that the model is moved to before it runs, if another.
        """
        if not isinstance(config, AdapterConfig):
            return cls(pair, tuned_weights(pair, config))
        generator = torch.Generator().manual_seed(seed)
        weight = next(pair.base_mlps.parameters())
        config.check_runs(runs_on or weight.device, dtype or weight.dtype)
        adapters = nn.ModuleList(
            TranscoderAdapter(
                pair.target.config.hidden_size,
                config,
                device=weight.device,
                dtype=dtype or weight.dtype,
                generator=generator,
            )
            for _ in pair.base_mlps
        )
        return cls(pair, adapters)

    def set_adapters(self, adapters: nn.ModuleList) -> None:
        """Replace the adapters, so that several runs share one pair in memory.

        Args:
            adapters: as the constructor takes them, on the pair's device.
        """
        if adapters is self.adapters:
            return
        _check_fit(self.pair, adapters)
        for mlp, adapter in zip(self.mlps, adapters, strict=True):
            mlp.adapter = adapter
        if isinstance(adapters[0], TunedNorms):
            switch_norms(self.pair)
        self.adapters = adapters

    @property
    def n_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.adapters)

    @property
    def d_model(self) -> int:
        """Width of the residual stream, D."""
        return int(self.model.config.hidden_size)

    @property
    def n_features(self) -> int:
        """Features per layer, F; 0 for baselines."""
        first = self.adapters[0]
        return first.n_features if isinstance(first, TranscoderAdapter) else 0

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return next(self.model.parameters()).device

    @property
    def head(self) -> Tensor:
        """``[V, D]``, the weight of the language-model head."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def softcap(self) -> float | None:
        """Gemma 2's cap on the final logits, where the model has one."""
        cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        return cap

    @property
    def mlps(self) -> list[AdaptedMLP]:
        """The :class:`AdaptedMLP` of each layer."""
        return [getattr(block, self.paths.mlp) for block in self.blocks]

    @property
    def blocks(self) -> nn.ModuleList:
        """transformers' own decoder layers."""
        return getattr(getattr(self.model, self.paths.decoder), self.paths.layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The Hugging Face model's forward, in the current mode."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, in the current mode."""
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[ReplacementModel]:
        """Set the mode inside the context; outside, it is ``replacement``."""
        with in_mode(self.mlps, mode):
            yield self

    @torch.no_grad()
    def block_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> BlockInputs:
        """Record the arguments of each block in one call of the model's own forward.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: bool ``[B, T]``, or None where no token is padding.

        Returns:
            The embeddings ``[B, T, D]`` (scaled as the architecture does) and each block's keyword
            arguments: attention mask, rotary embeddings, positions.
        """
        return record_inputs(self.model, self.paths, input_ids, attention_mask)

    def block(
        self,
        layer: int,
        hidden: Tensor,
        arguments: dict[str, Any],
        mode: Mode,
        *,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: CodeLayout | None = None,
        return_codes: bool = False,
    ) -> tuple[Tensor, Aux | None]:
        """Block ``layer`` (0-based) of the given mode: ``[B, T, D]`` to ``[B, T, D]``, and the aux.

        The aux is that of a transcoder, in the mode ``replacement``; else None.

        The mode is set and restored in here, so that a recompute under checkpointing, which runs
        after the caller's contexts have closed and on a GPU in another thread, is the same call.
        ``mask``, ``padding``, ``plan`` and ``return_codes`` go to the adapter
        (:meth:`TranscoderAdapter.forward`).
        """
        block = self.blocks[layer]
        call = Call(mask, padding, plan, return_codes)
        mlp: AdaptedMLP = getattr(block, self.paths.mlp)
        with mlp.call_context(mode, call):
            out: Tensor = block(hidden, **arguments)
        return out, call.aux

    @torch.no_grad()
    def features(self, text: str | Sequence[int] | Tensor) -> list[SparseCodes]:
        """Return the active features of every layer on a text, layer 0 first.

        The hidden states are those of the mode ``replacement``; the model's mode stays as it is.

        Args:
            text: a text, tokenized as the pair's tokenizer does by default; or token ids, int64
                ``[T]`` or ``[B, T]`` without padding.

        Returns:
            For each layer the codes of its adapter: ``tokens`` (index into the flattened ids),
            ``features`` and ``values``, one entry per active feature.

        Raises:
            UserError: the trained weights are no transcoders, or the ids have another shape.

        Example:
            >>> from fastadapt import AdapterConfig, ModelPair, PairConfig, ReplacementModel
            >>> pair = ModelPair.load(PairConfig("organism/target", "organism/base", device="cpu"))
            >>> model = ReplacementModel.create(pair, AdapterConfig(n_features=64))
            >>> [len(codes.values) > 0 for codes in model.features("the answer is 4")]
            [True, True, True, True]
        """
        if self.n_features == 0:
            raise UserError("features: this run trained weights of the model, not transcoders")
        if isinstance(text, str):
            text = self.pair.tokenizer(text)["input_ids"]
        ids = torch.as_tensor(text, dtype=torch.int64, device=self.device)
        if ids.ndim not in (1, 2) or ids.numel() == 0:
            raise UserError(f"features: expected token ids [T] or [B, T], got {list(ids.shape)}")
        inputs = self.block_inputs(ids if ids.ndim == 2 else ids[None], None)
        hidden, layers = inputs.hidden, []
        for layer, arguments in enumerate(inputs.arguments):
            hidden, aux = self.block(layer, hidden, arguments, "replacement", return_codes=True)
            assert aux is not None
            assert aux.codes is not None
            layers.append(aux.codes)
            self.reshard_layer(layer)
        return layers

    def reshard_layer(self, layer: int) -> None:
        """Reshard a block's FSDP parameters after its last call in a layer; no-op without FSDP."""
        from torch.distributed.fsdp import FSDPModule

        block = self.blocks[layer]
        if isinstance(block, FSDPModule):
            block.reshard()

    def final_norm(self, hidden: Tensor, mode: Mode) -> Tensor:
        """Apply the norm before the head in the given mode; modes differ for refit norms."""
        norm = getattr(getattr(self.model, self.paths.decoder), self.paths.norm)
        with self.mlps[-1].call_context(mode, None):
            out: Tensor = norm(hidden)
        return out


def _check_fit(pair: ModelPair, adapters: nn.ModuleList) -> None:
    n_layers, width = len(pair.base_mlps), pair.target.config.hidden_size
    if len(adapters) != n_layers:
        raise UserError(f"expected {n_layers} adapters, one per layer, got {len(adapters)}")
    if len({type(adapter) for adapter in adapters}) > 1:
        raise UserError("adapters of several kinds: one kind for all layers is expected")
    for i, adapter in enumerate(adapters):
        if (adapter.d_in, adapter.d_out) != (width, width):
            raise UserError(
                f"adapter of layer {i}: the model's width is {width}, "
                f"got d_in={adapter.d_in}, d_out={adapter.d_out}"
            )
    tuned = [adapter for adapter in adapters if isinstance(adapter, TunedWeights)]
    for i, wanted in enumerate(weights_of(pair, tuned[0].kind) if tuned else ()):
        tuned[i].check_fits(wanted, i)
