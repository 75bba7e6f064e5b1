"""The MLP of a block in three modes: target, hybrid (the base's), replacement (with the adapter).

For baselines (:mod:`fastadapt.models.baselines`) the third mode computes with the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import Aux, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import SMALL_ENTRIES, CodeLayout

Mode = Literal["target", "hybrid", "replacement"]
MODES: tuple[Mode, ...] = ("target", "hybrid", "replacement")


@dataclass
class Call:
    """Arguments that a call of a block passes to its MLP, and the aux that the MLP returns."""

    mask: Tensor | None
    padding: Tensor | None
    plan: CodeLayout | None
    return_codes: bool = False
    aux: Aux | None = None


class AdaptedMLP(nn.Module):
    """Replaces the target's MLP in its block; its mode selects what it computes.

    Returns one tensor, as the block expects. The adapter's penalty and statistics go to the call of
    :meth:`call_context`; without one (``generate``) they are dropped. ``target`` is None where the
    target's MLP was not loaded; the mode ``target`` then raises.
    """

    def __init__(self, target: nn.Module | None, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.base = base
        self.adapter = adapter
        self.mode: Mode = "replacement"
        self.call: Call | None = None

    @contextmanager
    def call_context(self, mode: Mode, call: Call | None) -> Iterator[None]:
        """Set ``mode`` and ``call`` inside the context."""
        before = self.mode, self.call
        self.mode, self.call = mode, call
        try:
            yield
        finally:
            self.mode, self.call = before

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "target":
            if self.target is None:
                raise UserError(
                    "this checkpoint does not hold the target's MLPs; expected mode hybrid or "
                    "replacement, got target"
                )
            return self.target(x)
        if self.mode == "hybrid":
            return self.base(x)
        if not isinstance(self.adapter, TranscoderAdapter):
            out: Tensor = self.adapter(x, self.base)
            return out
        call = self.call
        if call is None:
            return self.adapter(x, residual=self.base(x), plan=self._plan_of_capture(x))[0]
        # The base comes last: see fastadapt.models.recompute.
        out, call.aux = self.adapter(
            x,
            mask=call.mask,
            padding=call.padding,
            plan=call.plan,
            return_codes=call.return_codes,
        )
        return out + self.base(x)

    def _plan_of_capture(self, x: Tensor) -> CodeLayout | None:
        """A plan that asks the GPU nothing, while its work is captured as a graph.

        Small calls do without one, see the op; for others dense products hold any number of codes.
        """
        if not x.is_cuda or torch.compiler.is_compiling():
            return None
        assert isinstance(self.adapter, TranscoderAdapter)
        small = x.shape[:-1].numel() * self.adapter.n_features <= SMALL_ENTRIES
        capturing = torch.cuda.is_current_stream_capturing()
        return CodeLayout(dense=True) if capturing and not small else None


@contextmanager
def in_mode(mlps: Sequence[AdaptedMLP], mode: Mode) -> Iterator[None]:
    """Set the mode of a model's MLPs inside the context; restore what was there before.

    Raises:
        UserError: no such mode.
    """
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    before = [mlp.mode for mlp in mlps]
    for mlp in mlps:
        mlp.mode = mode
    try:
        yield
    finally:
        for mlp, old in zip(mlps, before, strict=True):
            mlp.mode = old
