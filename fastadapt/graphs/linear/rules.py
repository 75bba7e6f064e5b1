"""Propagation rules: make a replacement model linear around one text, without changing its outputs.

Inside :func:`linearized`, every module returns the bits that it returns outside, but its gradient
is that of a linear map whose coefficients are held at their values on this text (relevance
propagation, RelP, arXiv 2508.21258). A gradient times the value that it belongs to is then a share
of the output, and the shares of all inputs sum to the output: relevance is conserved.

==========================  ======================================================================
part                        gradient
==========================  ======================================================================
RMSNorm                     ``x · (norm(x) / x)`` with the quotient held
SiLU, GELU                  ``g · (act(g) / g)`` with the quotient held
gate × up                   half to each factor
attention                   pattern held: queries and keys are constants, values are not
linear, rotary, residual    their own
adapter                     none (``leaves``), or its own with the active features held (``linear``)
target's MLP                that of the base's MLP in its place; its own (both ``ranks``)
low-rank part of a layer    its own; none (``ranks``)
==========================  ======================================================================

A quotient is 0 where its denominator is. No forward of a model is copied: the rules are hooks on
transformers' own modules, so that every attention implementation gives the held pattern, and memory
stays linear in the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.models.adapted_mlp import AdaptedMLP
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear

#: How adapters pass gradients: not at all, or through their active features. With ``ranks``, a
#: LoRA's rank components pass none, in the target's own MLPs; with ``linear ranks`` their own.
Features = Literal["leaves", "linear", "ranks", "linear ranks"]


class _Carry(torch.autograd.Function):
    """Return ``value`` unchanged; the gradient goes to ``carrier`` in its place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def carry(value: Tensor, carrier: Tensor) -> Tensor:
    """Return ``value`` bit for bit, differentiated as if it were ``carrier`` of the same shape.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = carry(x.exp(), 2 * x)
        >>> y.backward()
        >>> bool(y == x.exp()), x.grad.item()
        (True, 2.0)
    """
    if not carrier.requires_grad:
        return value.detach()
    out: Tensor = _Carry.apply(value.detach(), carrier)
    return out


def held_quotient(x: Tensor, y: Tensor) -> Tensor:
    """Return the constant ``y / x``, elementwise; 0 where ``x`` is 0."""
    x, y = x.detach(), y.detach()
    return torch.where(x == 0, 0, y / x)


@contextmanager
def linearized(
    model: ReplacementModel,
    features: Features = "leaves",
    *,
    layer: int | None = None,
    watched: Sequence[tuple[nn.Module, Hook]] = (),
) -> Iterator[None]:
    """Apply the rules to a model's modules inside the context.

    The graph of a forward inside the context stays valid after it.

    Args:
        model: a replacement model with transcoders. All of its modes keep their outputs.
        features: ``leaves``: adapters are constants. ``linear``: the activation of an active
            feature is its pre-activation, and passes its gradient to the MLP's input. ``ranks``:
            low-rank parts are constants in the mode ``target``. ``linear ranks``: they are not.
        layer: apply the rules to this block alone; None: to all modules.
        watched: linear layers with forward hooks that see their outputs before other rules do.

    Raises:
        UserError: the model has no transcoders, parts of its blocks have no rule, or ``features``
            is none of these.

    Example:
        >>> from fastadapt import AdapterConfig, ModelPair, PairConfig, ReplacementModel
        >>> pair = ModelPair.load(PairConfig("organism/target", "organism/base", device="cpu"))
        >>> model = ReplacementModel.create(pair, AdapterConfig(n_features=8))
        >>> with linearized(model):
        ...     h = model.block_inputs(torch.tensor([[5, 9]]), None).hidden.requires_grad_()
        ...     norm = model.final_norm(h, "replacement")
        >>> (gradient,) = torch.autograd.grad(norm[0, 1, 3], h)
        >>> torch.allclose((gradient * h).sum(), norm[0, 1, 3])
        True
    """
    if features not in get_args(Features):
        raise UserError(
            f"features: expected one of {', '.join(get_args(Features))}, got {features!r}"
        )
    check_model(model, features)
    root = getattr(model.model, model.paths.decoder) if layer is None else model.blocks[layer]
    mlps = model.mlps if layer is None else [model.mlps[layer]]
    with ExitStack() as stack:
        stack.enter_context(model.fused.off())
        low_rank = _low_rank_hooks(root) if features == "ranks" else ()
        for module, hook in (*low_rank, *watched, *_hooks(model, features, root, mlps)):
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def check_model(model: ReplacementModel, features: Features = "leaves") -> None:
    """Check that a model has the units of a graph, and that its blocks' operations have rules.

    Raises:
        UserError: it has not.
    """
    if has_ranks(features):
        if not any(isinstance(module, LowRankLinear) for module in model.blocks.modules()):
            raise UserError(
                "--stream ranks: expected a target that is a PEFT folder, got one without low-rank "
                "parts; use --stream target"
            )
    elif model.n_features == 0:
        raise UserError("graphs: expected a run with transcoders, got a baseline's trained weights")
    if not all(mlp.adapter.config.base_mlp for mlp in model.mlps):  # type: ignore[union-attr]
        raise UserError(
            "graphs: expected adapters beside the base's MLPs, got transcoders that replace them "
            "(adapter.base_mlp is false)"
        )
    if model.paths.without_rules:
        kind = model.model.config.model_type
        raise UserError(
            f"graphs: architecture {kind!r} is not supported: {model.paths.without_rules}"
        )


def has_ranks(features: Features) -> bool:
    """Return whether rank components are the units, in the target's own MLPs."""
    return features in ("ranks", "linear ranks")


#: A forward hook: it gets a module, its arguments and its output, and may return another output.
Hook = Callable[[Any, Any, Any], Any]


def _hooks(
    model: ReplacementModel, features: Features, root: nn.Module, mlps: Sequence[AdaptedMLP]
) -> Iterator[tuple[nn.Module, Hook]]:
    """Yield every module below ``root`` that has a rule, with the hook that applies it."""
    for module in root.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            yield module, _hold_quotient
        elif kind.endswith("Attention"):
            yield from _attention_hooks(module)
    used = [mlp.target if has_ranks(features) else mlp.base for mlp in mlps]
    for gated in {id(mlp): mlp for mlp in used}.values():  # a pair may share one module
        assert gated is not None
        for name in model.paths.projections:
            yield getattr(gated, name), _halve
        yield activation_of(gated), _hold_quotient
    if not has_ranks(features):
        for mlp in mlps:
            yield mlp, _linear_mlp if features == "linear" else _constant_adapter


def _low_rank_hooks(root: nn.Module) -> Iterator[tuple[nn.Module, Hook]]:
    for module in root.modules():
        if isinstance(module, LowRankLinear):
            yield module, _constant_ranks


@contextmanager
def without_ranks(model: ReplacementModel) -> Iterator[None]:
    """Leave out the low-rank parts of the target's blocks inside the context."""
    with ExitStack() as stack:
        for module in model.blocks.modules():
            if isinstance(module, LowRankLinear):
                hook = module.register_forward_hook(_plain_linear)
                stack.callback(hook.remove)
        yield


def _plain_linear(layer: LowRankLinear, args: Any, out: Tensor) -> Tensor:
    return nn.functional.linear(args[0], layer.weight, layer.bias)


def _constant_ranks(layer: LowRankLinear, args: Any, out: Tensor) -> Tensor:
    return carry(out, layer.scaled(nn.functional.linear(args[0], layer.weight)))


def _attention_hooks(attention: nn.Module) -> Iterator[tuple[nn.Module, Hook]]:
    if not hasattr(attention, "qkv_proj"):
        for name in ("q_proj", "k_proj"):
            yield getattr(attention, name), lambda _, args, out: out.detach()
        return
    joint: Any = attention.qkv_proj  # Phi-3: queries, keys and values in one product

    def hold(_: Any, args: Any, out: Tensor) -> Tensor:
        width = (out.shape[-1] - attention.o_proj.in_features) // 2  # type: ignore[union-attr, operator]
        pattern, values = out.split([out.shape[-1] - width, width], dim=-1)
        return torch.cat([pattern.detach(), values], dim=-1)

    yield joint, hold


def activation_of(mlp: nn.Module) -> nn.Module:
    """Return the module of a gated MLP that applies the activation to the gate."""
    activation: nn.Module = getattr(mlp, "act_fn", None) or mlp.activation_fn  # type: ignore[assignment]
    return activation


def _hold_quotient(_: Any, args: Any, out: Tensor) -> Tensor:
    return carry(out, args[0] * held_quotient(args[0], out))


def _halve(_: Any, args: Any, out: Tensor) -> Tensor:
    return carry(out, out / 2)


def _constant_adapter(mlp: AdaptedMLP, args: Any, out: Tensor) -> Tensor:
    return out if mlp.mode == "hybrid" else carry(out, mlp.base(args[0]))


def _linear_mlp(mlp: AdaptedMLP, args: Any, out: Tensor) -> Tensor:
    if mlp.mode != "target":
        return out  # its own gradient is the rule's
    assert isinstance(mlp.adapter, TranscoderAdapter)
    return carry(out, mlp.base(args[0]) + mlp.adapter(args[0])[0])
