"""Transcoder adapter of one layer, and its configuration.

An adapter maps the input of an MLP to the change that fine-tuning made to that MLP's output:
``a = activation(W_enc x + b_enc)``, ``A(x) = W_decᵀ a + b_dec`` (arXiv 2602.20904). The result is
*added* to the output of the frozen base MLP. An adapter does not depend on a model.

Shapes: T tokens, D width, F features; both weight matrices hold one row per feature.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter.coder import Aux, SparseCoder
from fastadapt.adapter.hooks import MLP_HOOKS
from fastadapt.errors import UserError
from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.transcoder import ACTIVATIONS, IMPLEMENTATIONS, L1, CodeLayout, Penalty

N_FEATURES = 8192  # arXiv 2602.20904, 7B models


@dataclass(frozen=True)
class AdapterConfig:
    """Shape, activation and implementation of the transcoders of a model, the same in every layer.

    Args:
        n_features: features per layer (F); 8192 if not given.
        activation: ``relu``, ``topk``, ``batch_topk`` or ``jumprelu``.
        k: active features per token: an integer for ``topk``; for ``batch_topk`` the mean over the
            tokens of a sequence, which may be fractional.
        bandwidth: ``jumprelu`` only: width ε of the straight-through window around the threshold.
        initial_threshold: ``jumprelu`` only: θ at the start, > 0.
        bias: whether adapters have ``b_dec``, which the sparsity penalty does not reach. Without
            it, only features add to the output of the base's MLPs.
        base_mlp: whether the base's MLP runs beside the adapter. Without it, the adapter computes
            the whole output of the MLP in the mode ``replacement``: it is an ordinary transcoder.
        implementation: implementation of the kernel: ``auto``, ``reference``, ``sparse`` (on a
            CPU) or ``triton`` (on a GPU); see :func:`fastadapt.kernels.transcoder.transcoder`.
            Files of earlier versions may name ``triton_fused``, which is read as ``triton``.

    Raises:
        UserError: an impossible value, or a setting that the activation needs or does not use.
    """

    n_features: int | None = None
    activation: str = "relu"
    k: float | None = None
    bandwidth: float | None = None
    initial_threshold: float | None = None
    bias: bool = True
    base_mlp: bool = True
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.implementation == "triton_fused":  # in files of earlier versions
            object.__setattr__(self, "implementation", "triton")
        n_features = self.features
        if n_features < 1:
            raise UserError(f"adapter.n_features must be at least 1, got {n_features}")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"adapter.activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        wants_k = self.activation in ("topk", "batch_topk")
        if wants_k != (self.k is not None):
            raise UserError(
                f"adapter.k is {'needed' if wants_k else 'not used'} with "
                f"activation={self.activation!r}, got k={self.k}; "
                f"{'give' if wants_k else 'omit'} adapter.k"
            )
        if self.k is not None and not 0 < self.k <= n_features:
            raise UserError(f"adapter.k must lie in (0, n_features={n_features}], got {self.k}")
        if self.activation == "topk" and self.k != int(self.k or 0):
            raise UserError(
                f"adapter.k must be an integer for topk, got {self.k}; batch_topk takes fractions"
            )
        if self.implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"adapter.implementation must be one of {', '.join(IMPLEMENTATIONS)}, "
                f"got {self.implementation!r}"
            )
        for name in ("bandwidth", "initial_threshold"):
            value = getattr(self, name)
            if (self.activation == "jumprelu") != (value is not None):
                use = "needed" if self.activation == "jumprelu" else "not used"
                raise UserError(
                    f"adapter.{name} is {use} with activation={self.activation!r}, got {value}; "
                    f"{'give' if use == 'needed' else 'omit'} adapter.{name}"
                )
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"adapter.{name} must be a positive, finite number, got {value}")

    @property
    def features(self) -> int:
        """Features per layer, F: ``n_features`` or its default."""
        return N_FEATURES if self.n_features is None else self.n_features

    @property
    def lowest_threshold(self) -> float | None:
        """Lower bound of JumpReLU thresholds in training; None for other activations.

        The bound is a tenth of the initial threshold or of the bandwidth, whichever is smaller. It
        is above 0, so that the gradient of a threshold, which is proportional to it, does not
        vanish.
        """
        if self.bandwidth is None or self.initial_threshold is None:
            return None
        return min(self.bandwidth, self.initial_threshold) / 10

    def check_runs(self, device: torch.device, dtype: torch.dtype) -> None:
        """Check that the implementation runs on ``device`` with parameters of ``dtype``.

        Raises:
            UserError: the implementation does not support ``device`` or ``dtype``.
        """
        name, kind, reason = self.implementation, device.type, ""
        if name == "sparse" and kind not in ("cpu", "meta"):
            reason = f"runs on a CPU, and the device is {kind}"
        elif name.startswith("triton") and kind != "meta":
            if not runs_triton(kind):
                reason = f"needs a GPU, and the device is {kind}"
            elif dtype == torch.float64:
                reason = "computes in float32 at most, and the parameters are float64"
            elif kind == "cpu" and dtype == torch.bfloat16:
                reason = "is interpreted on a CPU, where Triton multiplies bfloat16 wrongly"
        if reason:
            raise UserError(f"adapter.implementation: {name!r} {reason}; use 'auto'")


class TranscoderAdapter(SparseCoder):
    """Wide sparse two-layer network beside one MLP.

    Inputs may have any leading shape. ``[..., T, d]`` holds rows (sequences and streams) of T
    tokens, and ``batch_topk`` ranks the activations of each row. ``[d]`` is one token.

    Parameters: ``W_enc [F, d_in]``, ``b_enc [F]``, ``W_dec [F, d_out]``, ``b_dec [d_out]`` unless
    ``config.bias`` is false (then ``b_dec`` is None), and ``threshold [F]`` for ``jumprelu``. For
    ``batch_topk``, ``threshold`` is a 0-d buffer: a running mean of the smallest active value in
    training (:meth:`update_threshold`). In ``eval()`` it replaces the ranking, which is not causal
    over a sequence.

    Initialisation (arXiv 2602.20904): ``W_enc ~ U(-1/√d_in, 1/√d_in)`` and 0 for all other
    parameters. A new adapter therefore adds nothing, and about half of its features fire.

    Args:
        d_in: width of the MLP's input (after the norm, norm weight included).
        config: features and activation.
        d_out: width of the output; ``d_in`` if not given.
        device, dtype: device and dtype of the parameters.
        generator: CPU generator for ``W_enc``; torch's default generator if not given. ``W_enc`` is
            drawn on the CPU in float32, so that it is the same on every device.

    Example:
        >>> import torch
        >>> from fastadapt import AdapterConfig, TranscoderAdapter
        >>> adapter = TranscoderAdapter(8, AdapterConfig(n_features=32))
        >>> out, aux = adapter(torch.ones(5, 8))
        >>> tuple(out.shape), bool((out == 0).all()), int(aux.stats.n_tokens)
        ((5, 8), True, 5)
    """

    def __init__(
        self,
        d_in: int,
        config: AdapterConfig,
        *,
        d_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_in, config, d_out, device, dtype)
        self._initialise(generator)

    def card(self) -> dict[str, Any]:
        """Return the entries of ``fastadapt.json`` that describe this adapter."""
        place = "added to the base MLP's" if self.config.base_mlp else "in place of the base MLP's"
        return {
            "kind": "transcoder_adapter",
            "additive": self.config.base_mlp,
            "hook_in": "mlp.input (after the norm, norm weight included)",
            "hook_out": f"mlp.output ({place}, before any post-norm)",
            "hooks": {name: dict(hook) for name, hook in MLP_HOOKS._asdict().items()},
            "orientation": {"W_enc": "[n_features, d_in]", "W_dec": "[n_features, d_out]"},
            "d_in": self.d_in,
            "d_out": self.d_out,
            "adapter": asdict(self.config) | {"n_features": self.n_features},
        }

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: CodeLayout | None = None,
        return_codes: bool = False,
        penalty: Penalty = L1,
    ) -> tuple[Tensor, Aux]:
        """Return ``residual + A(x)`` for every token, with the penalty and the counts.

        Args:
            x: ``[..., d_in]``.
            residual: ``[..., d_out]``, usually the base MLP's output; 0 if not given. It is not
                modified.
            mask: bool or float weight of each token in the penalty, of x's leading shape; 1 if not
                given. Statistics count the tokens of non-zero weight.
            padding: bool of x's leading shape, true at padding.
            plan: layout of the codes (:class:`fastadapt.kernels.transcoder.CodeLayout`). If not
                given, the kernel reads the number of codes, which waits for the device.
            return_codes: also return the sparse activations, as ``Aux.codes``.
            penalty: function of the activations that ``Aux.penalty`` sums.

        Returns:
            ``out [..., d_out]`` in x's dtype, and :class:`Aux`.
        """
        return self._run(x, residual, mask, padding, plan, return_codes, penalty)

    def transcode(
        self, x: Tensor, residual: Tensor | None = None, dense: bool | None = None
    ) -> Tensor:
        """Return ``residual + A(x)`` alone, faster than :meth:`forward` for generation.

        Args:
            x: ``[..., d_in]``.
            residual: ``[..., d_out]``; 0 if not given. It is not modified.
            dense: whether to decode by a dense product; chosen if not given, see
                :func:`fastadapt.kernels.transcoder.transcode`.

        Returns:
            ``[..., d_out]`` in x's dtype.
        """
        return self._run_alone(x, residual, None, dense)
