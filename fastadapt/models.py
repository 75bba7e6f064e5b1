"""A pair of models as one: target, hybrid and replacement behind a single Hugging Face model.

The *target* is the fine-tuned model. The *hybrid* is the target with the base model's MLPs. The
*replacement* is the hybrid with an adapter beside every base MLP. They share attention, norms,
embeddings and head, so a pair costs the target and the base's MLP weights, nothing more.

Blocks are called through transformers' own modules: no copy of a model's forward lives here.
Masks and rotary embeddings come from one call of the model's own forward
(:meth:`ReplacementModel.block_inputs`); they are never rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt.adapter import AdapterConfig, Aux, TranscoderAdapter
from fastadapt.block_inputs import BlockInputs, record_inputs
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import Plan
from fastadapt.pair import ModelPair, PairConfig, PairMismatchError

__all__ = [
    "AdaptedMLP",
    "BlockInputs",
    "Mode",
    "ModelPair",
    "PairConfig",
    "PairMismatchError",
    "ReplacementModel",
]

Mode = Literal["target", "hybrid", "replacement"]
MODES: tuple[Mode, ...] = ("target", "hybrid", "replacement")


@dataclass
class _Call:
    """What an open call hands to the MLP inside a block, and what the MLP hands back."""

    mask: Tensor | None
    padding: Tensor | None
    plan: Plan | None
    aux: Aux | None = None


class AdaptedMLP(nn.Module):
    """Stands where the target's MLP stood and knows three modes.

    Returns one tensor, as the block expects. The adapter's penalty and statistics go to the call
    that :meth:`running` opened; where none is open (``generate``) they are dropped.
    """

    def __init__(self, target: nn.Module, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.base = base
        self.adapter = adapter
        self.mode: Mode = "replacement"
        self.call: _Call | None = None

    @contextmanager
    def running(self, mode: Mode, call: _Call | None) -> Iterator[None]:
        """Take ``mode`` and ``call`` inside the context; restore what was there before."""
        before = self.mode, self.call
        self.mode, self.call = mode, call
        try:
            yield
        finally:
            self.mode, self.call = before

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "target":
            return self.target(x)
        out: Tensor = self.base(x)
        if self.mode == "hybrid":
            return out
        call = self.call
        if call is None:
            return self.adapter(x, residual=out)[0]
        out, call.aux = self.adapter(
            x, residual=out, mask=call.mask, padding=call.padding, plan=call.plan
        )
        return out


class ReplacementModel(nn.Module):
    """Target, hybrid and replacement in one Hugging Face model, :attr:`model`.

    ``model`` is the target whose MLPs are :class:`AdaptedMLP`; ``generate``, hooks and third-party
    tools work on it in each mode. Everything but the adapters is frozen.

    Args:
        pair: the two models. Its target is changed in place: its MLPs are wrapped.
        adapters: one per layer, of the MLP's widths.
    """

    def __init__(self, pair: ModelPair, adapters: nn.ModuleList) -> None:
        super().__init__()
        paths = pair.paths
        decoder = getattr(pair.target, paths.decoder)
        layers = getattr(decoder, paths.layers)
        if len(adapters) != len(layers):
            raise UserError(f"{len(layers)} layers want as many adapters, got {len(adapters)}")
        width = pair.target.config.hidden_size
        for i, adapter in enumerate(adapters):
            if (adapter.d_in, adapter.d_out) != (width, width):
                raise UserError(
                    f"adapter of layer {i}: the model's width is {width}, "
                    f"got d_in={adapter.d_in}, d_out={adapter.d_out}"
                )
        pair.target.requires_grad_(False)
        pair.base_mlps.requires_grad_(False)
        if isinstance(getattr(layers[0], paths.mlp), AdaptedMLP):
            raise UserError("this pair's target already carries adapters; load the pair again")
        for layer, base, adapter in zip(layers, pair.base_mlps, adapters, strict=True):
            setattr(layer, paths.mlp, AdaptedMLP(getattr(layer, paths.mlp), base, adapter))
        self.pair = pair
        self.model = pair.target
        self.adapters = adapters
        self.paths = paths

    @classmethod
    def create(
        cls,
        pair: ModelPair,
        config: AdapterConfig,
        *,
        seed: int = 42,
        dtype: torch.dtype | None = None,
        runs_on: torch.device | None = None,
    ) -> ReplacementModel:
        """A replacement model with fresh adapters on the pair's device.

        ``dtype`` of the adapters is the pair's unless given; ``seed`` fixes ``W_enc``. ``runs_on``
        is where the model will be moved before it runs, if it is not there yet.
        """
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
        """Features per layer, F."""
        first = self.adapters[0]
        assert isinstance(first, TranscoderAdapter)
        return first.n_features

    @property
    def device(self) -> torch.device:
        """Where the models live."""
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
        """The three-mode MLPs, layer 1 of the model first."""
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
        """Be the target, the hybrid or the replacement inside the context.

        Without one, the model is the replacement.
        """
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        mlps = self.mlps
        before = [mlp.mode for mlp in mlps]
        for mlp in mlps:
            mlp.mode = mode
        try:
            yield self
        finally:
            for mlp, old in zip(mlps, before, strict=True):
                mlp.mode = old

    @torch.no_grad()
    def block_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> BlockInputs:
        """Run the model's own forward with blocks that only record.

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
        plan: Plan | None = None,
    ) -> tuple[Tensor, Aux | None]:
        """Block ``layer`` (0-based) of the given mode: ``[B, T, D]`` to ``[B, T, D]``, and the aux.

        The mode is set and restored in here, so that a recompute under checkpointing, which runs
        after the caller's contexts have closed and on a GPU in another thread, is the same call.
        ``mask``, ``padding`` and ``plan`` go to the adapter (:meth:`TranscoderAdapter.forward`).
        """
        block = self.blocks[layer]
        call = _Call(mask, padding, plan)
        mlp: AdaptedMLP = getattr(block, self.paths.mlp)
        with mlp.running(mode, call):
            out: Tensor = block(hidden, **arguments)
        return out, call.aux

    def leave(self, layer: int) -> None:
        """Let go of what calls of a block gathered from other ranks; alone, there is nothing."""
        from torch.distributed.fsdp import FSDPModule

        block = self.blocks[layer]
        if isinstance(block, FSDPModule):
            block.reshard()

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the head."""
        return getattr(getattr(self.model, self.paths.decoder), self.paths.norm)(hidden)
