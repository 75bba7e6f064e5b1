"""Choose which results of a block's forward pass are saved for its backward pass.

Four policies, from the least work to the least memory. Gradients are bitwise equal under all, and
each block of a step may have its own:

- ``none``: every result is saved.
- ``mlp``: the block is recomputed, except for the products of the MLP's linear layers before its
  activation (gate and up), attention outputs and sparse codes.
- ``attention``: the block is recomputed, except for attention outputs and sparse codes.
- ``full``: the block is recomputed, except for sparse codes.

Sparse codes are small, and saving them avoids a second encoder product. Dense codes, as in the
first steps, are as large as any activation and are recomputed. A recompute stops at the last tensor
that the backward pass needs. The frozen ``down_proj`` does not need its input, so its product is
not recomputed if it comes last (:class:`fastadapt.models.adapted_mlp.AdaptedMLP`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastadapt.kernels.transcoder import should_save

POLICIES = ("none", "mlp", "attention", "full")

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


#: Names of the ops that compute a linear layer.
_PRODUCT_OPS = frozenset(("aten::mm", "aten::addmm", "aten::linear"))


class _Inside:
    """Context in which the attribute ``now`` is true while one of ``modules`` runs.

    The context is entered in the forward pass and again in the recompute. The hooks exist inside
    it only, so that other calls of the modules do not pay for them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.now = False
        self._modules = modules
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for module in self._modules:
            self._hooks.enter_context(module.register_forward_pre_hook(partial(self._set, True)))
            # A recompute ends with an exception, which may be raised inside a module.
            after = module.register_forward_hook(partial(self._set, False), always_call=True)
            self._hooks.enter_context(after)

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def _set(self, now: bool, *_: Any) -> None:
        self.now = now


def recomputed(
    policy: str, run: Callable[..., Any], *args: Tensor, products: Sequence[nn.Module] = ()
) -> Any:
    """Return ``run(*args)``, saving for the backward pass only what ``policy`` selects.

    Args:
        policy: one of :data:`POLICIES`.
        run: a deterministic function of tensors; the backward pass calls it again.
        args: arguments of ``run``; they are saved.
        products: linear layers that ``run`` calls and whose results the policy ``mlp`` saves.

    Raises:
        ValueError: the policy does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "none":
        return run(*args)
    inside = _Inside(products if policy == "mlp" else ())

    def watched(*args: Tensor) -> Any:
        with inside:
            return run(*args)

    saves = partial(_should_save, policy in ("mlp", "attention"), inside)
    return checkpoint(
        watched,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, saves),
    )


def _should_save(
    attention: bool, products: _Inside, context: Any, op: Any, *args: Any, **_: Any
) -> bool:
    """Return whether the result of ``op`` is saved for the backward pass."""
    if should_save(op, args, getattr(context, "op_output", None)):
        return True
    if products.now and op.name() in _PRODUCT_OPS:
        return True
    return attention and op.name() in ATTENTION_OPS
