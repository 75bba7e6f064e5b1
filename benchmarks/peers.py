"""Load other projects' implementations (``pip install fastadapt[bench]``).

Every function returns None if its package is missing. A note describes how the peer's results
differ from this library's; it is recorded with every result of the peer.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KL",
    "FixedK",
    "fla_kl",
    "liger_chunked_kl",
    "liger_kl",
    "liger_rms_norm",
    "liger_swiglu",
    "missing",
    "sparsify_topk",
]


class FixedK(NamedTuple):
    """Codes of exactly k features per token and their decoder."""

    #: (x, W_enc, b_enc, k) -> values [N, k], indices [N, k]
    encode: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    #: (indices, values, W_dec) -> [N, d]
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    note: str


class KL(NamedTuple):
    """(student, teacher, head) -> mean KL(teacher || student), differentiable in the student."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    note: str


def missing() -> dict[str, str]:
    """Return the reason for every peer that is not available."""
    reasons = {}
    for name, package, find in (
        ("eai-sparsify", "sparsify", sparsify_topk),
        ("fla-core", "fla", fla_kl),
        ("liger-kernel", "liger_kernel", liger_kl),
    ):
        if importlib.util.find_spec(package) is None:
            reasons[name] = "not installed"
        elif find() is None:
            reasons[name] = "installed, but a package that it imports is missing"
    return reasons


def sparsify_topk() -> FixedK | None:
    """eai-sparsify's fused encoder and its decoder."""
    encoder = _module("sparsify", "fused_encoder")
    decoder = _module("sparsify", "xformers")
    if encoder is None or decoder is None:
        return None

    def encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        output = encoder.fused_encoder(x, W, b, k, "topk")
        return output.top_acts, output.top_indices

    return FixedK(
        encode,
        lambda indices, values, W: decoder.xformers_embedding_bag(indices, W, values),
        "exactly k features per token; no penalty, no statistics",
    )


def fla_kl() -> KL | None:
    """fla-core's fused linear and KL divergence."""
    module = _module("fla.modules", "fused_kl_div")
    if module is None:
        return None
    return KL(
        lambda student, teacher, head: module.fused_kl_div_loss(student, teacher, head, head),
        "mean only: no mask, no values per token; logits in the inputs' dtype",
    )


def liger_kl() -> KL | None:
    """liger-kernel's fused linear and generalised JSD, whose β = 0 is KL(teacher || student)."""
    module = _module("liger_kernel.transformers", "fused_linear_jsd")
    if module is None:
        return None
    loss = module.LigerFusedLinearJSD(jsd_beta=0.0)
    return KL(
        lambda student, teacher, head: loss(student, head, teacher, head, None),
        "mean only: no values per token",
    )


def liger_chunked_kl() -> KL | None:
    """liger-kernel's chunked distillation loss, compiled, with β = 0."""
    module = _module("liger_kernel.chunked_loss", "jsd_loss")
    if module is None:
        return None
    loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def mean(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        return loss(student, head, teacher, head, labels)

    return KL(mean, "mean only; also computes the head's gradient")


def liger_rms_norm() -> Callable[..., Tensor] | None:
    """liger-kernel's RMSNorm: (x, weight, eps)."""
    module = _module("liger_kernel.ops", "rms_norm")
    if module is None:
        return None
    apply = module.LigerRMSNormFunction.apply
    return lambda x, weight, eps: apply(x, weight, eps, 0.0, "llama", False, None)


def liger_swiglu() -> Callable[[Tensor, Tensor], Tensor] | None:
    """liger-kernel's silu(gate) * up."""
    module = _module("liger_kernel.ops", "swiglu")
    return None if module is None else module.LigerSiLUMulFunction.apply


def _module(package: str, name: str) -> ModuleType | None:
    """Import ``package.name``; for sparsify, skip ``__init__``, which imports a trainer."""
    top = package.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return None
    try:
        if top == "sparsify":
            _without_init(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"{package}.{name}")
    except ImportError:
        return None


def _without_init(package: str) -> None:
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    assert spec is not None
    module: Any = ModuleType(package)
    module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations or [])
    sys.modules[package] = module
