"""One layer's transcoder adapter: its parameters, its call of the kernel, its file.

An adapter knows no model. It maps the input of an MLP to what fine-tuning added to that MLP's
output: ``a = activation(W_enc x + b_enc)``, ``A(x) = W_decᵀ a + b_dec`` (arXiv 2602.20904). It is a
*delta*: it is added to the frozen base MLP's output and never replaces it.

Shapes: T tokens, D width, F features; both weight matrices hold one row per feature.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import Plan, TranscoderStats, transcoder
from fastadapt.kernels.transcoder.reference import activate

SCHEMA_VERSION = 1
ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu")


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and activation of the adapters of a model, the same for every layer.

    Args:
        n_features: features per layer (F).
        activation: ``relu``, ``topk``, ``batch_topk`` or ``jumprelu``.
        k: active features per token: an integer for ``topk``; for ``batch_topk`` the mean over the
            tokens of a sequence, which may be fractional.
        bandwidth: ``jumprelu`` only: width ε of the straight-through window around the threshold.
        initial_threshold: ``jumprelu`` only: θ at the start, > 0.
        implementation: of the kernel: ``auto``, ``reference``, ``sparse`` or ``triton``.
    """

    n_features: int = 8192
    activation: str = "relu"
    k: float | None = None
    bandwidth: float | None = None
    initial_threshold: float | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise UserError(f"adapter.n_features must be at least 1, got {self.n_features}")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"adapter.activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        wants_k = self.activation in ("topk", "batch_topk")
        if wants_k != (self.k is not None):
            raise UserError(
                f"adapter.k is {'needed' if wants_k else 'not used'} with "
                f"activation={self.activation!r}, got k={self.k}"
            )
        if self.k is not None and not 0 < self.k <= self.n_features:
            raise UserError(
                f"adapter.k must lie in (0, n_features={self.n_features}], got {self.k}"
            )
        if self.activation == "topk" and self.k != int(self.k or 0):
            raise UserError(f"adapter.k must be an integer for topk, got {self.k}; see batch_topk")
        for name in ("bandwidth", "initial_threshold"):
            value = getattr(self, name)
            if (self.activation == "jumprelu") != (value is not None):
                use = "needed" if self.activation == "jumprelu" else "not used"
                raise UserError(
                    f"adapter.{name} is {use} with activation={self.activation!r}, got {value}"
                )
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"adapter.{name} must be a positive number, got {value}")


class Aux(NamedTuple):
    """What an adapter's call gives beside its output; see :func:`fastadapt.kernels.transcoder`."""

    penalty: Tensor
    stats: TranscoderStats


class TranscoderAdapter(nn.Module):
    """A wide sparse two-layer network beside one MLP.

    Parameters: ``W_enc [F, d_in]``, ``b_enc [F]``, ``W_dec [F, d_out]``, ``b_dec [d_out]``, and
    ``threshold [F]`` for ``jumprelu``. With ``batch_topk``, ``threshold`` is a 0-d buffer: a
    running mean of the smallest activation kept in training (:meth:`update_threshold`), which
    decides in ``eval()``, since ranking over a sequence is not causal.

    Initialisation (arXiv 2602.20904): ``W_enc ~ U(-1/√d_in, 1/√d_in)``, all else 0, so a fresh
    adapter adds nothing, and about half of its features fire.

    Args:
        d_in: width of the input, the MLP's (post-norm, norm weight included).
        config: features and activation.
        d_out: width of the output; ``d_in`` if not given.
        device, dtype: of the parameters.
        generator: source of ``W_enc``; torch's default one if not given. It must live on the CPU:
            the draw is made there in float32, so that it is the same on every device.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor | None

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
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        f = config.n_features
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(torch.empty(f, d_in, **kind))
        self.b_enc = nn.Parameter(torch.zeros(f, **kind))
        self.W_dec = nn.Parameter(torch.zeros(f, self.d_out, **kind))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **kind))
        if config.activation == "jumprelu":
            assert config.initial_threshold is not None
            self.threshold = nn.Parameter(torch.full((f,), config.initial_threshold, **kind))
        else:
            is_batch = config.activation == "batch_topk"
            start = torch.zeros((), device=device, dtype=torch.float32) if is_batch else None
            self.register_buffer("threshold", start)
        if self.W_enc.device.type != "meta":
            bound = 1 / math.sqrt(d_in)
            draw = torch.empty(f, d_in, dtype=torch.float32).uniform_(
                -bound, bound, generator=generator
            )
            with torch.no_grad():
                self.W_enc.copy_(draw)

    @property
    def n_features(self) -> int:
        """Number of features, F."""
        return self.config.n_features

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, n_features={self.n_features}, d_out={self.d_out}, "
            f"activation={self.config.activation}"
        )

    def _kernel(self) -> dict[str, Any]:
        """Activation arguments of the kernel, as this module's mode asks."""
        c = self.config
        common: dict[str, Any] = {"activation": c.activation, "implementation": c.implementation}
        if c.activation == "topk":
            return {**common, "k": int(c.k or 0)}
        if c.activation == "batch_topk":
            return {**common, **({"k": c.k} if self.training else {"threshold": self.threshold})}
        if c.activation == "jumprelu":
            return {**common, "threshold": self.threshold, "bandwidth": c.bandwidth}
        return common

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, Aux]:
        """``residual + A(x)`` for every token, with the penalty and the counts.

        Args:
            x: ``[T, d_in]`` or ``[S, T, d_in]``, one row per sequence and stream.
            residual: ``[..., d_out]``, what the output is added to (the base MLP's output); 0 if
                not given. It is not modified.
            mask: bool or float weights of x's leading shape: how much each token counts in the
                penalty; statistics count tokens of non-zero weight. All 1 if not given.
            padding: bool of x's leading shape, true at tokens that do not exist.
            plan: how the kernel goes about it; see :class:`fastadapt.kernels.transcoder.Plan`.

        Returns:
            ``out [..., d_out]`` in x's dtype, and :class:`Aux`.
        """
        out, penalty, stats = transcoder(
            x,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            residual=residual,
            mask=mask,
            padding=padding,
            plan=plan,
            **self._kernel(),
        )
        return out, Aux(penalty, stats)

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations ``a [..., F]`` of ``x [T, d_in]`` or ``[S, T, d_in]``, as in training
        or as in ``eval()``: what SAE codebases call ``encode``.

        Meant for inspection: it makes every one of the ``[..., F]`` activations.
        """
        z = nn.functional.linear(x, self.W_enc, self.b_enc)
        kernel = self._kernel()
        a = activate(
            z if z.dim() == 3 else z[None],
            kernel["activation"],
            kernel.get("k"),
            kernel.get("threshold"),
            kernel.get("bandwidth"),
            None,
        )
        return a.view(z.shape)

    def decode(self, a: Tensor) -> Tensor:
        """``W_decᵀ a + b_dec`` as ``[..., d_out]`` for dense activations ``a [..., F]``."""
        return a @ self.W_dec + self.b_dec

    @torch.no_grad()
    def update_threshold(self, min_active: Tensor, decay: float = 0.999) -> None:
        """Move ``batch_topk``'s running threshold towards the smallest activation of a step.

        The first value seen is taken as it is. A step in which nothing fired (NaN) changes nothing.
        Called by the trainer after a step; nothing else changes the buffer.
        """
        if self.config.activation != "batch_topk" or self.threshold is None:
            raise UserError(f"{self.config.activation} has no running threshold to update")
        seen = min_active.to(self.threshold)
        moved = torch.where(self.threshold == 0, seen, torch.lerp(seen, self.threshold, decay))
        self.threshold.copy_(torch.where(seen.isnan(), self.threshold, moved))


# --- a folder of adapters -------------------------------------------------------------------------


def _tensors(adapter: TranscoderAdapter) -> dict[str, Tensor]:
    return {name: t.detach().contiguous() for name, t in adapter.state_dict().items()}


def save_adapters(
    adapters: Iterable[nn.Module],
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter per layer as ``fastadapt.json`` and ``layer_{i}.safetensors``.

    The JSON file states schema version, shapes, orientation (one row per feature in both matrices),
    the hook (the MLP's input, after the norm and its weight), that the adapter is *additive*, and
    ``metadata`` (model ids, revisions, losses, measured L0). It is written last, so that a folder
    that has it is whole.

    Args:
        adapters: layer 0 first; one configuration and one pair of widths for all.
        folder: made if it is not there.
        metadata: JSON-serialisable.
    """
    from safetensors.torch import save_file

    layers = [adapter for adapter in adapters if isinstance(adapter, TranscoderAdapter)]
    if not layers:
        raise UserError("there is no adapter to save")
    first = layers[0]
    for i, adapter in enumerate(layers):
        if (adapter.config, adapter.d_in, adapter.d_out) != (first.config, first.d_in, first.d_out):
            raise UserError(f"layer {i} differs from layer 0 in configuration or width")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "fastadapt.json").unlink(missing_ok=True)
    for i, adapter in enumerate(layers):
        save_file(_tensors(adapter), path / f"layer_{i}.safetensors")
    card = {
        "schema_version": SCHEMA_VERSION,
        "kind": "transcoder_adapter",
        "additive": True,
        "hook_in": "mlp.input (after the norm, norm weight included)",
        "hook_out": "mlp.output (added to the base MLP's, before any post-norm)",
        "orientation": {"W_enc": "[n_features, d_in]", "W_dec": "[n_features, d_out]"},
        "n_layers": len(layers),
        "d_in": first.d_in,
        "d_out": first.d_out,
        "adapter": asdict(first.config),
        "metadata": dict(metadata or {}),
    }
    (path / "fastadapt.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _read_card(path: Path) -> dict[str, Any]:
    card_file = path / "fastadapt.json"
    if not card_file.is_file():
        raise UserError(f"{path} holds no adapters: fastadapt.json is missing")
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{card_file} is not JSON: {e}") from e
    if not isinstance(card, dict):
        raise UserError(f"{card_file} must hold an object, got {type(card).__name__}")
    version = card.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{card_file}: schema_version is {version!r}, this fastadapt reads {SCHEMA_VERSION}"
        )
    if card.get("additive") is not True:
        raise UserError(f"{card_file}: 'additive' must be true: a replacement is no adapter")
    for key in ("n_layers", "d_in", "d_out"):
        if not isinstance(card.get(key), int) or card[key] < 1:
            raise UserError(f"{card_file}: {key} must be a positive integer, got {card.get(key)!r}")
    return card


def load_adapters(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.ModuleList, dict[str, Any]]:
    """Read what :func:`save_adapters` wrote: the adapters, layer 0 first, and the metadata.

    Strict: a missing, extra or misshapen file or tensor is a :class:`UserError` that names it.
    Parameters keep the dtype of the file unless ``dtype`` is given.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    card = _read_card(path)
    known = {f.name for f in fields(AdapterConfig)}
    settings = card.get("adapter")
    if not isinstance(settings, dict) or set(settings) - known:
        raise UserError(f"{path / 'fastadapt.json'}: 'adapter' holds unknown settings: {settings}")
    config = AdapterConfig(**settings)
    names = {f"layer_{i}.safetensors" for i in range(card["n_layers"])}
    found = {p.name for p in path.glob("layer_*.safetensors")}
    if names != found:
        raise UserError(
            f"{path}: layers of the adapters do not match fastadapt.json: "
            f"missing {sorted(names - found)}, unexpected {sorted(found - names)}"
        )
    adapters = nn.ModuleList()
    for i in range(card["n_layers"]):
        file = path / f"layer_{i}.safetensors"
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} cannot be read: {e}") from e
        adapter = TranscoderAdapter(card["d_in"], config, d_out=card["d_out"], device="meta")
        expected = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise UserError(
                    f"{file}: tensor {name}: expected {expected.get(name, 'none')}, "
                    f"got {shapes.get(name, 'none')}"
                )
        if dtype is not None:
            tensors = {
                name: t if name == "threshold" and t.dim() == 0 else t.to(dtype)
                for name, t in tensors.items()
            }
        adapter.load_state_dict(tensors, assign=True)
        adapters.append(adapter.to(device) if device is not None else adapter)
    return adapters, card["metadata"]
