"""Combine a pair of models into one Hugging Face model with three modes.

The *target* is the fine-tuned model. The *hybrid* is the target with the base model's MLPs. The
*replacement* is the hybrid with an adapter beside every base MLP. The modes share attention, norms,
embeddings and head, so a pair needs memory for the target and the base's MLPs only. Baselines train
weights of the model in place of adapters (:mod:`fastadapt.models.baselines`).

Blocks are called through transformers' own modules, so no forward of a model is copied here. Masks
and rotary embeddings come from one call of the model's own forward
(:meth:`ReplacementModel.block_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig, Aux, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import L1, CodeLayout, Penalty, SparseCodes
from fastadapt.models.adapted_mlp import AdaptedMLP, Call, Mode, in_mode
from fastadapt.models.baselines import (
    Baseline,
    LoraConfig,
    LowRankMLP,
    TunedNorms,
    TunedWeights,
    switch_norms,
    tuned_weights,
    weights_of,
)
from fastadapt.models.block_inputs import BlockInputs, record_inputs
from fastadapt.models.fused_blocks import FusedBlocks
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.pretrained import encode_text
from fastadapt.models.recompute import SavingModules
from fastadapt.models.sources.checks import PairMismatchError

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

    ``model`` is the target with :class:`AdaptedMLP` as MLPs. ``generate``, hooks and third-party
    tools work on ``model`` in every mode. Only the adapters are trainable. ``fused`` switches the
    fused kernels of frozen blocks (:mod:`fastadapt.models.fused_blocks`).

    Args:
        pair: the two models. The MLPs of the pair's target are wrapped in place.
        adapters: one module per layer, all of one kind: transcoders of the model's width, or
            weights of the model (:class:`fastadapt.models.baselines.TunedWeights`) with its names
            and shapes.

    Raises:
        UserError: the adapters do not fit the model, or the pair already has adapters.
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
        self.fused = FusedBlocks("auto" if pair.config.fused_blocks else "off")
        self.fused.fuse(decoder, pair.base_mlps, pair.target.config, paths)
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
        config: AdapterConfig | LoraConfig | Baseline,
        *,
        seed: int = 42,
        dtype: torch.dtype | None = None,
        runs_on: torch.device | None = None,
    ) -> ReplacementModel:
        """Create a replacement model with new adapters on the pair's device.

        Args:
            pair: the two models.
            config: settings of transcoders or of low-rank updates, or another baseline (``mlp``,
                ``norms`` or ``bias``), which starts as a copy of the weights in the hybrid
                (the target with the base's MLPs).
            seed: determines ``W_enc``, or the factors ``A`` of low-rank updates.
            dtype: dtype of transcoders; None is the pair's.
            runs_on: device that the model will run on; None is the pair's.
        """
        generator = torch.Generator().manual_seed(seed)
        if not isinstance(config, AdapterConfig):
            return cls(pair, tuned_weights(pair, config, generator))
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
            adapters: as in the constructor, on the pair's device.

        Raises:
            UserError: the adapters do not fit the model.
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
        """The weight ``[V, D]`` of the language-model head."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def softcap(self) -> float | None:
        """Soft cap of the final logits (Gemma 2), or None."""
        cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        return cap

    @property
    def mlps(self) -> list[AdaptedMLP]:
        """The :class:`AdaptedMLP` of each layer."""
        return [getattr(block, self.paths.mlp) for block in self.blocks]

    def saving_modules(self, layer: int, mode: Mode) -> SavingModules:
        """Return the modules of block ``layer`` whose results a recompute may need not repeat.

        In the mode ``target`` the products are the target's, in the other modes the base's.
        """
        mlp = self.mlps[layer]
        owner = mlp.target if mode == "target" else mlp.base
        return SavingModules(
            attention=self.paths.attention_of(self.blocks[layer]),
            adapter=mlp.adapter if mode == "replacement" else None,
            products=[getattr(owner, name) for name in self.paths.projections],
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """transformers' decoder layers, layer 0 first."""
        return getattr(getattr(self.model, self.paths.decoder), self.paths.layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Hugging Face model's forward in the current mode."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' ``generate`` in the current mode."""
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[ReplacementModel]:
        """Set the mode inside the context and restore it on exit; the default is ``replacement``.

        Raises:
            UserError: the mode does not exist.
        """
        with in_mode(self.mlps, mode):
            yield self

    @torch.no_grad()
    def block_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None
    ) -> BlockInputs:
        """Record the arguments of each block in one call of the model's own forward.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: bool ``[B, T]``, True on real tokens; None if no token is padding or
                all padding is on the right, where causal attention needs no mask.
            positions: int64 ``[B, T]``, positions that begin anew with each text of a row, for rows
                with several texts; needs ``attention_mask`` None.

        Returns:
            The embeddings ``[B, T, D]``, scaled where the architecture scales them, and each
            block's keyword arguments: attention mask, rotary embeddings, positions.

        Raises:
            RunError: the model passes its blocks an argument that may hold state.
        """
        return record_inputs(self.model, self.paths, input_ids, attention_mask, positions)

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
        penalty: Penalty = L1,
    ) -> tuple[Tensor, Aux | None]:
        """Run block ``layer`` (0-based) in the given mode on hidden states ``[B, T, D]``.

        The mode is set and restored in this method. A recompute under checkpointing runs after the
        caller's contexts have closed, and on a GPU in another thread; it must make the same call.

        Args:
            layer: index of the block.
            hidden: hidden states ``[B, T, D]``.
            arguments: the block's keyword arguments, from :meth:`block_inputs`.
            mode: the mode of the block's MLP.
            mask, padding, plan, return_codes, penalty: arguments of
                :meth:`TranscoderAdapter.forward`.

        Returns:
            The new hidden states ``[B, T, D]`` and the adapter's aux, which is None for baselines
            and for modes other than ``replacement``.
        """
        block = self.blocks[layer]
        call = Call(mask, padding, plan, return_codes, penalty)
        mlp: AdaptedMLP = getattr(block, self.paths.mlp)
        with mlp.call_context(mode, call):
            out: Tensor = block(hidden, **arguments)
        return out, call.aux

    @torch.no_grad()
    def features(self, text: str | Sequence[int] | Tensor) -> list[SparseCodes]:
        """Return the active features of every layer on a text, layer 0 first.

        Hidden states are computed in the mode ``replacement``; the model's mode does not change.

        Args:
            text: a text, read with the special tokens that the tokenizer adds; or token ids, int64
                ``[T]`` or ``[B, T]`` without padding.

        Returns:
            For each layer the codes of its adapter: ``tokens`` (index into the flattened ids),
            ``features`` and ``values``, one entry per active feature.

        Raises:
            UserError: the run has no transcoders, or the ids have a wrong shape.

        Example:
            >>> from fastadapt import AdapterConfig, ModelPair, PairConfig, ReplacementModel
            >>> pair = ModelPair.load(PairConfig("organism/target", "organism/base", device="cpu"))
            >>> model = ReplacementModel.create(pair, AdapterConfig(n_features=64))
            >>> [len(codes.values) > 0 for codes in model.features("the answer is 4")]
            [True, True, True, True]
        """
        if self.n_features == 0:
            raise UserError("features: expected transcoders, got a baseline's trained weights")
        if isinstance(text, str):
            text = encode_text(self.pair.tokenizer, text)
        ids = torch.as_tensor(text, dtype=torch.int64, device=self.device)
        if ids.ndim not in (1, 2) or ids.numel() == 0:
            raise UserError(
                f"text: expected one or more token ids [T] or [B, T], got shape {list(ids.shape)}"
            )
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
        """Reshard a block's FSDP parameters once it is no longer called; no-op without FSDP."""
        from torch.distributed.fsdp import FSDPModule

        block = self.blocks[layer]
        if isinstance(block, FSDPModule):
            block.reshard()

    def final_norm(self, hidden: Tensor, mode: Mode) -> Tensor:
        """Apply the model's last norm to ``[B, T, D]``; ``mode`` matters only for trained norms."""
        norm = getattr(getattr(self.model, self.paths.decoder), self.paths.norm)
        with self.mlps[-1].call_context(mode, None):
            out: Tensor = norm(hidden)
        return out


def _check_fit(pair: ModelPair, adapters: nn.ModuleList) -> None:
    n_layers, width = len(pair.base_mlps), pair.target.config.hidden_size
    if len(adapters) != n_layers:
        raise UserError(f"expected {n_layers} adapters, one per layer, got {len(adapters)}")
    names = sorted({type(adapter).__name__ for adapter in adapters})
    if len({type(adapter) for adapter in adapters}) > 1:
        raise UserError(f"adapters: expected the same class in all layers, got {', '.join(names)}")
    for i, adapter in enumerate(adapters):
        if (adapter.d_in, adapter.d_out) != (width, width):
            raise UserError(
                f"adapter of layer {i}: expected the model's width {width}, "
                f"got d_in={adapter.d_in}, d_out={adapter.d_out}"
            )
    tuned = [adapter for adapter in adapters if isinstance(adapter, TunedWeights)]
    if not tuned:
        return
    rank = tuned[0].rank if isinstance(tuned[0], LowRankMLP) else None
    for i, weights in enumerate(weights_of(pair, tuned[0].kind, rank)):
        tuned[i].check_fits(weights, i)
