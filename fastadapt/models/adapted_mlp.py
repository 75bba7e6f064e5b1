"""A block's MLP in three modes: target, hybrid (the base's MLP), replacement (base plus adapter).

An adapter with ``base_mlp`` false is the whole MLP of the mode ``replacement``. For baselines
(:mod:`fastadapt.models.baselines`), that mode uses the trained weights.
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
from fastadapt.kernels.transcoder import L1, SMALL_ENTRIES, CodeLayout, Penalty

Mode = Literal["target", "hybrid", "replacement"]
MODES: tuple[Mode, ...] = ("target", "hybrid", "replacement")


@dataclass
class Call:
    """Adapter arguments for one call of a block, and the :class:`Aux` that the adapter returned."""

    mask: Tensor | None
    padding: Tensor | None
    plan: CodeLayout | None
    return_codes: bool = False
    penalty: Penalty = L1
    aux: Aux | None = None


class AdaptedMLP(nn.Module):
    """Module in place of a block's MLP; :attr:`mode` selects the MLP that computes the output.

    ``forward`` maps ``[..., D]`` to ``[..., D]``. The adapter's penalty and statistics are written
    to the :class:`Call` set by :meth:`call_context`. They are not computed where no call is set, as
    in ``generate``. ``target`` is None if the target's MLP was not loaded; ``forward`` in the mode
    ``target`` then raises :class:`UserError`.
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
        """Set this MLP's ``mode`` and ``call`` inside the context; restore both on exit."""
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
            dense = self._dense_in_capture(x)
            residual = self.base(x) if self.adapter.config.base_mlp else None
            if not has_hooks(self.adapter):
                return self.adapter.transcode(x, residual, dense=dense)
            plan = None if dense is None else CodeLayout(dense)
            return self.adapter(x, residual=residual, plan=plan)[0]
        # The base runs last, so that a recompute can stop before its down_proj: see
        # fastadapt.models.recompute.
        out, call.aux = self.adapter(
            x,
            mask=call.mask,
            padding=call.padding,
            plan=call.plan,
            return_codes=call.return_codes,
            penalty=call.penalty,
        )
        return out + self.base(x) if self.adapter.config.base_mlp else out

    def _dense_in_capture(self, x: Tensor) -> bool | None:
        """Return True to force dense products in a CUDA graph's capture, which forbids a sync.

        The op chooses small calls without synchronizing.
        """
        if not x.is_cuda or torch.compiler.is_compiling():
            return None
        assert isinstance(self.adapter, TranscoderAdapter)
        small = x.shape[:-1].numel() * self.adapter.n_features <= SMALL_ENTRIES
        return True if torch.cuda.is_current_stream_capturing() and not small else None


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks observe the calls of a module, which must then run its own forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@contextmanager
def in_mode(mlps: Sequence[AdaptedMLP], mode: Mode) -> Iterator[None]:
    """Set the mode of a model's MLPs inside the context; restore their modes on exit.

    Raises:
        UserError: ``mode`` is not in :data:`MODES`.
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
