"""What adapters, transcoders and SAEs share: parameters, activation, and the calls of the op.

All are ``a = activation(W_enc x + b_enc)`` and ``W_decᵀ a + b_dec``. They differ in what the result
is added to, in what the encoder reads, and in how they start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import (
    L1,
    CodeLayout,
    Penalty,
    TranscoderStats,
    transcode,
    transcoder,
)
from fastadapt.kernels.transcoder.reference import SparseCodes, accumulator, activate, row_shape

if TYPE_CHECKING:
    from fastadapt.adapter.module import AdapterConfig


class Aux(NamedTuple):
    """Second result of a call; see :func:`fastadapt.kernels.transcoder.transcoder`.

    Attributes:
        penalty: 0-d, the sparsity penalty of the activations; L1 if the call names no other.
        stats: counts over the tokens.
        codes: the sparse activations, if requested.
    """

    penalty: Tensor
    stats: TranscoderStats
    codes: SparseCodes | None = None


class SparseCoder(nn.Module):
    """Base class of :class:`~fastadapt.TranscoderAdapter`, :class:`~fastadapt.Transcoder` and
    :class:`~fastadapt.SAE`.

    The subclasses describe the parameters. A subclass calls :meth:`_initialise` at the end of its
    ``__init__``.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter | None
    threshold: Tensor | None

    def __init__(
        self,
        d_in: int,
        config: AdapterConfig,
        d_out: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        f = config.features
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(torch.empty(f, d_in, **kind))
        self.b_enc = nn.Parameter(torch.empty(f, **kind))
        self.W_dec = nn.Parameter(torch.empty(f, self.d_out, **kind))
        b_dec = nn.Parameter(torch.empty(self.d_out, **kind)) if config.bias else None
        self.register_parameter("b_dec", b_dec)
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.empty(f, **kind))
        else:
            is_batch = config.activation == "batch_topk"
            start = torch.empty((), device=device, dtype=torch.float32) if is_batch else None
            self.register_buffer("threshold", start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply ``fn`` to parameters and buffers, as ``to`` does; batch_topk's keeps its dtype.

        A running threshold of 16 bits would be rounded back to itself in every update.
        """
        before = self.threshold
        super()._apply(fn, recurse)
        after = self.threshold
        is_batch = self.config.activation == "batch_topk"
        if is_batch and before is not None and after is not None and after.dtype != before.dtype:
            exact = after if before.is_meta else before  # a meta tensor cannot be copied
            self.threshold = exact.to(after.device, before.dtype)
        return self

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Draw the start of the parameters, unless they are on the meta device."""
        if self.W_enc.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the parameters to those of a new module, such as after ``to_empty``.

        Args:
            generator: CPU generator for ``W_enc``; torch's default generator if not given.
                ``W_enc`` is drawn on the CPU in float32, so that it is the same on every device.
        """
        bound = 1 / math.sqrt(self.d_in)
        draw = torch.empty(self.W_enc.shape, dtype=torch.float32, device="cpu")
        self.W_enc.copy_(draw.uniform_(-bound, bound, generator=generator))
        for parameter in (self.b_enc, self.W_dec, self.b_dec):
            if parameter is not None:
                parameter.zero_()
        if self.threshold is not None:
            self.threshold.fill_(self.config.initial_threshold or 0.0)

    @property
    def n_features(self) -> int:
        """Number of features, F."""
        return self.config.features

    def decoder_bias(self) -> Tensor:
        """Return ``b_dec`` for the kernels; zeros ``[d_out]`` if the module has no ``b_dec``."""
        return self.W_dec.new_zeros(self.d_out) if self.b_dec is None else self.b_dec

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, n_features={self.n_features}, d_out={self.d_out}, "
            f"activation={self.config.activation}"
        )

    def _encoder_input(self, x: Tensor) -> Tensor:
        """Return what the encoder reads, for an input x ``[..., d_in]``."""
        return x

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W_enc, self.b_enc, self.W_dec, self.decoder_bias()

    def _kernel(self) -> dict[str, Any]:
        """Return the kernel's activation arguments for the mode, training or ``eval()``."""
        c = self.config
        common: dict[str, Any] = {"activation": c.activation, "implementation": c.implementation}
        if c.activation == "topk":
            return {**common, "k": int(c.k or 0)}
        if c.activation == "batch_topk":
            return {**common, **({"k": c.k} if self.training else {"threshold": self.threshold})}
        if c.activation == "jumprelu":
            return {**common, "threshold": self.threshold, "bandwidth": c.bandwidth}
        return common

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        padding: Tensor | None,
        plan: CodeLayout | None,
        return_codes: bool,
        penalty: Penalty = L1,
    ) -> tuple[Tensor, Aux]:
        """Return ``residual + W_decᵀ a + b_dec`` with the penalty and the counts."""
        out, cost, stats, codes = transcoder(
            self._encoder_input(x),
            *self._weights(),
            residual=residual,
            mask=mask,
            padding=padding,
            penalty=penalty.kind,
            penalty_scale=penalty.scale,
            plan=plan,
            return_codes=return_codes,
            **self._kernel(),
        )
        return out, Aux(cost, stats, codes)

    def _run_alone(
        self, x: Tensor, residual: Tensor | None, padding: Tensor | None, dense: bool | None
    ) -> Tensor:
        """Return the first result of :meth:`_run` alone, faster where no gradient is needed."""
        return transcode(
            self._encoder_input(x),
            *self._weights(),
            residual=residual,
            padding=padding,
            dense=dense,
            **self._kernel(),
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense activations ``a [..., F]`` of ``x [..., d_in]``, for inspection.

        The activations are those of the module's mode, training or ``eval()``. All ``[..., F]`` of
        them are allocated.
        """
        z = nn.functional.linear(self._encoder_input(x), self.W_enc, self.b_enc)
        kernel = self._kernel()
        threshold = kernel.get("threshold")
        if threshold is not None and not threshold.dim():  # as the op: compared in its own dtype
            threshold = threshold.to(accumulator(z.dtype)).expand(self.n_features)
        a = activate(
            z.reshape(*row_shape(z.shape[:-1]), self.n_features),
            kernel["activation"],
            kernel.get("k"),
            threshold,
            kernel.get("bandwidth"),
            None,
        )
        return a.view(z.shape)

    def decode(self, a: Tensor) -> Tensor:
        """Return ``W_decᵀ a + b_dec [..., d_out]`` for dense activations ``a [..., F]``."""
        return nn.functional.linear(a, self.W_dec.T, self.decoder_bias())

    @torch.no_grad()
    def update_threshold(self, min_active: Tensor, decay: float = 0.999) -> None:
        """Move ``batch_topk``'s running threshold towards the smallest active value of a step.

        Args:
            min_active: 0-d; NaN if no feature fired, which leaves the threshold unchanged. The
                first number becomes the threshold itself.
            decay: weight of the old threshold. The default averages over 1000 steps; a shorter run
                needs a smaller one, lest its threshold be that of weights long changed.

        Raises:
            UserError: the activation is not ``batch_topk``.
        """
        if self.config.activation != "batch_topk" or self.threshold is None:
            raise UserError(
                f"{self.config.activation} has no running threshold to update; use batch_topk"
            )
        new = min_active.to(self.threshold)
        mean = torch.where(self.threshold == 0, new, torch.lerp(new, self.threshold, decay))
        self.threshold.copy_(torch.where(new.isnan(), self.threshold, mean))
