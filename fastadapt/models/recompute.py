"""Choose which results of a block's forward pass are saved for its backward pass.

Three policies, from the least work to the least memory. Gradients are bitwise equal under all:

- ``none``: every result is saved.
- ``attention``: the block is recomputed, except for attention outputs and sparse codes.
- ``full``: the block is recomputed, except for sparse codes.

Sparse codes are small, and saving them avoids a second encoder product. Dense codes, as in the
first steps, are as large as any activation and are recomputed. A recompute stops at the last tensor
that the backward pass needs. The frozen ``down_proj`` does not need its input, so its product is
not recomputed if it comes last (:class:`fastadapt.models.adapted_mlp.AdaptedMLP`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastadapt.kernels.transcoder import should_save

POLICIES = ("none", "attention", "full")

#: Names of the fused attention ops of torch and of flash-attn.
ATTENTION_OPS = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    )
)


def recomputed(policy: str, run: Callable[..., Any], *args: Tensor) -> Any:
    """Return ``run(*args)``, saving for the backward pass only what ``policy`` selects.

    Args:
        policy: one of :data:`POLICIES`.
        run: a deterministic function of tensors; the backward pass calls it again.
        args: arguments of ``run``; they are saved.

    Raises:
        ValueError: the policy does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "none":
        return run(*args)
    saves = partial(_should_save, policy == "attention")
    return checkpoint(
        run,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, saves),
    )


def _should_save(attention: bool, context: Any, op: Any, *args: Any, **_: Any) -> bool:
    """Return whether the result of ``op`` is saved for the backward pass."""
    if should_save(op, args, getattr(context, "op_output", None)):
        return True
    return attention and op.name() in ATTENTION_OPS
