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

Selective checkpointing of torch sends every operation of a block through Python. Here only the
operations inside the modules whose results may be saved do so: attention without its linear layers,
the adapter, and the products.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastadapt.kernels.transcoder import SAVED_OPS, should_save

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
_CODE_OPS = frozenset(op.name() for op in SAVED_OPS)


@dataclass(frozen=True)
class SavingModules:
    """Modules of a block whose results a policy may save.

    Attributes:
        attention: the block's attention.
        adapter: the adapter of the block's MLP, or None where it does not run.
        products: linear layers of the MLP that read its input.
    """

    attention: nn.Module
    adapter: nn.Module | None
    products: Sequence[nn.Module]


def recomputed(policy: str, run: Callable[..., Any], *args: Tensor, modules: SavingModules) -> Any:
    """Return ``run(*args)``, saving for the backward pass only what ``policy`` selects.

    Args:
        policy: one of :data:`POLICIES`.
        run: a deterministic function of tensors; the backward pass calls it again.
        args: arguments of ``run``; they are saved.
        modules: modules that ``run`` calls and whose results may be saved.

    Raises:
        ValueError: the policy does not exist.
        RuntimeError: in the second backward pass of one forward pass.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "none":
        return run(*args)
    results: _Results = defaultdict(deque)
    return checkpoint(
        run,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (
            _Watching(policy, modules, partial(SaveResults, results)),
            _Watching(policy, modules, partial(ReplayResults, results)),
        ),
    )


#: By op and in the order of its calls: the result, or None where the recompute runs the op again.
_Results = defaultdict[Any, deque[Any]]


class SaveResults(TorchDispatchMode):
    """Save the results of the ops with these names."""

    def __init__(self, results: _Results, names: frozenset[str]) -> None:
        super().__init__()
        self._results, self._names = results, names

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        if op.name() in self._names:
            saved = op.name() not in _CODE_OPS or should_save(op, args, output)
            self._results[op].append(_detached(output) if saved else None)
        return output


def _detached(output: Any) -> Any:
    """Return detached aliases of an op's results, since autograd changes the results themselves."""
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)


class ReplayResults(TorchDispatchMode):
    """Return the results that :class:`SaveResults` saved in place of running the ops again."""

    def __init__(self, results: _Results, names: frozenset[str]) -> None:
        super().__init__()
        self._results, self._names = results, names

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name() in self._names:
            if not self._results[op]:
                raise RuntimeError(
                    f"{op.name()} has no saved result: the backward pass of one forward pass ran "
                    "twice, or the block's forward pass is not deterministic"
                )
            saved = self._results[op].popleft()
            if saved is not None:
                return saved
        return op(*args, **(kwargs or {}))


class _Watching:
    """Context in which the modules whose results a policy saves run inside a mode.

    The hooks exist in this context only, so that other calls of the modules do not pay for them.
    """

    def __init__(
        self, policy: str, modules: SavingModules, mode: Callable[[frozenset[str]], Any]
    ) -> None:
        self._policy, self._modules, self._mode = policy, modules, mode
        self._stack = ExitStack()

    def __enter__(self) -> None:
        watch, modules = self._stack.enter_context, self._modules
        if modules.adapter is not None:
            watch(_inside(modules.adapter, self._mode(_CODE_OPS)))
        if self._policy in ("mlp", "attention"):
            outside = tuple(modules.attention.children())
            watch(_inside(modules.attention, self._mode(ATTENTION_OPS), outside))
        if self._policy == "mlp":
            for product in modules.products:
                watch(_inside(product, self._mode(_PRODUCT_OPS)))

    def __exit__(self, *_: Any) -> None:
        self._stack.close()


@contextmanager
def _inside(
    module: nn.Module, mode: TorchDispatchMode, outside: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Enter ``mode`` while ``module`` runs, except while a submodule in ``outside`` runs."""
    entered = False

    def switch(enter: bool, *_: Any) -> None:
        nonlocal entered
        if enter and not entered:
            mode.__enter__()
        elif entered and not enter:
            mode.__exit__(None, None, None)
        entered = enter

    # A recompute ends with an exception, which may be raised inside a module.
    with ExitStack() as hooks:
        for part, enter in ((module, True), *((child, False) for child in outside)):
            before = part.register_forward_pre_hook(partial(switch, enter))
            after = part.register_forward_hook(partial(switch, not enter), always_call=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        try:
            yield
        finally:
            switch(False)
