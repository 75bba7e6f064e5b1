"""Memory of a training step, measured on fake tensors: no weight is read, no device is used.

The objective runs forward and backward at the true shapes, on a model of four layers with the
cutoff in the middle. :class:`LiveBytes` counts the tensors alive; the ops of
:mod:`fastadapt.kernels` declare the workspace that their code for the planned device allocates
inside a call. A layer's bytes depend on its role (:data:`Role`) and on what it saves for the
backward pass (:mod:`fastadapt.models.recompute`), and a step of any depth, with any cutoff and any
policies, is summed from its layers.

Two densities (shares of active entries) are measured, and the larger bytes count: dense products,
as in the first steps, and the highest density at which codes are stored. The estimate leaves out
the interpreter, libraries, and what an allocator holds beyond the tensors in it.

L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.linear_kl import autograd as linear_kl
from fastadapt.kernels.nmse import autograd as nmse
from fastadapt.kernels.transcoder import autograd as transcoder
from fastadapt.kernels.transcoder.codes import dense_share
from fastadapt.models.pair import DTYPES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training.config import TrainConfig
from fastadapt.training.optimizer import MOMENT_BYTES
from fastadapt.training.planning.flops import Setup, fake_pair
from fastadapt.training.planning.live_bytes import LiveBytes

FP32 = 4  #: bytes
_WORKSPACES: dict[Any, Callable[..., int]] = {
    **linear_kl.WORKSPACE_FORMULAS,
    **nmse.WORKSPACE_FORMULAS,
    **transcoder.WORKSPACE_FORMULAS,
}
_ops = torch.ops.fastadapt

#: The first layer, whose input has no gradient; a layer before the cutoff; the layer in which the
#: bridges start; a layer behind it, with both bridges.
Role = Literal["first", "before", "fork", "behind"]
_LAYERS = 4  # of the measured model: one of each role
_CUTOFF = 2


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on each device.

    Attributes:
        parts: bytes by part, each at its own largest.
        phases: bytes alive at the worst moment of each phase.
        parameters: number of trained parameters, on all devices together.
        host_bytes: bytes of frozen weights in host memory (``pair.offload``).
        state_bytes: bytes of the weights and moments in one checkpoint.
        adapter_bytes: bytes of the trained weights in the pair's dtype.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    parameters: int
    host_bytes: int
    state_bytes: int
    adapter_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of a step."""
        return max(self.phases.values())


class LayerBytes(NamedTuple):
    """Bytes that one layer needs in a step, without its weights.

    Attributes:
        saved: what the layer's forward pass leaves for the backward pass.
        codes: part of ``saved``.
        forward: the most alive in the forward pass, beyond what earlier layers saved.
        backward: the most alive in the backward pass, beyond what this and earlier layers saved and
            the counts of features of later layers.
    """

    saved: int
    codes: int
    forward: int
    backward: int


class MeasuredStep(NamedTuple):
    """Measurements of the fake model's step under one policy: sizes of weights, and bytes beside.

    Attributes:
        whole: bytes of frozen weights outside the blocks.
        frozen_block: bytes of a block's frozen weights without the base's MLP.
        mlp: bytes of a block's base MLP.
        trained: trained weights of each layer, in elements.
        logits: workspace of the head.
        counts: counts of a layer's features, alive until the step ends.
        head: the most alive in the head, beyond what the layers saved.
        behind_head: bytes alive after the head, beyond what the layers saved.
        layers: the layers by role.
        last: role of the last layer, whose backward pass starts beside the head's gradients.
    """

    whole: int
    frozen_block: int
    mlp: int
    trained: tuple[int, ...]
    logits: int
    counts: int
    head: int
    behind_head: int
    layers: dict[Role, LayerBytes]
    last: Role


@dataclass(frozen=True)
class FixedMemory:
    """Memory of a step on each device that depends on no batch; bytes unless stated otherwise.

    Attributes:
        weights: weights and moments by part.
        gradient: gradient of a layer, as summed over micro-batches.
        gradients: gradients of all layers.
        earlier: gradients of earlier micro-batches, alive in the whole step; 0 without them.
        reduced: copy of a layer's gradient in which FSDP sums it; 0 without FSDP.
        parameters: number of trained parameters, on all devices together.
        state: weights and moments in one checkpoint.
    """

    weights: dict[str, int]
    gradient: int
    gradients: int
    earlier: int
    reduced: int
    parameters: int
    state: int

    @classmethod
    def for_run(
        cls, config: TrainConfig, n_layers: int, measured: MeasuredStep, ranks: int = 1
    ) -> FixedMemory:
        """Return the fixed memory of a run whose model has ``n_layers`` layers."""
        optimizer = config.optimizer
        element = DTYPES[config.pair.dtype].itemsize
        has_masters = element < FP32 and optimizer.masters
        summed = FP32 if has_masters else element
        moment = MOMENT_BYTES if optimizer.moments == "8bit" else summed
        layer, last = measured.trained[0], measured.trained[-1]
        trained = (n_layers - 1) * layer + last
        block = measured.frozen_block + measured.mlp
        gathered = 4 * block * config.pair.offload  # two blocks, each beside its copy from the host
        if ranks > 1:
            gathered = 2 * (block + layer * element)
        share = 0 if config.pair.offload else 1 / ranks
        gradient = layer // ranks * summed
        gradients = n_layers * gradient
        return cls(
            weights={
                "frozen target": measured.whole + int(n_layers * measured.frozen_block * share),
                "frozen base MLPs": int(n_layers * measured.mlp * share),
                # Sharded adapters with masters are views of the masters.
                "adapters": 0 if ranks > 1 and has_masters else trained // ranks * element,
                "fp32 masters": trained // ranks * FP32 if has_masters else 0,
                "moments": int(2 * trained // ranks * moment),
                "gathered blocks": gathered,
            },
            gradient=gradient,
            gradients=gradients,
            earlier=gradients if optimizer.accumulation > ranks else 0,
            # FSDP sums a layer's gradients in a whole copy of the summed dtype.
            reduced=layer * summed if ranks > 1 else 0,
            parameters=trained,
            state=int(trained * (summed + 2 * moment)),
        )


class StepBytes(NamedTuple):
    """Bytes alive at the worst moment of each phase, weights included; bytes saved for backward."""

    forward: int
    head: int
    backward: int
    saved: int
    codes: int


def roles(config: TrainConfig, n_layers: int, cutoff: int) -> list[Role]:
    """Return each layer's role: ``first``, ``before`` the cutoff, ``fork`` at it, or ``behind``."""
    if config.objective.bridge == 0 or not 0 < cutoff < n_layers:
        cutoff = n_layers
    names: dict[int, Role] = {0: "first", cutoff: "fork"}
    return [names.get(i, "before" if i < cutoff else "behind") for i in range(n_layers)]


def layers_of(
    measured: Mapping[str, MeasuredStep], of_layers: Sequence[Role], policies: Sequence[str]
) -> list[LayerBytes]:
    """Return the bytes of each layer in a step; the last layer's include the head's gradients.

    Args:
        measured: measurements by policy.
        of_layers: role of each layer.
        policies: policy of each layer.
    """
    layers = [measured[p].layers[role] for role, p in zip(of_layers, policies, strict=True)]
    last = measured[policies[-1]]
    if of_layers[-1] != last.last:
        layers[-1] = layers[-1]._replace(backward=layers[-1].backward + last.behind_head)
    return layers


def sum_layers(layers: Sequence[LayerBytes], head: MeasuredStep, fixed: FixedMemory) -> StepBytes:
    """Sum a step's bytes over its layers, layer 0 first.

    In the backward pass gradients of layers replace what their forward pass saved.
    """
    alive = forward = backward = 0
    for i, layer in enumerate(layers):
        forward = max(forward, alive + layer.forward)
        alive += layer.saved
        gradients = fixed.earlier or (len(layers) - i) * fixed.gradient
        counts = (len(layers) - 1 - i) * head.counts
        backward = max(backward, alive + layer.backward + gradients + counts)
    weights = sum(fixed.weights.values())
    return StepBytes(
        forward=weights + fixed.earlier + forward,
        head=weights + fixed.earlier + alive + head.head,
        backward=weights + fixed.reduced + backward,
        saved=alive + head.behind_head,
        codes=sum(layer.codes for layer in layers),
    )


def step_memory(
    config: TrainConfig,
    target: Any,
    tokens: int,
    device: str,
    ranks: int = 1,
    policies: Sequence[str] | None = None,
    cutoff: int = 1,
) -> StepMemory:
    """Measure a training step on fake tensors, in about a second for each policy.

    Args:
        config: the run's configuration.
        target: transformers' configuration of the target.
        tokens: number of tokens of the longest sequence.
        device: device type that the run is planned for, ``cuda`` or ``cpu``.
        ranks: number of devices that share the run.
        policies: policy of each layer. None: ``objective.checkpoint``, which must not be ``auto``,
            in all layers.
        cutoff: the bridges' cutoff; a step at cutoff 1 needs the most.
    """
    n_layers = target.num_hidden_layers
    policies = policies or [config.objective.checkpoint] * n_layers
    measured = {p: measure(config, target, tokens, device, p) for p in set(policies)}
    by_density = [
        {policy: each[density] for policy, each in measured.items()}
        for density in range(len(measured[policies[0]]))
    ]
    one = by_density[0][policies[-1]]
    fixed = FixedMemory.for_run(config, n_layers, one, ranks)
    of_layers = roles(config, n_layers, cutoff)
    summed = [(layers_of(each, of_layers, policies), each[policies[-1]]) for each in by_density]
    steps = [sum_layers(layers, head, fixed) for layers, head in summed]
    parts = {
        **fixed.weights,
        "gradients": fixed.gradients,
        "gradients of a layer, to be summed": fixed.reduced,
        "codes": max(step.codes for step in steps),
        "saved for backward": max(step.saved - step.codes for step in steps),
        "one block, backward": max(layer.backward for layers, _ in summed for layer in layers),
        "logits of a chunk": one.logits,
    }
    return StepMemory(
        parts={name: size for name, size in parts.items() if size},
        phases={
            "forward": max(step.forward for step in steps),
            "head": max(step.head for step in steps),
            "backward": max(step.backward for step in steps),
            "update": sum(fixed.weights.values()) + fixed.gradients,
        },
        parameters=fixed.parameters,
        host_bytes=n_layers * (one.frozen_block + one.mlp) * config.pair.offload,
        state_bytes=fixed.state,
        adapter_bytes=fixed.parameters * DTYPES[config.pair.dtype].itemsize,
    )


class _StepBytes(LiveBytes):
    """Bytes alive in a step of a model, with a peak for each part of the step.

    Attributes:
        bounds: at the end of each part, its peak, the bytes alive, and the bytes of codes alive.
            The parts are each layer's forward pass, the head, and each layer's backward pass, the
            last layer first.
    """

    def __init__(self, workspaces: dict[Any, Callable[..., int]], model: ReplacementModel) -> None:
        super().__init__(workspaces)
        self.bounds: list[tuple[int, int, int]] = []
        self._hooks = [
            block.register_forward_pre_hook(partial(self._enter_block, mlp))
            for block, mlp in zip(model.blocks, model.mlps, strict=True)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _ops.nmse.default:  # the objective calls it once after every layer
            self.end()
        return out

    def end(self) -> None:
        """End a part of the step; start the next."""
        self.bounds.append((self.peak, self.alive, self.alive_of(_ops.encode.default)))
        self.peak = self.alive

    def end_head(self) -> None:
        """End the part of the head; blocks that the backward pass calls start no new part."""
        self.end()
        for hook in self._hooks:
            hook.remove()

    def _enter_block(self, mlp: Any, _: nn.Module, args: tuple[Tensor]) -> None:
        if mlp.mode == "replacement" and args[0].requires_grad:
            # The gradient of the layer's input ends its backward pass.
            args[0].register_hook(lambda _: self.end())


def measure(
    config: TrainConfig, target: Any, tokens: int, device: str, policy: str
) -> list[MeasuredStep]:
    """Measure a step under one policy: with dense products and, for transcoders, with codes."""
    pair, adapter = replace(config.pair, offload=False), config.trained
    loss = replace(config.objective, checkpoint=policy)
    dtype = DTYPES[pair.dtype]
    by_density: list[float | None] = [None]
    if isinstance(adapter, AdapterConfig):
        # "auto" follows the planned device, while the fake tensors are on the CPU.
        reference = adapter.implementation == "reference" or (
            adapter.implementation == "auto" and device == "cuda" and dtype == torch.float64
        )
        adapter = replace(adapter, implementation="reference" if reference else "sparse")
        F = adapter.features
        by_density = [F, dense_share(dtype, device) * F]
    if device == "cpu":
        loss = replace(loss, logits_dtype=None)
    setup = Setup(target, pair, adapter, loss, config.optimizer.batch_size, tokens)
    padded = setup.sequences > 1 or config.data.multiple(device) > 1
    return [_measure(setup, device, codes_per_token, padded) for codes_per_token in by_density]


@lru_cache(maxsize=256)
def _measure(
    setup: Setup, device: str, codes_per_token: float | None, padded: bool
) -> MeasuredStep:
    """Measure one step of a fake model that has a layer of each role."""
    codes = None if codes_per_token is None else [codes_per_token] * _LAYERS
    shape = (setup.sequences, setup.tokens)
    with fake_pair(setup, _LAYERS) as pair:
        model = ReplacementModel.create(pair, setup.trained)
        model.fused.plan_for(device, DTYPES[setup.pair.dtype])
        ids = torch.zeros(shape, dtype=torch.int64)
        real = torch.ones(shape, dtype=torch.bool) if padded else None
        batch = Batch(ids, real, ids, passes_mask=device != "cuda")
        for parameter in model.adapters.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        live = _StepBytes({op: partial(f, device) for op, f in _WORKSPACES.items()}, model)
        with live:
            for parameter in model.parameters():
                live.see(parameter.data)
            weights = live.peak = live.alive
            out = objective(model, batch, _CUTOFF, setup.objective, codes)
            live.end_head()
            out.loss.backward()
            live.end()
        mlp, block = _bytes(model.mlps[0].base), _bytes(model.blocks[0])
        frozen_block = block - mlp - _bytes(model.adapters[0])
        whole = weights - _bytes(model.adapters) - _LAYERS * (frozen_block + mlp)
        trained = tuple(sum(p.numel() for p in part.parameters()) for part in model.adapters)
    forward, (head, alive, _), backward = (
        live.bounds[:_LAYERS],
        live.bounds[_LAYERS],
        live.bounds[:_LAYERS:-1],
    )
    counts = 8 * model.n_features
    before = [(weights, 0), *((alive, codes) for _, alive, codes in forward)]
    layers = [
        LayerBytes(
            saved=_in_blocks(before[i + 1][0] - before[i][0]),
            codes=before[i + 1][1] - before[i][1],
            forward=forward[i][0] - before[i][0],
            backward=backward[i][0] - before[i + 1][0] - (_LAYERS - 1 - i) * counts,
        )
        for i in range(_LAYERS)
    ]
    of_layers: list[Role] = ["first", "before", "fork", "behind"]
    if setup.objective.bridge == 0:
        of_layers = ["first", "before", "before", "before"]
    return MeasuredStep(
        whole=whole,
        frozen_block=frozen_block,
        mlp=mlp,
        trained=trained,
        logits=live.workspace[_ops.linear_kl.default],
        counts=counts,
        head=head - before[-1][0],
        behind_head=alive - before[-1][0],
        layers=dict(zip(of_layers, layers, strict=True)),
        last=of_layers[-1],
    )


def _in_blocks(n: int) -> int:
    """Round up to the blocks of 512 bytes that CUDA's allocator hands out.

    This covers the few bytes by which layers of one role differ.
    """
    return -(-n // 512) * 512


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
