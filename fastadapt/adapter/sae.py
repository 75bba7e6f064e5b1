"""Plain transcoders and sparse autoencoders on the transcoder op, for code that is not fastadapt's.

A transcoder computes an MLP's output from its input; an SAE computes its input again. Nothing is
added to their output, unlike to :class:`~fastadapt.TranscoderAdapter`'s. Names and shapes of the
parameters are those of the field's files, with one row per feature in both matrices.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastadapt.adapter.coder import Aux, SparseCoder
from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import CodeLayout


class Transcoder(SparseCoder):
    """Sparse network ``W_decᵀ a + b_dec + W_skip x`` with ``a = activation(W_enc x + b_enc)``.

    Inputs may have any leading shape. ``[..., T, d_in]`` holds rows of T tokens, and ``batch_topk``
    ranks the activations of each row: a batch ``[N, d_in]`` is one row. ``[d_in]`` is one token.

    Parameters: ``W_enc [F, d_in]``, ``b_enc [F]``, ``W_dec [F, d_out]``, ``b_dec [d_out]`` (None if
    ``config.bias`` is false), ``W_skip [d_out, d_in]`` (None without ``skip``), and ``threshold
    [F]`` for ``jumprelu``. For ``batch_topk``, ``threshold`` is a 0-d buffer: a running mean of the
    smallest active value in training (:meth:`update_threshold`), which replaces the ranking in
    ``eval()``. Parameters that are None are not in the state dict.

    Initialisation: ``W_enc ~ U(-1/√d_in, 1/√d_in)``, ``threshold`` is ``config.initial_threshold``,
    all others are 0. On the meta device nothing is drawn; see :meth:`reset_parameters`.

    Args:
        d_in: width of the input.
        config: features, activation and implementation. ``base_mlp`` is not used.
        d_out: width of the output; ``d_in`` if not given.
        skip: whether the output has a linear part, ``W_skip x``.
        device, dtype: device and dtype of the parameters.
        generator: CPU generator for ``W_enc``; torch's default generator if not given.

    Example:
        >>> import torch
        >>> from fastadapt import AdapterConfig, Transcoder
        >>> transcoder = Transcoder(8, AdapterConfig(32, "topk", k=3), d_out=4, skip=True)
        >>> x = torch.randn(5, 8)
        >>> transcoder(x).shape, (transcoder.encode(x) > 0).sum(-1).tolist()
        (torch.Size([5, 4]), [3, 3, 3, 3, 3])
        >>> out, aux = transcoder(x, return_aux=True)
        >>> aux.penalty.item(), aux.stats.n_active.item()  # the penalty of a decoder of zeros
        (0.0, 15)
    """

    W_skip: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        config: AdapterConfig,
        d_out: int | None = None,
        *,
        skip: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_in, config, d_out, device, dtype)
        W_skip = torch.empty(self.d_out, d_in, device=device, dtype=dtype) if skip else None
        self.register_parameter("W_skip", None if W_skip is None else nn.Parameter(W_skip))
        self._initialise(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the parameters to those of a new transcoder; ``generator`` draws ``W_enc``."""
        super().reset_parameters(generator)
        if self.W_skip is not None:
            self.W_skip.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, skip={self.W_skip is not None}"

    def _check(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.d_in,):
            raise ValueError(
                f"{type(self).__name__}: x must be of shape [..., d_in={self.d_in}]; "
                f"got {list(x.shape)}"
            )

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: CodeLayout | None = None,
        *,
        return_aux: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: CodeLayout | None = None,
        *,
        return_aux: Literal[True],
        return_codes: bool = False,
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: CodeLayout | None = None,
        *,
        return_aux: bool = False,
        return_codes: bool = False,
    ) -> Tensor | tuple[Tensor, Aux]:
        """Return the reconstruction; with ``return_aux`` also the penalty and the counts.

        Args:
            x: ``[..., d_in]``.
            mask: bool or float weight of each token in the penalty, of x's leading shape; 1 if not
                given. Statistics count the tokens of non-zero weight.
            padding: bool of x's leading shape, true at padding, where no feature fires.
            plan: layout of the codes (:class:`fastadapt.kernels.transcoder.CodeLayout`). If not
                given, a call with gradients reads the number of codes, which waits for a GPU.
            return_aux: also return :class:`Aux`.
            return_codes: with ``return_aux``: also return the sparse activations, as ``Aux.codes``.

        Returns:
            ``out [..., d_out]`` in x's dtype; with ``return_aux``, the pair of it and :class:`Aux`.

        Raises:
            TypeError, ValueError: as in :func:`fastadapt.kernels.transcoder.transcoder`.
                ``return_codes`` without ``return_aux``.
        """
        self._check(x)
        if return_codes and not return_aux:
            raise ValueError(f"{type(self).__name__}: return_codes=True needs return_aux=True")
        linear = None if self.W_skip is None else nn.functional.linear(x, self.W_skip)
        if return_aux:
            return self._run(x, linear, mask, padding, plan, return_codes)
        if plan is not None:
            return self._run(x, linear, mask, padding, plan, False)[0]
        return self._run_alone(x, linear, padding, None)

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense activations ``a [..., F]`` of ``x [..., d_in]``.

        They are those of the module's mode, training or ``eval()``, and have gradients. All
        ``[..., F]`` of them are allocated; ``Aux.codes`` are the active ones alone.
        """
        self._check(x)
        return super().encode(x)

    def decode(self, a: Tensor) -> Tensor:
        """Return ``W_decᵀ a + b_dec [..., d_out]`` for dense activations ``a [..., F]``.

        ``W_skip x`` is not part of the result: ``forward(x)`` is ``decode(encode(x)) + W_skip x``.
        """
        return super().decode(a)


class SAE(Transcoder):
    """Sparse autoencoder ``W_decᵀ a + b_dec``, ``a = activation(W_enc x + b_enc)``.

    With ``subtract_b_dec``, the encoder reads ``x - b_dec`` in place of x; the gradient of
    ``b_dec`` then comes from both places. Which of the two a checkpoint was trained with cannot be
    read from its tensors.

    Parameters, shapes of inputs, and results are those of :class:`Transcoder` without ``W_skip``.

    Initialisation: the rows of ``W_dec`` are random, of norm 1, and ``W_enc`` is equal to it.
    ``threshold`` is ``config.initial_threshold``, and the biases are 0.

    Args:
        d: width of the input and of the output.
        config: features, activation and implementation. ``base_mlp`` is not used.
        subtract_b_dec: whether the encoder reads ``x - b_dec``.
        device, dtype: device and dtype of the parameters.
        generator: CPU generator for ``W_enc``; torch's default generator if not given.

    Raises:
        UserError: ``subtract_b_dec`` without ``config.bias``.

    Example:
        >>> import torch
        >>> from fastadapt import SAE, AdapterConfig
        >>> sae = SAE(8, AdapterConfig(32), subtract_b_dec=True)
        >>> x = torch.randn(5, 8)
        >>> out, aux = sae(x, return_aux=True)
        >>> loss = (out - x).square().mean() + 1e-3 * aux.penalty
        >>> loss.backward()
        >>> torch.allclose(sae.decode(sae.encode(x)), sae(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        d: int,
        config: AdapterConfig,
        *,
        subtract_b_dec: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if subtract_b_dec and not config.bias:
            raise UserError(
                "subtract_b_dec needs b_dec, got a configuration with bias=False; "
                "set bias=True or omit subtract_b_dec"
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(d, config, **kind, generator=generator)
        self.subtract_b_dec = subtract_b_dec

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the parameters to those of a new SAE; ``generator`` draws ``W_enc``."""
        super().reset_parameters(generator)
        self.W_dec.copy_(nn.functional.normalize(self.W_enc.float(), dim=1))
        self.W_enc.copy_(self.W_dec)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, subtract_b_dec={self.subtract_b_dec}"

    def _encoder_input(self, x: Tensor) -> Tensor:
        if not self.subtract_b_dec:
            return x
        assert self.b_dec is not None
        return x - self.b_dec.to(x.dtype)
