"""What of a block's forward pass is kept for its backward pass, and what is made again.

Three policies, from the least work to the least memory, with the same bits in every gradient:

- ``none``: everything is kept.
- ``attention``: a block is recomputed, but for what its attention returned and its sparse codes.
- ``full``: a block is recomputed, but for its sparse codes.

Sparse codes are few, and with them the encoder's product is not made again. Dense ones, as at the
first steps, are as large as any activation: they are recomputed. A recompute ends with the last
tensor that the backward pass needs; the frozen ``down_proj`` needs no input of its own, so where it
comes last (:class:`fastadapt.models.adapted_mlp.AdaptedMLP`) its product is not made again either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastadapt.kernels.transcoder import should_save

POLICIES = ("none", "attention", "full")

#: What fused attention is called: torch's backends, and flash-attn's.
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
    """``run(*args)``, of which the backward pass finds what ``policy`` keeps.

    Args:
        policy: of :data:`POLICIES`.
        run: a function of tensors, the same when it is called again.
        args: its arguments; they are kept.
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
